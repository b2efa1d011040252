"""Weights on disk: names, files, formats. Nothing here knows what the networks do."""
