"""Weights on disk: names, files, formats, hashes, licences. Nothing here knows what the networks do.

`files` and `networks` are the pocket model's single files; `convert` makes networks and Hub-style folders (`hub`) of
released checkpoints: `sources` opens them, `keys_*` rename, `lora` merges, `strict` checks; `pull` downloads them.
"""
