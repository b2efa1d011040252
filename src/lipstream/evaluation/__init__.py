"""Measurements of a lip-synced video: what each figure of the README and the model card means, one file per figure.

Nothing here knows the pipeline: protocols take any :class:`lipstream.evaluation.reversed.Synchroniser`.
"""
