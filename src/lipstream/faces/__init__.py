"""Faces: find one, follow its 468 landmarks through a video (the preprocessing every lip-sync model assumes).

Public names: `FaceDetector`, `FaceMesh`, `FaceTracker`, `FaceTrack`. Import them from their own modules, e.g.
`from lipstream.faces.track import FaceTracker`. What a model sees of a face: `canvas` (small model), `crop` (full-size
models) and `official` (the same, number for number as the reference does); `composite` and `official_paste` go back.
"""
