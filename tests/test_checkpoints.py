"""Foreign checkpoints and model folders: every container loads strictly and equal, everything wrong is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign import (
    CONTAINERS,
    RANK,
    TINY,
    adapter_state,
    base_state,
    in_diffusers_naming,
    save_dcp,
    save_shards,
    tiny_model,
    tiny_state,
)
from lipstream.checkpoints.convert import assemble, convert, load_base
from lipstream.checkpoints.hub import (
    CONFIG,
    INDEX,
    Provenance,
    load_pretrained,
    plan_shards,
    push_to_hub,
    read_folder_config,
    save_pretrained,
)
from lipstream.checkpoints.keys_dit import infer_config
from lipstream.checkpoints.lora import LoraConfig
from lipstream.checkpoints.mapping import load_in_pieces
from lipstream.checkpoints.sources import from_tensors, open_source
from lipstream.checkpoints.strict import CheckpointError, TensorSpec, compare, specs_of
from lipstream.cli.common import EXIT_OK, EXIT_USAGE
from lipstream.cli.main import main
from lipstream.models.dit import FLAVOURS, DiT

LORA = LoraConfig(rank=RANK, alpha=2)


def assert_same(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_loads(container: str, tmp_path: Path) -> None:
    write, wrapper, kind = CONTAINERS[container]
    state = tiny_state()
    found = assemble([write(state, tmp_path)])
    assert (found.source.wrapper, found.kind.name, found.key_format) == (wrapper, kind, "official")
    model = found.load()
    assert isinstance(model, DiT) and model.config == TINY and not model.training
    assert_same(model, state)


def test_base_and_adapter_in_both_namings(tmp_path: Path) -> None:
    save_shards(base_state(), tmp_path / "wan")
    save_shards(in_diffusers_naming(base_state()), tmp_path / "diffusers")
    torch.save(adapter_state(), tmp_path / "adapter.pt")
    official = assemble([tmp_path / "wan", tmp_path / "adapter.pt"], lora=LORA)
    other = assemble([tmp_path / "adapter.pt", tmp_path / "diffusers"], lora=LORA)
    assert official.kind.name == other.kind.name == "teacher"
    assert (official.key_format, other.key_format) == ("official", "diffusers")
    assert official.merge == {"precision": "bf16", "rank": RANK, "alpha": 2}
    merged = official.load()
    assert_same(merged, dict(other.load().state_dict()))
    # What no factor touches is the base's or the adapter's own, bit for bit.
    state = merged.state_dict()
    for name in ("blocks.1.norm3.weight", "blocks.3.modulation", "head.head.weight", "time_projection.1.bias"):
        assert torch.equal(state[name], base_state()[name])
    for name in ("audio_proj.proj.weight", "audio_cond_projs.1.bias", "patch_embedding.weight"):
        assert torch.equal(state[name], adapter_state()[name])
    assert not torch.equal(state["blocks.0.self_attn.q.weight"], base_state()["blocks.0.self_attn.q.weight"])


def test_an_older_adapter_grows(tmp_path: Path) -> None:
    save_file(base_state(), tmp_path / "wan.safetensors")
    torch.save(adapter_state(channels=33), tmp_path / "adapter.pt")
    kernel = assemble([tmp_path / "wan.safetensors", tmp_path / "adapter.pt"], lora=LORA).source.read(
        "patch_embedding.weight"
    )
    assert kernel.shape[1] == 65 and kernel[:, :33].all() and not kernel[:, 33:].any()


def test_a_base_alone_is_for_training(tmp_path: Path) -> None:
    save_file(base_state(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=r"wan\.safetensors: a base Wan without audio; name its OmniAvatar"):
        assemble([tmp_path / "wan.safetensors"])
    model = tiny_model(seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = load_base(model, [tmp_path / "wan.safetensors"])
    assert set(fresh) == {name for name in before if name.startswith("audio")}
    after, base = model.state_dict(), base_state()
    for name in before:
        if name == "patch_embedding.weight":
            assert torch.equal(after[name][:, :16], base[name])
            assert torch.equal(after[name][:, 16:], before[name][:, 16:])
        else:
            assert torch.equal(after[name], before[name] if name in fresh else base[name]), name


def change_key(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({new: state.pop(old)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("head.modulation"), "1 missing: head.modulation$"),
        (change_key("head.modulation", "head.modulate"), "1 missing: head.modulation; 1 unknown: head.modulate$"),
        (lambda s: s.update({"_extra": torch.ones(1).bfloat16()}), "1 unknown: _extra$"),
        (
            lambda s: s.update({"blocks.1.modulation": torch.ones(1, 5, 128).bfloat16()}),
            r"1 of another shape: blocks.1.modulation is \[1, 5, 128\], the network needs \[1, 6, 128\]$",
        ),
        (
            lambda s: s.update({"blocks.1.modulation": torch.ones(1, 6, 128)}),
            "1 of another dtype: blocks.1.modulation is float32, not bfloat16$",
        ),
        (
            lambda s: s.update({"blocks.1.modulation": torch.ones(1, 6, 128, dtype=torch.int8)}),
            "1 of another dtype: blocks.1.modulation is int8, not bfloat16$",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.")],
            r"27 missing: (blocks\.1\.\S+, ){7}blocks\.1\.\S+ and 19 more$",
        ),
    ],
)
def test_strict(change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path) -> None:
    state = tiny_state()
    change(state)
    path = tmp_path / "broken.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"broken\.pth does not fit a student: {said}") as caught:
        assemble([path])
    assert "\n" not in str(caught.value)


def test_a_released_size_is_never_taken_for_a_smaller_one() -> None:
    with torch.device("meta"):
        specs = specs_of(DiT(FLAVOURS["14b"]))
    shortened = {n: s for n, s in specs.items() if not n.startswith(("blocks.39.", "blocks.38."))}
    assert infer_config(shortened).num_layers == 40  # the strict check then lists the 54 that are missing


def test_differences_list_eight_then_a_count() -> None:
    needed = {f"a{i:02}": TensorSpec((1,), torch.float32) for i in range(20)}
    found = {f"b{i}": TensorSpec((1,), torch.float32) for i in range(8)}
    text = str(compare(found, needed))
    assert text.startswith("20 missing: a00, ") and "a07 and 12 more; 8 unknown: b0, " in text and text.endswith("b7")
    assert not compare(needed, needed)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"net": {"a": torch.ones(1)}, "bomb": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb\.pth: not a checkpoint that can be read safely"):
        open_source(tmp_path / "bomb.pth")
    save_dcp({"a": torch.ones(1)}, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"dcp: not a readable distributed checkpoint \(it asks for builtins\.e"):
        open_source(tmp_path / "dcp")


def test_dcp_pieces(tmp_path: Path) -> None:
    """A tensor that several ranks hold in pieces is put together; a lost piece is noticed."""
    from lipstream.checkpoints.dcp import read_dcp

    whole = torch.randn(6, 4)
    save_dcp({"top": whole[:4].clone(), "low": whole[4:].clone()}, tmp_path / "dcp")
    path = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    chunk = metadata.state_dict_metadata["low"].chunks[0]
    chunk.offsets = torch.Size((4, 0))
    entry = metadata.state_dict_metadata.pop("top")
    del metadata.state_dict_metadata["low"]
    entry.size, entry.chunks = torch.Size((6, 4)), [*entry.chunks, chunk]
    metadata.state_dict_metadata["w"] = entry
    index = type(next(iter(metadata.storage_data)))
    infos = {key.fqn: info for key, info in metadata.storage_data.items()}
    metadata.storage_data = {index("w", (0, 0)): infos["top"], index("w", (4, 0)): infos["low"]}
    path.write_bytes(pickle.dumps(metadata))
    assert torch.equal(read_dcp(tmp_path / "dcp")["w"].read(), whole)
    entry.chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="the pieces of w do not fill it"):
        open_source(tmp_path / "dcp")
    infos["top"].relative_path = "../secret"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"w lies in \.\./secret, which is not in the folder"):
        open_source(tmp_path / "dcp")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    torch.save({"a": torch.ones(1), "b": 3}, tmp_path / "mixed.pth")
    torch.save({"strange.weight": torch.ones(1)}, tmp_path / "strange.pth")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "none.pth": "no such file",
        "text.pth": "not a checkpoint",
        "text.safetensors": "not a readable safetensors",
        "tensor.pth": "holds no named tensors",
        "mixed.pth": "1 entries are no tensors: b",
        "strange.pth": "no known network has these tensors: strange.weight; say --kind",
        "empty": "holds no .safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {said}"):
            assemble([tmp_path / name])
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        assemble([])


def test_files_from_before_the_zip_format(tmp_path: Path) -> None:
    state = tiny_state()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(assemble([tmp_path / "old.pth"]).load(), state)


def test_files_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped tensor by tensor they are the same, views and shared storages too; writing leaves the file alone."""
    state = tiny_state()
    square = torch.randn(300, 5)
    odd = {"part": square[100:, 1:4].t(), "again": square, "none": torch.empty(0, 3), "byte": torch.ones(3).byte()}
    torch.save({"model": {"net": state}, "odd": odd, "step": 3}, tmp_path / "big.pth")
    content = load_in_pieces(tmp_path / "big.pth")
    assert content["step"] == 3 and content["odd"].keys() == odd.keys()
    for name, tensor in odd.items():
        assert content["odd"][name].dtype == tensor.dtype and torch.equal(content["odd"][name], tensor)
        assert content["odd"][name].stride() == tensor.stride()
    load = torch.load

    def refuses(path: Path, *, mmap: bool = False, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 9 bytes from file <big.pth>: Cannot allocate memory (12)")
        return load(path, **options)

    monkeypatch.setattr(torch, "load", refuses)
    model = assemble([tmp_path / "big.pth"]).load()
    assert_same(model, state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(assemble([tmp_path / "big.pth"]).load(), state)
    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="can be read safely"):
        assemble([tmp_path / "bomb.pth"])


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_shards(tiny_state(), tmp_path / "wan")
    index = next((tmp_path / "wan").glob("*.json"))
    content = json.loads(index.read_text())

    def rewritten(change: Callable[[dict[str, str]], object]) -> None:
        weight_map = dict(content["weight_map"])
        change(weight_map)
        index.write_text(json.dumps({"weight_map": weight_map}))

    rewritten(lambda m: m.update({"more": next(iter(m.values()))}))
    with pytest.raises(CheckpointError, match="1 tensors are not where it says: more"):
        open_source(tmp_path / "wan")
    rewritten(lambda m: m.pop("head.modulation"))
    with pytest.raises(CheckpointError, match=r"1 tensors are not in it: head\.modulation"):
        open_source(tmp_path / "wan")
    rewritten(lambda m: m.update({"head.modulation": "../other.safetensors"}))
    with pytest.raises(CheckpointError, match="names shards outside of its folder"):
        open_source(tmp_path / "wan")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        open_source(tmp_path / "wan")
    with pytest.raises(CheckpointError, match=r"again: \S+"):
        shard = next((tmp_path / "wan").glob("*.safetensors"))
        assemble([shard, shard])


# --- the Hub-style folder ---


def test_convert_and_load_again(tmp_path: Path) -> None:
    torch.save({"model": {"net": tiny_state()}}, tmp_path / "student.pth")
    stages: list[tuple[str, int, int | None]] = []
    about = convert(
        [tmp_path / "student.pth"],
        tmp_path / "out" / "model",
        max_shard_bytes=200_000,
        report=lambda *stage: stages.append(stage),
    )
    folder = tmp_path / "out" / "model"
    assert read_folder_config(folder) == about
    assert (about.kind, about.dtype, about.licence) == ("student", "bfloat16", "Apache-2.0")
    assert about.provenance.key_format == "official" and about.provenance.merge is None
    (record,) = about.provenance.sources
    assert record.name == "student.pth" and len(record.sha256) == 64
    sums = subprocess.run(["sha256sum", tmp_path / "student.pth"], capture_output=True, text=True, check=True)
    assert sums.stdout.split()[0] == record.sha256
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((folder / INDEX).read_text())
    assert sum(t.nbytes for shard in shards for t in load_file(shard).values()) == index["metadata"]["total_size"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model"}  # no scratch left
    assert stages[0][0] == "hash student.pth" and stages[-1][1] == stages[-1][2] == index["metadata"]["total_size"]
    model = load_pretrained(folder, kind="student")
    assert isinstance(model, DiT) and model.config == TINY
    assert_same(model, tiny_state())
    assert load_pretrained(folder, dtype=torch.float32).state_dict()["head.modulation"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="holds a student, not a teacher"):
        load_pretrained(folder, kind="teacher")


def test_merge_precision_is_recorded(tmp_path: Path) -> None:
    save_file(base_state(), tmp_path / "wan.safetensors")
    torch.save(adapter_state(), tmp_path / "adapter.pt")
    paths = [tmp_path / "wan.safetensors", tmp_path / "adapter.pt"]
    models = {}
    for precision in ("fp32", "bf16"):
        about = convert(paths, tmp_path / precision, precision=precision, lora=LORA)  # type: ignore[arg-type]
        assert json.loads((tmp_path / precision / CONFIG).read_text())["provenance"]["merge"] == {
            "precision": precision, "rank": RANK, "alpha": 2,
        }  # fmt: skip
        assert [record.name for record in about.provenance.sources] == ["wan.safetensors", "adapter.pt"]
        models[precision] = load_pretrained(tmp_path / precision).state_dict()
    name = "blocks.2.ffn.0.weight"
    assert models["fp32"][name].dtype == models["bf16"][name].dtype == torch.bfloat16
    assert not torch.equal(models["fp32"][name], models["bf16"][name])
    with pytest.raises(ValueError, match="none of the sources is an adapter"):
        assemble([tmp_path / "fp32"], precision="fp32")


def test_save_pretrained(tmp_path: Path) -> None:
    model = tiny_model()
    save_pretrained(model, tmp_path / "model", kind="teacher", provenance=Provenance(key_format="x"), licence="MIT")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert read_folder_config(tmp_path / "model").licence == "MIT"
    loaded = load_pretrained(tmp_path / "model")
    assert_same(loaded, dict(model.state_dict()))
    with pytest.raises(ValueError, match="holds a model already"):
        save_pretrained(model, tmp_path / "model", kind="teacher")
    other = tiny_model(seed=3)
    save_pretrained(other, tmp_path / "model", kind="teacher", overwrite=True)
    assert_same(load_pretrained(tmp_path / "model"), dict(other.state_dict()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="no model folder"):
        save_pretrained(model, tmp_path / "mine", kind="teacher", overwrite=True)
    assert (tmp_path / "mine" / "diary.txt").exists()
    model.head.float()
    with pytest.raises(ValueError, match="2 floating dtypes"):
        save_pretrained(model, tmp_path / "mixed", kind="teacher")
    with pytest.raises(ValueError, match="unknown kind"):
        save_pretrained(other, tmp_path / "pupil", kind="pupil")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lipstream.checkpoints.hub.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny_model(), tmp_path / "model", kind="student")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="other"), "was not written by lipstream"),
        (lambda c: c.update(format_version=2), "format 2, this lipstream reads 1"),
        (lambda c: c.pop("kind"), "damaged"),
        (lambda c: c["config"].update(num_layers=3), r"describes no student: audio_blocks \(2, 3\) are outside"),
        (lambda c: c["config"].update(num_layers=5), "27 missing: blocks.4"),
        (lambda c: c["config"].update(ffn_dim=95), "12 of another shape"),
        (lambda c: c.update(dtype="float32"), "131 of another dtype: .* and 123 more$"),
    ],
)
def test_a_folder_that_does_not_fit_its_config(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    save_pretrained(tiny_model(), tmp_path / "model", kind="student")
    path = tmp_path / "model" / CONFIG
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"model.*{said}"):
        load_pretrained(tmp_path / "model")


def test_shards_are_as_full_as_they_may_be() -> None:
    tensors = {name: torch.zeros(size) for name, size in (("a", 5), ("b", 5), ("c", 1), ("d", 30), ("e", 1))}
    source = from_tensors(tensors, "x")
    assert plan_shards(source, 40) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards(source, 10_000) == [["a", "b", "c", "d", "e"]]
    with pytest.raises(ValueError, match="at least 1"):
        plan_shards(source, 0)


class FakeApi:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()
    with pytest.raises(CheckpointError, match="no model folder"):
        push_to_hub(tmp_path, "me/model", api=api)
    assert not api.calls
    save_pretrained(tiny_model(), tmp_path / "model", kind="student")
    assert push_to_hub(tmp_path / "model", "me/model", api=api) == "https://huggingface.co/me/model"
    (create, made), (upload, sent) = api.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made == {"repo_id": "me/model", "private": True, "repo_type": "model", "exist_ok": True}
    assert sent["folder_path"] == str(tmp_path / "model") and sent["repo_id"] == "me/model"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        push_to_hub(tmp_path / "model", "me/model")


def test_push_uses_the_real_signatures() -> None:
    """The fake object above takes anything; the library must take it too."""
    import inspect

    hub = pytest.importorskip("huggingface_hub")
    create = inspect.signature(hub.HfApi.create_repo).parameters
    upload = inspect.signature(hub.HfApi.upload_folder).parameters
    assert {"private", "repo_type", "exist_ok"} <= create.keys()
    assert {"repo_id", "folder_path", "repo_type", "commit_message"} <= upload.keys()


# --- the command ---


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny_state(), tmp_path / "student.pth")
    command = ["convert", str(tmp_path / "student.pth"), "--to", str(tmp_path / "model")]
    assert main([*command, "--kind", "student", "--dtype", "fp32", "--licence", "MIT"]) == EXIT_OK
    said = capsys.readouterr().out
    assert f"{tmp_path / 'model'}: student, float32, " in said and said.endswith("; licence MIT\n")
    loaded = load_pretrained(tmp_path / "model").state_dict()
    assert torch.equal(loaded["head.modulation"], tiny_state()["head.modulation"].float())

    def fails(said: str, *arguments: str) -> None:
        assert main([*command, *arguments]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

    fails("holds a model already")
    fails("unknown kind 'pupil'", "--kind", "pupil", "--force")
    fails("none of the sources is an adapter", "--merge-precision", "fp32", "--force")
    assert main([*command, "--force", "--max-shard-gb", "0.0002"]) == EXIT_OK
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    command[1] = str(tmp_path / "none.pth")
    fails("none.pth: no such file or folder", "--force")
    assert_same(load_pretrained(tmp_path / "model"), tiny_state())  # a failure leaves the old folder


def test_convert_command_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With OmniAvatar's own rank and scale, which the command does not let anyone change."""
    state = adapter_state()
    for name in [name for name in state if ".lora_A." in name]:
        a, b = state[name], state[name.replace("lora_A", "lora_B")]
        state[name] = torch.randn(128, a.shape[1]).bfloat16()
        state[name.replace("lora_A", "lora_B")] = torch.randn(b.shape[0], 128).bfloat16()
    save_shards(base_state(), tmp_path / "wan")
    torch.save(state, tmp_path / "adapter.pt")
    command = ["convert", str(tmp_path / "wan"), str(tmp_path / "adapter.pt"), "--to", str(tmp_path / "teacher")]
    assert main([*command, "--merge-precision", "fp32"]) == EXIT_OK
    assert "teacher, bfloat16" in (said := capsys.readouterr().out) and "adapter merged in fp32" in said
    merged = load_pretrained(tmp_path / "teacher", kind="teacher").state_dict()
    key = "blocks.3.cross_attn.v"
    a, b = (state[f"{key}.lora_{f}.weight"].float() for f in "AB")
    expected = (base_state()[f"{key}.weight"].float() + 0.5 * b @ a).bfloat16()
    assert torch.equal(merged[f"{key}.weight"], expected)
