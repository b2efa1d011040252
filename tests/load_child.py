"""A process of its own that loads a checkpoint and prints what that did to its memory (JSON, bytes).

python load_child.py file|folder|naive PATH [untouched]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from lipstream.checkpoints.convert import assemble
from lipstream.checkpoints.hub import load_pretrained
from lipstream.models.dit import FLAVOURS, DiT, DiTConfig


def memory() -> dict[str, int]:
    """Peak of all resident memory, and of it now: own pages and pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def load_naively(path: Path) -> nn.Module:
    """What must not happen: a file read into memory and then copied into a network that has its own."""
    state = torch.load(path, weights_only=True)
    with torch.device("meta"):
        model = DiT(DiTConfig.from_dict(assemble([path]).config)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.load_state_dict({name.removeprefix("_core."): tensor for name, tensor in state.items()})
    return model


def main(how: str, path: Path, touch: bool) -> None:
    with torch.device("meta"):
        DiT(FLAVOURS["test"])  # the first network on that device makes torch import 30 MB of its own
    before = memory()
    loaders = {"file": lambda p: assemble([p]).load(), "folder": load_pretrained, "naive": load_naively}
    model = loaders[how](path)
    loaded = memory()
    state = model.state_dict()
    total = sum(float(tensor.sum()) for tensor in state.values()) if touch else 0.0  # reads every page
    used = memory()
    growth = {
        when: {name: now[name] - before[name] for name in now} for when, now in (("loaded", loaded), ("used", used))
    }
    print(
        json.dumps(growth | {"sum": total, "tensors": len(state), "parameters": sum(t.numel() for t in state.values())})
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), "untouched" not in sys.argv)
