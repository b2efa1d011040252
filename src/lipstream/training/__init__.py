"""Training: one readable file per stage; :mod:`loop` holds what they share."""
