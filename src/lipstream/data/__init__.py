"""Training data: synthetic talking heads and the preparation of real recordings."""
