"""Loading makes no second copy: peak memory of child processes that load a checkpoint of 0.12 GB and one of 28.6 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lipstream.checkpoints.hub import save_pretrained
from lipstream.models.dit import FLAVOURS, DiT, DiTConfig

CONFIG = DiTConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=3, text_dim=512, audio_dim=64, audio_blocks=(2, 2))
MARGIN = 10 << 20  # what imports and names cost, bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "RssAnon" not in (Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""),
        reason="needs Linux's memory counters",
    ),
]


def measure(how: str, path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("load_child.py")), how, str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """The same random weights as an official file and as a model folder, and their size in bytes."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = DiT(CONFIG).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for tensor in model.parameters():
        torch.nn.init.uniform_(tensor, -0.1, 0.1)
    torch.save({f"_core.{name}": tensor for name, tensor in model.state_dict().items()}, root / "student.pth")
    save_pretrained(model, root / "folder", kind="student", max_shard_bytes=40_000_000)
    return root / "student.pth", root / "folder", sum(t.nbytes for t in model.state_dict().values())


def test_no_second_copy(checkpoints: tuple[Path, Path, int]) -> None:
    file, folder, size = checkpoints
    assert size > 110_000_000 and len(list(folder.glob("*.safetensors"))) > 2
    sums = set()
    for how, path in (("file", file), ("folder", folder)):
        found = measure(how, path)
        print(how, {when: {k: f"{v / size:.3f}" for k, v in found[when].items()} for when in ("loaded", "used")})
        assert found["loaded"]["VmHWM"] <= MARGIN, "loading alone reads nothing"
        assert found["used"]["RssAnon"] <= MARGIN, "used weights are the file's own pages"
        assert found["used"]["VmHWM"] <= size + MARGIN
        assert found["used"]["RssFile"] >= 0.95 * size, "the measurement sees mapped pages"
        sums.add(found["sum"])
    naive = measure("naive", file)
    print("naive", {k: f"{v / size:.3f}" for k, v in naive["used"].items()})
    assert naive["used"]["VmHWM"] >= 1.9 * size, "the measurement sees a second copy"
    assert sums == {naive["sum"]}


def test_the_14b_student_is_mapped(tmp_path: Path) -> None:
    """A file with the 14B student's 1137 tensors whose numbers were never written (a hole in the disk, all zeros)."""
    with torch.device("meta"):
        specs = {name: tensor.shape for name, tensor in DiT(FLAVOURS["14b"]).state_dict().items()}
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in specs.items()}
    path = tmp_path / "lipforcing_14b.pth"
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    if path.stat().st_blocks * 512 > 1e9:
        path.unlink()
        pytest.skip("this file system stores holes")
    assert abs(path.stat().st_size - 28_588_528_943) < 100_000  # the released file has another archive name inside
    found = measure("file", path, "untouched")
    print({name: f"{value / 1e6:.1f} MB" for name, value in found["loaded"].items()})
    assert (found["tensors"], found["parameters"]) == (1137, 14_294_081_696)
    assert found["loaded"]["VmHWM"] <= 40 << 20
