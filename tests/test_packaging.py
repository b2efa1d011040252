"""The package: what the wheel holds, that it runs away from the checkout, and that the pins fit."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lipstream.cli.doctor import WEIGHTS, read_sums

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNWANTED = {"torchvision", "torchaudio", "decord"}
MAX_WEIGHTS = 40_000_000  # bytes


def plain(name: str) -> str:
    """A package name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    extras = PROJECT["optional-dependencies"]
    return [
        Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras.values() for text in extra)]
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = {
        p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    about = f"lipstream-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == files
    assert {about + "licenses/LICENSE", about + "licenses/NOTICE", about + "entry_points.txt"} <= names
    assert {"lipstream/py.typed", "lipstream/assets/demo/clip.mp4", "lipstream/assets/demo/speech.m4a"} <= names


def test_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
    code = "import lipstream; print(lipstream.__file__); from lipstream.cli.main import main; main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    place, version = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path) and version == f"lipstream {PROJECT['version']}"


def test_weights_are_whole_and_small() -> None:
    folder = ROOT / "src" / "lipstream" / "assets" / "pocket"
    sums = read_sums(folder / "SHA256SUMS")
    assert {*WEIGHTS, "syncnet.safetensors"} <= sums.keys(), "after new weights: make checksums"
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums} == sums
    assert sum((folder / name).stat().st_size for name in sums) <= MAX_WEIGHTS


def test_demo_files_are_small() -> None:
    folder = ROOT / "src" / "lipstream" / "assets" / "demo"
    assert (folder / "clip.mp4").stat().st_size <= 400_000
    assert (folder / "speech.m4a").stat().st_size <= 150_000


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[plain(requirement.name)]), requirement


def test_unwanted_packages_are_not_in_the_resolved_set() -> None:
    assert not UNWANTED & pins().keys()
    reached: set[str] = set()
    queue = requirements()
    while queue:
        name = plain(queue.pop().name)
        if name in reached:
            continue
        reached.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an extra that is not installed here
            continue
        queue += [r for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not UNWANTED & reached


def test_notice_names_every_third_party_asset() -> None:
    notice = (ROOT / "NOTICE").read_text()
    for part in ("face_detection_short_range", "face_landmark", "MakeHuman", "GRID", "whisper", "hibari", "demo"):
        assert part in notice


def test_readme_first_screen_has_the_two_commands() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make demo" in screen and "make test" in screen and "docs/contact.png" in screen


def test_what_readme_installs_is_enough_for_the_commands() -> None:
    """Every command's own modules load without the packages of the extras."""
    program = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"numba", "hibari", "onnx", "onnxruntime", "matplotlib", "peft", "transformers",
                                      "huggingface_hub", "ray", "diffusers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import lipstream
for name in ("personal", "training.ablation_workers", "training.distill", "training.teacher", "training.syncnet",
             "analysis.pocket", "analysis.study", "batch.run", "batch.syncing", "data.prepare.work",
             "evaluation.torture", "evaluation.torture_faces", "fullsize_engine", "pipeline"):
    importlib.import_module("lipstream." + name)
for module in pkgutil.iter_modules(importlib.import_module("lipstream.cli").__path__):
    importlib.import_module("lipstream.cli." + module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


def test_torch_is_new_enough_for_new_cards() -> None:
    """Compute capability 12.0 (RTX 50) came with torch 2.7; the range must not allow less, nor hold newer ones back."""
    (torch,) = (Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch"))
    assert not any(torch.specifier.contains(old) for old in ("2.0.1", "2.5.1", "2.6.0"))
    assert torch.specifier.contains("2.99.0") and torch.specifier.contains(pins()["torch"])


def test_nothing_is_moved_to_cuda_by_name() -> None:
    """What runs anywhere goes to the device that was asked for."""
    for path in (ROOT / "src").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "cuda" not in [func.attr for func in calls if isinstance(func, ast.Attribute)], path
