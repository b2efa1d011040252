"""`lipstream batch`: what a manifest may say, what is refused in one line, and one batch with the real pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from lipstream.batch.manifest import ManifestError, check_inputs, pair_folders, read_manifest
from lipstream.batch.syncing import model_of, sync_jobs
from lipstream.cli.demo import demo_files
from lipstream.cli.main import build_parser, main
from lipstream.media.reader import VideoReader
from lipstream.media.writer import VideoWriter
from lipstream.options import SyncOptions


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    for name in ("talk.mp4", "a b.wav", "ü.wav"):
        (tmp_path / name).write_bytes(b"x")


def manifest(folder: Path, text: str, name: str = "jobs.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    table = "\ufeffvideo, audio,output,crf,length\r\ntalk.mp4,a b.wav,out/1.mp4,,\r\n\r\n"
    table += "talk.mp4,ü.wav,out/2.mkv,18,loop\r\n"
    lines = '\n{"video": "talk.mp4", "audio": "a b.wav", "output": "out/1.mp4"}\n\n'
    lines += '{"video": "talk.mp4", "audio": "ü.wav", "output": "out/2.mkv", "crf": 18, "length": "loop"}\n'
    read = [read_manifest(manifest(tmp_path, table)), read_manifest(manifest(tmp_path, lines, "jobs.jsonl"))]
    assert read[0] == read[1]
    first, second = read[0]
    assert (first.video, first.output, first.line) == (tmp_path / "talk.mp4", tmp_path / "out/1.mp4", 2)
    assert first.options == SyncOptions() and second.options == SyncOptions(crf=18, length="loop")
    assert second.audio == tmp_path / "ü.wav" and second.line == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("talk.mp4,a b.wav,1.mp4,high", "line 3, column crf: 'high' is not a whole number; use one"),
        ("talk.mp4,a b.wav,1.mp4,99", "line 3: crf must lie in 0..51, got 99"),
        ("no.mp4,a b.wav,1.mp4,", "line 3, column video: 'no.mp4' is not a file"),
        ("talk.mp4,,1.mp4,", "line 3, column audio: is empty; name a file"),
        ("talk.mp4,a b.wav,1.webm,", "line 3, column output: '1.webm' has no type that can be written; end it in .mp4"),
        ("talk.mp4,a b.wav,0.mp4,", "line 3, column output: '0.mp4' is the output of line 2 already"),
        ("talk.mp4,a b.wav,talk.mp4,", "line 3, column output"),
        ("talk.mp4,a b.wav,1.mp4,,9", "line 3: has 5 values for 4 columns"),
    ],
)
def test_a_bad_line_is_named_with_column_value_and_fix(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest(tmp_path, f"video,audio,output,crf\ntalk.mp4,a b.wav,0.mp4,\n{row}\n"))
    assert str(error.value).startswith(f"{tmp_path / 'jobs.csv'}: {said}")


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("video,audio\n", "jobs.csv", "line 1: has no column 'output'"),
        ("video,audio,output\n", "jobs.csv", "holds no items"),
        ("video,audio,output,video\n", "jobs.csv", "line 1: column 'video' is named twice"),
        ("\n\nvideo,audio,output,colour\n" + 3 * "talk.mp4,ü.wav,1.mp4,red\n", "jobs.csv", "line 3: unknown column"),
        (f"video,audio,output\n{'x' * 200_000},a,b\n", "jobs.csv", "line 2: cannot be read as CSV (field larger"),
        ('{"video": "talk.mp4", "colour": "red"}\n', "jobs.jsonl", "line 1: unknown column 'colour'"),
        (
            "video,audio,output,colour\ntalk.mp4,ü.wav,1.mp4,red\n",
            "jobs.csv",
            "unknown column 'colour'; known are video,",
        ),
        ('{"video": 1\n', "jobs.jsonl", "line 1: is not JSON"),
        ("[1]\n", "jobs.jsonl", "line 1: is not an object"),
        ('{"video": "talk.mp4", "audio": 7, "output": "1.mp4"}', "jobs.jsonl", "column audio: '7' is not text"),
        ("video", "jobs.txt", "ends in .csv or .jsonl"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path: Path, text: str, name: str, said: str) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest(tmp_path, text, name))
    assert said in str(error.value) and "\n" not in str(error.value) and len(error.value.problems) == 1


def test_all_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"column video: 'x'.*\(and 1 more\)") as error:
        read_manifest(manifest(tmp_path, "video,audio,output\nx,a b.wav,1.mp4\ntalk.mp4,y,2.mp4\n"))
    assert len(error.value.problems) == 2


def test_folders_are_paired_by_stem(tmp_path: Path) -> None:
    videos, audios = tmp_path / "v", tmp_path / "a"
    for path in (videos / "one.mov", videos / "two.webm", videos / "notes.txt", audios / "one.wav", audios / "two.m4a"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    items = pair_folders(videos, audios, tmp_path / "out")
    assert [(i.video.name, i.audio.name, i.output.name) for i in items] == [
        ("one.mov", "one.wav", "one.mov"),
        ("two.webm", "two.m4a", "two.mp4"),
    ]
    assert [i.audio.name for i in pair_folders(videos, audios / "one.wav", tmp_path)] == ["one.wav", "one.wav"]
    with pytest.raises(ManifestError, match=r"v/one\.mov: is an input too; name another folder"):
        pair_folders(videos, audios, videos)
    (audios / "two.m4a").unlink()
    with pytest.raises(ManifestError, match=r"two\.webm: .* has no file named two\.\*"):
        pair_folders(videos, audios, tmp_path)
    (videos / "one.mp4").write_bytes(b"x")
    with pytest.raises(ManifestError, match="has the same stem"):
        pair_folders(videos, audios, tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        pair_folders(tmp_path / "none", audios, tmp_path)


def test_where_it_runs_does_not_change_what_it_makes() -> None:
    assert model_of({"model": "pocket", "seed": 0, "threads": 1}) == model_of(
        {"model": "pocket", "seed": 0, "threads": 4}
    )
    assert model_of({"model": "pocket", "seed": 0}) != model_of({"model": "pocket", "seed": 1})
    for name in ("seed", "speech_lookahead"):  # nothing said: the official seed, the whole file
        assert model_of({"model": "14b", name: 0}) != model_of({"model": "14b", name: None})


def test_parity_has_its_own_seed_unless_one_is_given() -> None:
    seeds = [build_parser().parse_args(["batch", "jobs.csv", *more]).seed for more in ([], ["--seed", "0"])]
    assert seeds == [None, 0]


def test_a_speakers_picture_lies_beside_the_manifest_and_is_an_input(tmp_path: Path) -> None:
    path = manifest(tmp_path, "video,audio,output,speaker\ntalk.mp4,a b.wav,1.mp4,who.png\n")
    with pytest.raises(ManifestError, match=r"line 2, column speaker: 'who\.png' is not a file"):
        read_manifest(path)
    (tmp_path / "who.png").write_bytes(b"x")
    items = read_manifest(path)
    assert items[0].options.speaker == str(tmp_path / "who.png")
    before = sync_jobs(items)[0].fingerprint()
    (tmp_path / "who.png").write_bytes(b"somebody else")
    assert sync_jobs(items)[0].fingerprint() != before


def test_voices_are_said_alike_in_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "who.png").write_bytes(b"x")
    table = "video,audio,output,speaker,voices\n"
    table += 'talk.mp4,a b.wav,1.mp4,left,"right = ü.wav"\n'
    table += 'talk.mp4,a b.wav,2.mp4,left,"0.7,0.4@2=ü.wav; who.png=a b.wav"\n'
    table += "talk.mp4,a b.wav,3.mp4,,\n"
    start = '{"video": "talk.mp4", "audio": "a b.wav", "output": '
    lines = start + '"1.mp4", "speaker": "left", "voices": {"right": "ü.wav"}}\n'
    lines += start + '"2.mp4", "speaker": "left", "voices": ["0.7,0.4@2=ü.wav", "who.png=a b.wav"]}\n'
    lines += start + '"3.mp4", "voices": null}\n'
    csv, json_lines = (
        read_manifest(manifest(tmp_path, text, name)) for text, name in ((table, "jobs.csv"), (lines, "jobs.jsonl"))
    )
    assert csv == json_lines
    here = str(tmp_path)
    assert csv[0].options.voices == (("right", f"{here}/ü.wav"),)
    assert csv[1].options.voices == (("0.7,0.4@2", f"{here}/ü.wav"), (f"{here}/who.png", f"{here}/a b.wav"))
    assert csv[2].options == SyncOptions()
    assert csv[1].inputs == tuple(tmp_path / name for name in ("talk.mp4", "a b.wav", "ü.wav", "a b.wav", "who.png"))


def test_another_voice_is_an_input(tmp_path: Path) -> None:
    path = manifest(tmp_path, "video,audio,output,voices\ntalk.mp4,a b.wav,1.mp4,right=ü.wav\n")
    items = read_manifest(path)
    before = sync_jobs(items)[0].fingerprint()
    (tmp_path / "ü.wav").write_bytes(b"other words")
    assert sync_jobs(items)[0].fingerprint() != before
    (tmp_path / "talk.mp4").write_bytes(b"x")
    (tmp_path / "out.mp4").write_bytes(b"x")
    with pytest.raises(ManifestError, match="is an input too"):
        read_manifest(manifest(tmp_path, "video,audio,output,voices\ntalk.mp4,a b.wav,out.mp4,right=out.mp4\n"))


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("right", "column voices: must be WHO=FILE, e.g. right=b.wav, got 'right'"),
        ("right=none.wav", "column voices: 'none.wav' is not a file"),
        ("who.png=ü.wav", "column voices: 'who.png' is not a file"),
        ("somebody=ü.wav", "unknown speaker 'somebody'"),
        ("left=ü.wav;left=ü.wav", "speaker 'left' has two voices"),
    ],
)
def test_a_bad_voice_is_named(tmp_path: Path, cell: str, said: str) -> None:
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest(tmp_path, f"video,audio,output,voices\ntalk.mp4,a b.wav,1.mp4,{cell}\n"))
    assert f"line 2{',' if said.startswith('column') else ':'} {said}" in str(error.value)


@pytest.mark.parametrize("voices", ["7", '["right"]', '{"right": ""}', '{"right": 3}', '[["right", "ü.wav"]]'])
def test_a_bad_voice_in_json_is_named(tmp_path: Path, voices: str) -> None:
    line = f'{{"video": "talk.mp4", "audio": "a b.wav", "output": "1.mp4", "voices": {voices}}}'
    with pytest.raises(ManifestError, match="line 1, column voices: "):
        read_manifest(manifest(tmp_path, line, "jobs.jsonl"))


def test_the_command_refuses_half_a_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch"]) == 2
    assert "name a MANIFEST" in capsys.readouterr().err
    assert main(["batch", "jobs.csv", "--out", "x"]) == 2
    assert main(["batch", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: cannot be read" in capsys.readouterr().err


def test_a_batch_with_the_real_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two good items and one that is no video. Over 5 s: a worker loads the model."""
    with demo_files() as (clip, _):
        head = [frame for frame, _ in zip(VideoReader(clip), range(12), strict=False)]
        with VideoWriter(tmp_path / "talk.mp4", like=VideoReader(clip), audio=None) as writer:
            for frame in head:
                writer.write(frame)
        with av.open(str(tmp_path / "a b.wav"), "w", format="wav") as container:
            stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
            noise = np.random.default_rng(0).integers(-3000, 3000, (1, 7680)).astype(np.int16)
            sound = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    rows = "talk.mp4,a b.wav,out/good.mp4,\ntalk.mp4,a b.wav,out/small.mp4,40\na b.wav,a b.wav,out/bad.mp4,\n"
    path = manifest(tmp_path, f"video,audio,output,crf\n{rows}")
    assert set(check_inputs(read_manifest(path))) == {read_manifest(path)[2]}
    assert main(["batch", str(path), "--dry-run"]) == 1
    assert "2 to do, 0 finished, 1 would fail" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["batch", str(path), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "2 synced, 0 were finished already, 1 failed" in said.out
    assert "bad.mp4: " in said.err and "has no video stream" in said.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.mp4", "small.mp4"]
    good, small = tmp_path / "out/good.mp4", tmp_path / "out/small.mp4"
    assert len(list(VideoReader(good))) == 12 and small.stat().st_size < good.stat().st_size
    lines = [json.loads(line) for line in (tmp_path / "jobs.report.jsonl").read_text().splitlines()]
    assert [(line["state"], line["result"].get("frames")) for line in lines] == [
        ("done", 12),
        ("done", 12),
        ("failed", None),
    ]
    jobs = sync_jobs(read_manifest(path))
    assert [line["id"] for line in lines] == [job.id for job in jobs]
    # The lines of a manifest may move, and the command may run from elsewhere.
    path.write_text(f"video,audio,output,crf\n\n{rows.replace('a b.wav,a b.wav,out/bad.mp4,', '')}")
    assert main(["batch", str(path), "--dry-run"]) == 0
    assert "0 to do, 2 finished" in capsys.readouterr().out
