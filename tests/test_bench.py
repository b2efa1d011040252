"""`lipstream bench`: its figures add up, nothing known is encoded in the loop, and what is missing is not invented."""

from __future__ import annotations

import json
import resource
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_model import random_conditions, random_model
from lipstream.cli.main import main
from lipstream.diffusion import Rollout
from lipstream.evaluation import bench_parts
from lipstream.evaluation.bench import STAGES, BenchConfig, BenchReport, bench
from lipstream.evaluation.bench_parts import load_parts, random_dit, wan_codec
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import FLAVOURS

TINY = BenchConfig(model="test", dtype="float32", chunks=4, starts=2)


def stages_of(report: BenchReport) -> set[str]:
    return {row.stage for row in report.stages if row.median_seconds is not None}


def test_figures_of_a_flavour_without_a_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "bench.json"
    arguments = ["--dtype", "float32", "--chunks", "4", "--starts", "2", "--json", str(written)]
    assert main(["bench", "--model", "test", *arguments]) == 0
    shown, report = capsys.readouterr().out, json.loads(written.read_text())
    assert "live: not measured" in shown and "time to first frame: not measured" in shown and "random weights" in shown
    assert report["live"] is report["prepared"] is report["ttff_median_seconds"] is None
    assert report["core"]["chunks"] == 2 and report["weights"] == "random"
    core = report["core"]
    assert core["fps"] == pytest.approx(12 / core["chunk_median_seconds"], rel=0.01)
    assert [row["stage"] for row in report["stages"]] == list(STAGES)
    table = {row["stage"]: row for row in report["stages"]}
    assert table["encode"]["median_seconds"] is table["decode"]["median_seconds"] is None
    assert table["call 1"]["flops"] == table["call 2"]["flops"] > table["clean"]["flops"] > 0
    for row in table.values():
        if row["flops"]:
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median_seconds"])
    assert report["chunk_flops"] == sum(table[name]["flops"] for name in ("call 1", "call 2", "clean"))
    assert report["memory_bytes"]["key_value_cache"] == report["memory_bytes"]["key_value_cache_formula"]
    assert 0 < report["chunk_flops_to_reference"] <= 1.02


def test_joined_clean_pass_has_no_stage_of_its_own() -> None:
    report = bench(BenchConfig(model="test", dtype="float32", chunks=4, starts=1, join_clean_pass=True))
    assert stages_of(report) == {"audio", "call 1", "call 2", "copy"}
    with pytest.raises(ValueError, match="guidance"):
        bench(BenchConfig(model="pocket", chunks=3, starts=1, join_clean_pass=True))


def test_pocket_has_one_call_of_two_branches() -> None:
    report = bench(BenchConfig(model="pocket", chunks=3, starts=1))
    table = {row.stage: row.flops or 0 for row in report.stages}
    assert "call 2" not in stages_of(report) and 1.9 * table["clean"] < table["call 1"] < 2.6 * table["clean"]
    assert report.chunk_flops == table["call 1"] + table["clean"]


def test_pocket_prepared_encodes_nothing_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """P11: with source latents given, the loop runs no source and no reference encode; live runs one a chunk."""
    encodes: list[int] = []
    encode = PocketCodec.encode

    def counted(self: PocketCodec, fields: Tensor, textures: Tensor) -> Tensor:
        encodes.append(fields.shape[1])
        return encode(self, fields, textures)

    monkeypatch.setattr(PocketCodec, "encode", counted)
    phases: dict[str, int] = {}

    def progress(phase: str) -> None:
        phases[phase] = len(encodes)

    report = bench(BenchConfig(model="pocket", dtype="float32", chunks=3, starts=1), progress=progress)
    assert phases["prepared"] - phases["live"] == 3  # the live run: one encode a chunk
    # Behind it: three made beforehand for the prepared run, and two to count operations.
    assert len(encodes) - phases["prepared"] == 3 + 2
    assert stages_of(report) == set(STAGES) - {"call 2"}
    assert report.weights == "shipped" and report.live is not None and report.prepared is not None
    assert report.ttff_median_seconds is not None and report.ttff_median_seconds < report.cold_start_seconds


def test_random_weights_are_finite_and_of_the_asked_size() -> None:
    model = random_dit(FLAVOURS["test"], torch.device("cpu"), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and all(torch.isfinite(p).all() for p in model.parameters())
    parts = load_parts("test", device=torch.device("cpu"), dtype=torch.float32, size=32, layers=2)
    assert len(parts.model.blocks) == 2 and (parts.height, parts.width) == (4, 4)
    assert any("2 of 3 layers" in note for note in parts.notes)


def test_too_large_a_model_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_parts, "free_bytes", lambda device: 20_000_000_000)
    with pytest.raises(ValueError, match=r"needs about 3\d\.\d GB, cpu has 20\.0 GB free: use --layers"):
        load_parts("14b", device=torch.device("cpu"), dtype=torch.bfloat16, size=None, layers=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device() -> None:
    with pytest.raises(ValueError, match="no CUDA GPU"):
        bench(BenchConfig(model="test", device="cuda"))


def test_wan_adapter_runs_two_encoders_and_the_tiny_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins with the interface of the Wan VAE and the TAE."""
    encoded: list[tuple[int, ...]] = []

    class Stand(torch.nn.Module):
        def __init__(self, config: str) -> None:
            super().__init__()
            assert config == "configuration"

        def stream_view(self, batch: int) -> Stand:
            return self

        def encode(self, video: Tensor) -> Tensor:
            encoded.append(tuple(video.shape))
            return torch.zeros(1, 16, 3, 4, 4)

        def decode(self, latents: Tensor) -> Tensor:
            return torch.full((1, 3, 12, 32, 32), 0.5)

    for name, flavours in (("WanVAE", "WAN_VAE_FLAVOURS"), ("TAE", "TAE_FLAVOURS")):
        monkeypatch.setattr(bench_parts, name, Stand)
        monkeypatch.setattr(bench_parts, flavours, {"official": "configuration"})
    codec = wan_codec(32, torch.device("cpu"), torch.float32, [])()
    source = codec.source(12)
    latents = codec.encode(source)
    assert encoded == [(1, 3, 12, 32, 32)] * 2
    pictures = codec.decode(latents, source, latents)
    assert pictures.dtype == torch.uint8 and pictures.unique().tolist() == [128]


@pytest.mark.slow
@torch.inference_mode()
def test_ten_minutes_take_no_more_time_per_chunk_and_no_more_memory() -> None:
    """P8 and P9: 1250 chunks are ten minutes at 25 frames per second."""
    torch.set_num_threads(1)
    model = random_model(FLAVOURS["test"])
    conditions = random_conditions(model.config, 1, 3, 4, 4)
    rollout = Rollout(model, height=4, width=4)
    seconds, resident = [], {}
    for chunk in range(1251):
        began = time.process_time()
        rollout.step(conditions)
        rollout.commit()
        seconds.append(time.process_time() - began)
        if chunk in (10, 1250):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[chunk] = pages * resource.getpagesize()
    early, late = (statistics.quantiles(seconds[start : start + 250], n=10)[0] for start in (10, 1000))
    assert late / early <= 1.05, f"{late / early:.3f}"
    assert resident[1250] - resident[10] <= 8 << 20, resident
