"""lipstream: real-time video-to-video lip synchronisation.

A talking video and any speech go in; the same video (same frames, same size, same timestamps) comes out with lips
that match the speech. An open implementation of *Lip Forcing* (few-step autoregressive video diffusion).

    from lipstream import LipSync
    LipSync.from_pretrained("pocket")("talk.mp4", "speech.wav", "out.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipstream.options import SyncOptions
    from lipstream.pipeline import LipSync, Progress, SyncReport
    from lipstream.session import SyncedFrame

__all__ = ["LipSync", "Progress", "SyncOptions", "SyncReport", "SyncedFrame", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the pipeline on first use: ``lipstream --help`` and the training tools need not wait for it."""
    if name in ("LipSync", "Progress", "SyncReport"):
        from lipstream import pipeline

        return getattr(pipeline, name)
    if name == "SyncOptions":
        from lipstream.options import SyncOptions

        return SyncOptions
    if name == "SyncedFrame":
        from lipstream.session import SyncedFrame

        return SyncedFrame
    raise AttributeError(f"module 'lipstream' has no attribute '{name}'")
