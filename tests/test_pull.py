"""Downloads against a rough local server: they resume, they check, and no wrong file ever gets the final name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lipstream.checkpoints import artefacts as table
from lipstream.checkpoints.artefacts import MODELS, NON_COMMERCIAL, Artefact, artefacts_of
from lipstream.checkpoints.pull import (
    SUMS,
    Outcome,
    PullError,
    Retries,
    addresses,
    check_disk,
    missing_bytes,
    pull,
    verify,
)
from lipstream.cli import common
from lipstream.cli.main import main
from rough_server import Manners, serve

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = Artefact(
    name="sub/weights.pth", what="a test", bytes=len(CONTENT), sha256_start=SHA256[:16], sha256_end=SHA256[-21:],
    licence="MIT", repo="me/repo", path="weights.pth", url="",
)  # fmt: skip
UNKNOWN = dataclasses.replace(FILE, bytes=None, sha256_start="", sha256_end="")
AT_ONCE = Retries(tries=3, pause_seconds=0)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def manners(**options: Any) -> Manners:
    return Manners(files={"sub/weights.pth": CONTENT}, **options)


def get(folder: Path, *mirrors: str, file: Artefact = FILE, **options: Any) -> Outcome:
    (outcome,) = pull([file], folder, mirrors=mirrors, retries=AT_ONCE, **options)
    return outcome


def assert_good(outcome: Outcome, folder: Path, status: str = "fetched") -> None:
    assert (outcome.status, outcome.sha256, outcome.problem) == (status, SHA256, "")
    assert (folder / "sub" / "weights.pth").read_bytes() == CONTENT
    assert [path.name for path in (folder / "sub").iterdir()] == ["weights.pth"]  # no part, no mark left
    assert (folder / SUMS).read_text() == f"{SHA256}  sub/weights.pth\n"


def assert_nothing(outcome: Outcome, folder: Path, said: str) -> None:
    assert outcome.status == "failed" and said in outcome.problem, outcome.problem
    assert not (folder / "sub" / "weights.pth").exists()


# --- the table ---


def test_the_table_is_what_is_known() -> None:
    files = {file.name: file for file in artefacts_of("lipforcing-14b")}
    assert len(files) == 13
    sizes = {
        "lipforcing_14b.pth": 28_588_528_943,
        "Wan2.1_VAE.pth": 507_609_880,
        "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
        "google/umt5-xxl/tokenizer.json": 16_837_417,
        "google/umt5-xxl/spiece.model": 4_548_313,
        "google/umt5-xxl/tokenizer_config.json": 61_728,
        "google/umt5-xxl/special_tokens_map.json": 6_623,
        "wav2vec2-base-960h/model.safetensors": 377_607_901,
        "taew2_1.pth": 22_678_901,
        "mask.png": 1_871,
    }
    assert {name: file.bytes for name, file in files.items() if file.bytes} == sizes
    starts = {
        "lipforcing_14b.pth": "ea9f111f374a208a", "Wan2.1_VAE.pth": "38071ab59bd94681",
        "models_t5_umt5-xxl-enc-bf16.pth": "7cace0da2b446bbb",
        "wav2vec2-base-960h/model.safetensors": "8aa76ab2243c8174", "taew2_1.pth": "d26151e76cdc2c94",
        "mask.png": "aa233251b9ff5691", "buffalo_l/det_10g.onnx": "5838f7fe053675b1",
        "buffalo_l/2d106det.onnx": "f001b856447c4138",
    }  # fmt: skip
    assert {name: file.sha256_start for name, file in files.items() if file.sha256_start} == starts
    assert {file.sha256_end for file in files.values()} == {"", "cda72c727a93cd43e4307"}
    # 14B parameters in bfloat16 and the pickle around them (365,551 bytes).
    assert sizes["lipforcing_14b.pth"] == 2 * 14_294_081_696 + 365_551
    assert {file.name for file in files.values() if file.non_commercial} == {
        "buffalo_l/det_10g.onnx", "buffalo_l/2d106det.onnx",
    }  # fmt: skip
    assert files["teacher/omniavatar_ls_14b.pt"].known == "nothing"
    with pytest.raises(ValueError, match=r"unknown model 'x': files are known for lipforcing-14b"):
        artefacts_of("x")


def test_addresses() -> None:
    student, *_, tae, mask, face, _ = MODELS["lipforcing-14b"]
    assert addresses(student, []) == ["https://huggingface.co/JinhyukJang/lipforcing/resolve/main/lipforcing_14b.pth"]
    assert addresses(mask, ["http://a/b/", "https://hf/{repo}/x/{path}"]) == [
        "http://a/b/mask.png",
        "https://hf/bytedance/LatentSync/x/latentsync/utils/mask.png",
        "https://raw.githubusercontent.com/bytedance/LatentSync/main/latentsync/utils/mask.png",
    ]
    assert addresses(face, []) == [] and "buffalo_l" in face.hint and tae.licence == "MIT"


# --- good and rough servers ---


def test_plain(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int | None]] = []
    with serve(manners()) as url:
        outcome = get(tmp_path, url, report=lambda *stage: stages.append(stage))
    assert_good(outcome, tmp_path)
    assert stages[-1] == ("check sub/weights.pth", len(CONTENT), len(CONTENT))
    assert ("fetch sub/weights.pth", len(CONTENT), len(CONTENT)) in stages
    assert_good(get(tmp_path), tmp_path, "there")  # nobody is asked: there is no address


def test_redirects_keep_the_range(tmp_path: Path) -> None:
    real = Manners(files={"real/sub/weights.pth": CONTENT}, drop_after=300_000)
    with serve(real) as url:
        real.redirect = f"{url}/real"
        assert_good(get(tmp_path, url), tmp_path)
    assert real.sent_bytes == len(CONTENT)


def test_dropped_connections_are_taken_up(tmp_path: Path) -> None:
    rough = manners(drop_after=100_000)
    with serve(rough) as url:
        assert_good(get(tmp_path, url), tmp_path)
    assert [asked for _, asked in rough.asked] == [None, *(f"bytes={n}-" for n in range(100_000, 1_024_000, 100_000))]
    assert rough.sent_bytes == len(CONTENT)  # no byte twice


def test_a_stopped_run_is_continued(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(stage: str, done: int, total: int | None) -> None:
        if done > 500_000:
            raise StopError

    first, second = manners(), manners()
    with serve(first) as url, pytest.raises(StopError):
        get(tmp_path, url, report=stop)
    part = tmp_path / "sub" / "weights.pth.part"
    had = part.stat().st_size
    assert had > 500_000 and not (tmp_path / "sub" / "weights.pth").exists()
    assert missing_bytes([FILE], tmp_path) == len(CONTENT) - had
    with serve(second) as url:
        assert_good(get(tmp_path, url), tmp_path)
    assert [asked for _, asked in second.asked] == [f"bytes={had}-"]


def test_a_server_that_ignores_range(tmp_path: Path) -> None:
    rough = manners(drop_after=400_000, drops=2, ranges=False)
    with serve(rough) as url:
        assert_good(get(tmp_path, url), tmp_path)
    assert [asked for _, asked in rough.asked] == [None, "bytes=400000-", "bytes=400000-"]


def test_a_server_that_never_finishes(tmp_path: Path) -> None:
    with serve(manners(drop_after=400_000, ranges=False)) as url:
        outcome = get(tmp_path, url)
    assert_nothing(outcome, tmp_path, "ended at byte 400000 of 1024000, after 3 tries")


def test_wrong_place(tmp_path: Path) -> None:
    """A server that sends other bytes than it was asked for must not be believed."""
    with serve(manners(drop_after=400_000, shift=7)) as url:
        outcome = get(tmp_path, url)
    assert_nothing(outcome, tmp_path, "instead of 400000-")


@pytest.mark.parametrize("at", [0, 512_000, len(CONTENT) - 1])
def test_one_wrong_byte(at: int, tmp_path: Path) -> None:
    spoiled, good = manners(wrong_byte=at), manners()
    with serve(spoiled) as url, serve(good) as second:
        alone = get(tmp_path / "a", url)
        assert_nothing(alone, tmp_path / "a", "is not the released file: its SHA-256 is")
        assert not any((tmp_path / "a" / "sub").glob("*.part"))
        assert not (tmp_path / "a" / SUMS).exists()
        assert_good(get(tmp_path / "b", url, second), tmp_path / "b")


def test_a_spoiled_part_does_not_spoil_the_next_mirror(tmp_path: Path) -> None:
    spoiled, good = manners(wrong_byte=5, drop_after=600_000, ranges=False), manners()
    with serve(spoiled) as url, serve(good) as second:
        assert_good(get(tmp_path, url, second), tmp_path)
    # It first went on from what the first mirror sent, found it wrong, and asked for the whole.
    assert [asked for _, asked in good.asked] == ["bytes=600000-", None]


def test_another_size_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    longer = Manners(files={"sub/weights.pth": CONTENT + b"!"})
    with serve(longer) as url:
        assert_nothing(get(tmp_path, url), tmp_path, "offers 1024001 bytes, the released file has 1024000")
        longer.lengths = False
        assert_nothing(get(tmp_path, url), tmp_path, "sends more than the 1024000 bytes")
    assert not any((tmp_path / "sub").iterdir())


def test_a_part_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.pth.part").write_bytes(CONTENT + b"more")
    with serve(manners()) as url:
        assert_good(get(tmp_path, url), tmp_path)


def test_a_complete_part(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.pth.part").write_bytes(CONTENT)
    quiet = manners()
    with serve(quiet) as url:
        assert_good(get(tmp_path, url), tmp_path)
    assert quiet.asked == []


def test_busy_and_missing(tmp_path: Path) -> None:
    with serve(manners(statuses=[503, 429])) as busy:
        assert_good(get(tmp_path / "a", busy), tmp_path / "a")
    empty = Manners(files={})
    with serve(empty) as url:
        assert_nothing(get(tmp_path / "b", url), tmp_path / "b", "answers 404")
    assert len(empty.asked) == 1  # 404 is an answer, not a reason to try again
    assert_nothing(get(tmp_path / "b", url), tmp_path / "b", "refused")  # the server is gone


def test_versions_are_never_joined(tmp_path: Path) -> None:
    """Where no hash is known, a part is continued only if the server says that it is of the same version."""
    rough = manners(drop_after=600_000, drops=1)
    with serve(rough) as url:
        assert get(tmp_path / "a", url, file=UNKNOWN).sha256 == SHA256
        assert [asked for _, asked in rough.asked] == [None, "bytes=600000-"]
        for etag in ('"v2"', None):  # another version; a server that marks none
            folder = tmp_path / f"{etag}"
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "weights.pth.part").write_bytes(b"\0" * 1000)
            (folder / "sub" / "weights.pth.part.etag").write_text('"v0"')
            rough.etag = etag
            assert_good(get(folder, url, file=UNKNOWN), folder)
        folder = tmp_path / "unmarked"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights.pth.part").write_bytes(b"\0" * 1000)
        assert_good(get(folder, url, file=UNKNOWN), folder)


def test_what_lies_there_is_checked(tmp_path: Path) -> None:
    final = tmp_path / "sub" / "weights.pth"
    final.parent.mkdir()
    final.write_bytes(CONTENT[:-1] + b"\0")
    with serve(manners()) as url:
        outcome = get(tmp_path, url)
    assert outcome.status == "fetched" and final.read_bytes() == CONTENT
    assert (tmp_path / "sub" / "weights.pth.rejected").read_bytes() == CONTENT[:-1] + b"\0"


def test_later_runs_check_against_the_noted_hash(tmp_path: Path) -> None:
    with serve(manners()) as url:
        assert_good(get(tmp_path, url, file=UNKNOWN), tmp_path)
    final = tmp_path / "sub" / "weights.pth"
    with pytest.raises(PullError, match="has changed since it was fetched"):
        verify(UNKNOWN, final, recorded="0" * 64)
    final.write_bytes(b"other")
    assert_nothing(get(tmp_path, file=UNKNOWN), tmp_path, "")


# --- offline, disk, mistakes ---


def test_offline_folder(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    assert_nothing(get(tmp_path / "a", from_folder=stick), tmp_path / "a", f"is not in {stick}")
    (stick / "weights.pth").write_bytes(CONTENT)
    assert_good(get(tmp_path / "a", from_folder=stick), tmp_path / "a", "copied")
    (stick / "weights.pth").write_bytes(CONTENT[:-1] + b"\0")
    assert_nothing(get(tmp_path / "b", from_folder=stick), tmp_path / "b", "is not the released file")
    (stick / "weights.pth").write_bytes(CONTENT[:-1])
    assert_nothing(get(tmp_path / "b", from_folder=stick), tmp_path / "b", "has 1023999 bytes")
    assert not (tmp_path / "b" / "sub").exists() or not any((tmp_path / "b" / "sub").iterdir())


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000_000))
    quiet = manners()
    with serve(quiet) as url, pytest.raises(PullError, match=r"0\.0 GB are still to come and 0\.2 GB are free"):
        get(tmp_path / "new" / "folder", url)
    assert quiet.asked == [] and not (tmp_path / "new").exists()
    check_disk([], tmp_path)


def test_disk_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lipstream.checkpoints.pull._request", full)
    assert_nothing(get(tmp_path, "http://127.0.0.1:9"), tmp_path, "the disk is full")


def test_mirrors_must_be_http(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="must start with http"):
        get(tmp_path, "file:///etc")


# --- the command ---


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    licensed = dataclasses.replace(FILE, name="nc.onnx", path="nc.onnx", licence=NON_COMMERCIAL, hint="unpack it")
    monkeypatch.setitem(table.MODELS, "small", (FILE, licensed))


@pytest.mark.usefixtures("small_model")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries
    server = Manners(files={"sub/weights.pth": CONTENT, "nc.onnx": CONTENT}, drop_after=300_000)
    with serve(server) as url:
        command = ["pull", "small", "--folder", str(tmp_path), "--mirror", url]
        assert main(command) == common.EXIT_USAGE  # nobody there to ask
        assert "say --yes" in capsys.readouterr().err and server.asked == []
        assert main([*command, "--yes"]) == common.EXIT_OK
        said = capsys.readouterr().out
        assert "left out: nc.onnx is for non-commercial research only" in said
        assert f"fetched: sub/weights.pth (checked by size and 37 of 64 hash digits; SHA-256 {SHA256})" in said
        assert "1 of 1 files are there" in said and not (tmp_path / "nc.onnx").exists()
        assert main([*command, "--yes", "--accept", "non-commercial", "--only", "nc*"]) == common.EXIT_OK
    assert (tmp_path / "nc.onnx").read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "fetched: nc.onnx" in said and "sub/weights.pth" not in said


@pytest.mark.usefixtures("small_model")
def test_command_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(status: int, said: str, *arguments: str) -> None:
        assert main(["pull", *arguments, "--folder", str(tmp_path / "to"), "--yes"]) == status
        assert said in capsys.readouterr().err

    fails(common.EXIT_USAGE, "unknown model 'large'", "large")
    fails(common.EXIT_USAGE, "leave out --mirror", "small", "--mirror", "http://x", "--from-folder", str(tmp_path))
    fails(common.EXIT_USAGE, "no such folder", "small", "--from-folder", str(tmp_path / "none"))
    fails(common.EXIT_USAGE, "--only x: the files are", "small", "--only", "x")
    fails(common.EXIT_FAILED, f"sub/weights.pth: is not in {tmp_path}", "small", "--from-folder", str(tmp_path))
    fails(common.EXIT_FAILED, "nc.onnx: unpack it", "small", "--only", "nc.onnx", "--accept", "non-commercial")


@pytest.mark.usefixtures("small_model")
def test_command_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lipstream.checkpoints.pull._request", interrupted)
    command = ["pull", "small", "--folder", str(tmp_path), "--mirror", "http://127.0.0.1:9", "--yes"]
    assert main(command) == common.EXIT_INTERRUPTED
    assert "continues where it stopped" in capsys.readouterr().err


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipstream.cli.pull import default_folder

    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join("x", "y"))
    assert default_folder("m") == Path("x/y/lipstream/m")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder("m") == Path.home() / ".cache" / "lipstream" / "m"


def test_pull_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lipstream.cli.main import main; main(['pull', 'nothing']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
