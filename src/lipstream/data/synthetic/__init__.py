"""Synthetic talking heads: licence-clean pictures and speech with exact ground truth.

A CC0 head (`basis`, `identity`, `hair`, `teeth`) is drawn by a small software renderer (`raster`, `shading`,
`renderer`) in front of a `scene`, and moved by a `performance` computed from the phonemes of a synthetic voice
(`voices`, `visemes`). `generate` writes whole data sets; the command is `lipstream data synthesize`.
"""
