"""lipstream: real-time video-to-video lip synchronisation.

A talking video and any speech go in; the same video (same frames, same size, same timestamps) comes out with lips
that match the speech. An open implementation of *Lip Forcing* (few-step autoregressive video diffusion).
"""

__version__ = "0.1.0"
