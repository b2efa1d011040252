"""Media: open files safely, read frames, write them back, speech samples, and the clock between them.

No model code lives here. The modules, in the order a video passes them: `opening` (refuses what is not media),
`reader` (frames upright, with their timestamps), `planes` (change a box and nothing else), `timeline` (source frames
<-> the model's 25 fps grid), `speech` (16 kHz mono samples), `writer` (atomic output with the audio as it was).
"""

from lipstream.media.opening import MediaError

__all__ = ["MediaError"]
