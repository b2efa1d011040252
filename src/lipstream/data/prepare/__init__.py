"""Real videos to training samples: the paper's data pipeline (Lip Forcing, training data).

25 fps and 16 kHz, shots, segments of 5-10 s in which one face always shows, alignment at 512 px, audio-visual offset
set to zero, filters of sync and picture quality, shards. Run `lipstream prepare VIDEOS -o OUT`.
"""
