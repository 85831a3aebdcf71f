"""Every command replaces only files that it wrote, and refuses to replace others with one line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from genlip_megatron.convert import hf_folder as exported
from genlip_megatron.data.index import index_path
from genlip_megatron.data.manifest import manifest_paths
from genlip_megatron.faults import exits
from genlip_megatron.infer import features
from tests.data.shards import image, write_shard
from tools import demo, export_encoder, patch_readout

ROOT = Path(__file__).parent.parent.parent
THESIS = b"five years of work"
Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a tool in this process; returns (exit status, last line of standard error)."""

    def call(tool: str, *words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, words)])
        capsys.readouterr()
        try:
            status = importlib.import_module(f"tools.{tool}").main() or 0
        except SystemExit as ended:
            status = ended.code
        lines = capsys.readouterr().err.splitlines()
        return status, lines[-1] if lines else ""

    return call


@pytest.fixture
def data(demo_data: Path, tmp_path: Path) -> Path:
    """One shard with its tokenizer."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("val-00000.tar", "tokenizer.model"):
        shutil.copy(demo_data / name, folder)
    return folder


def test_the_tokenizer_replaces_only_tokenizers_that_it_trained(run: Run, data: Path, tmp_path: Path) -> None:
    shard, target = data / "val-00000.tar", tmp_path / "thesis.txt"
    target.write_bytes(THESIS)
    for output in (target, shard):
        before = output.read_bytes()
        status, line = run("train_tokenizer", shard, "--output", output)
        assert status == 2 and f"--output {output}: it exists" in line and output.read_bytes() == before
    for _ in range(2):
        assert run("train_tokenizer", shard, "--output", tmp_path / "new.model")[0] == 0


def test_rendering_replaces_only_rendered_shards(run: Run, tmp_path: Path) -> None:
    words = ["--output", tmp_path, "--train-samples", 2, "--val-samples", 2, "--workers", 1]
    (tmp_path / "thesis.tar").write_bytes(THESIS)
    for _ in range(2):
        assert run("render_demo_data", *words)[0] == 0
    write_shard(tmp_path / "train-00000.tar", {"000000000.jpg": b""})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    status, line = run("render_demo_data", *words)
    assert status == 2 and "train-00000.tar in it was not rendered by this tool" in line
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_packing_removes_only_packed_shards(data: Path, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir(), output.mkdir()
    (photos / "1.jpg").write_bytes(image())
    (photos / "1.txt").write_text("a caption")

    def pack() -> str:
        command = [sys.executable, "tools/make_shards.py", photos, "--output", output, "--workers", "1", "--overwrite"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr

    for name in ("train-00007.tar", "train.skipped.jsonl"):
        shutil.copy(data / "val-00000.tar", output / name)
        assert name in pack() and os.listdir(output) == [name]
        (output / name).unlink()
    for _ in range(2):
        pack()
        assert sorted(os.listdir(output)) == ["train-00000.tar", "train.skipped.jsonl"]


def test_indexing_replaces_only_its_own_files(run: Run, data: Path) -> None:
    manifest = data / "x.dataset.json"
    plan, quarantine = manifest_paths(str(manifest))
    index = index_path(str(data / "val-00000.tar"))
    words = ["--tokenizer", data / "tokenizer.model", "--workers", 1, "--manifest", manifest]
    record = json.dumps({"shard": "s", "key": "k", "reason": "r", "step": 3})  # of a run
    for file, content in ((manifest, b'{"shards": []}'), (plan, THESIS), (quarantine, record.encode())):
        Path(file).write_bytes(content)
        status, line = run("prepare_data", data, *words)
        assert status == 2 and f"{file}: it exists, and this command did not write it" in line
        assert Path(file).read_bytes() == content and not Path(index).exists()
        Path(file).unlink()
    Path(index).write_bytes(THESIS)
    assert run("prepare_data", data, *words)[0] == 1 and Path(index).read_bytes() == THESIS
    Path(index).unlink()
    for words_more in ([], ["--prompt", "Look."]):
        assert run("prepare_data", data, *words, *words_more)[0] == 0


def test_a_killed_merge_can_be_repeated(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between writing the manifest and the planning file."""
    words = [data, "--tokenizer", data / "tokenizer.model", "--workers", 1]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        replace = os.replace

        def killed(source: str, target: str) -> None:
            if str(target).endswith(".plan"):
                raise KeyboardInterrupt
            replace(source, target)

        patched.setattr(os, "replace", killed)
        run("prepare_data", *words)
    assert (data / "val.dataset.json").exists() and not (data / "val.dataset.plan").exists()
    assert run("prepare_data", *words)[0] == 0 and (data / "val.dataset.plan").exists()


def test_a_page_replaces_only_a_page(run: Run, data: Path, tmp_path: Path) -> None:
    assert run("prepare_data", data, "--tokenizer", data / "tokenizer.model", "--workers", 1)[0] == 0
    target = tmp_path / "page.html"
    words = [data, "--tokenizer", data / "tokenizer.model", "--seq-length", 1024, "--samples", 1, "--output", target]
    target.write_bytes(b"<!DOCTYPE html>\n<html>my thesis</html>")
    status, line = run("inspect_data", *words)
    assert status == 2 and "did not write it" in line and b"thesis" in target.read_bytes()
    target.unlink()
    for _ in range(2):
        assert run("inspect_data", *words)[0] == 0


@pytest.mark.parametrize(
    ("tool", "words", "name"),
    [
        ("gpu_check", ["--rehearse"], "thesis.json"),
        ("parity_matrix", ["--layouts", "TP2"], "thesis.md"),
        ("benchmarks.gpu", ["--rehearse"], "thesis.json"),
        ("benchmarks.gpu", ["--rehearse"], "thesis.svg"),
        ("caption", ["{tmp}/x.jpg", "--load", "run"], "thesis.jsonl"),
    ],
)
def test_long_commands_refuse_before_they_begin(
    tool: str, words: list[str], name: str, run: Run, tmp_path: Path
) -> None:
    target = tmp_path / name
    target.write_bytes(THESIS)
    (tmp_path / "x.jpg").touch()
    words = [word.format(tmp=tmp_path) for word in words]
    status, line = run(tool, *words, "--output", tmp_path / name.replace(".svg", ".json"))
    assert status == 2 and f"--output {target}: it exists" in line
    assert target.read_bytes() == THESIS and sorted(os.listdir(tmp_path)) == [name, "x.jpg"]


def a_run(folder: Path) -> Path:
    """A folder with the files of a finished demo."""
    demo.begin_run(folder)
    step = folder / "iter_0000003"
    for file in (step / "__0_0.distcp", step / "manifest.json", folder / "tensorboard" / "events.out.tfevents.1"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    for name in ("run.lock", "captions.jsonl", "latest_checkpointed_iteration.txt"):
        (folder / name).touch()
    return folder


def test_the_demo_replaces_a_demo(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(a_run(tmp_path / "run"))
    demo.begin_run(tmp_path / "link")
    assert os.listdir(tmp_path / "run") == [demo.MARK] and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "foreign", ["thesis.txt", "iter_0000003/thesis.txt", "iter_0000009/thesis.txt", "tensorboard/thesis", "notes/"]
)
def test_the_demo_keeps_a_run_with_other_files_in_it(foreign: str, tmp_path: Path) -> None:
    place = a_run(tmp_path / "run") / foreign
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if foreign.endswith("/") else place.write_bytes(THESIS)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds files that no demo made"):
        demo.begin_run(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_does_not_replace_other_folders_or_links(tmp_path: Path, demo_data: Path) -> None:
    another = a_run(tmp_path / "another")
    (another / demo.MARK).unlink()  # an ordinary run
    linked = a_run(tmp_path / "linked")
    (linked / "iter_0000005").symlink_to(another / "iter_0000003")
    (tmp_path / "file").write_bytes(THESIS)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("another", "linked", "file", "gone"):
        with pytest.raises(ValueError, match=f"--output {tmp_path / name}: "):
            demo.check_places(tmp_path / "data", tmp_path / name)
    for data, output in (("x", "x"), ("x/data", "x"), ("x", "x/run")):
        with pytest.raises(ValueError, match="must not overlap"):
            demo.check_places(tmp_path / data, tmp_path / output)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_checks_before_it_starts_and_prints_the_users_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_bytes(THESIS)
    command = [sys.executable, ROOT / "tools" / "demo.py", "--quick", "--data", "scenes", "--output", "precious"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and f"--output {tmp_path}/precious: it holds files" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and os.listdir(tmp_path) == ["precious"]
    monkeypatch.chdir(tmp_path)
    assert demo.from_root(Path("x")) == tmp_path / "x" and demo.from_root(ROOT / "runs" / "demo") == Path("runs/demo")


@pytest.mark.parametrize(
    ("foreign", "index", "files"),
    [
        (exported.foreign, {"config.json": {"model_type": "genlip"}}, ["model.safetensors", "README.md"]),
        (
            features.foreign,
            {"index.json": {"pool": "none", "failed": [], "images": [{"file": "f-0.npy"}]}},
            ["f-0.npy"],
        ),
        (patch_readout.foreign, {"index.json": {"kind": patch_readout.KIND, "files": ["0.png"]}}, ["0.png"]),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_foreign(
    foreign: Callable[[Path], str], index: dict[str, object], files: list[str], tmp_path: Path
) -> None:
    for name, tree in index.items():
        (tmp_path / name).write_text(json.dumps(tree))
    for name in files:
        (tmp_path / name).touch()
    assert foreign(tmp_path) == ""
    (tmp_path / "features-00099.npy").touch()
    assert foreign(tmp_path) == "features-00099.npy"
    (tmp_path / "features-00099.npy").unlink()
    (tmp_path / files[0]).unlink()
    (tmp_path / files[0]).mkdir()
    (tmp_path / files[0] / "thesis.txt").write_bytes(THESIS)
    assert foreign(tmp_path) == f"{files[0]}/thesis.txt"
    (tmp_path / next(iter(index))).write_text("[]")
    assert foreign(tmp_path).startswith("no ")


def test_an_encoder_replaces_only_encoders_and_their_weights(tmp_path: Path) -> None:
    output, data = tmp_path / "encoder.onnx", tmp_path / "encoder.onnx.data"
    for ours, content in ((output, b"\x08 pixel_values model.vision_embeddings encoder.onnx.data"), (data, b"weights")):
        ours.write_bytes(content)
    assert export_encoder.is_own(output, output) and export_encoder.is_own(data, output)
    for other in (b"", b"\x08 pixel_values embeddings", b"pixel_values vision_embeddings"):
        output.write_bytes(other)
        assert not export_encoder.is_own(data, output)
        with pytest.raises(ValueError, match="--overwrite replaces only files that this tool wrote"):
            export_encoder.write_encoder("folder", output, overwrite=True)
    assert data.read_bytes() == b"weights"


def test_a_foreign_file_named_final_exit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    mark = exits.mark_of(tmp_path, 0)
    for content in ("my notes on exits", "final"):
        mark.write_text(content)
        exits.mark_final(tmp_path, exits.EXIT_USER_ERROR)
        assert exits.final_exit(tmp_path) is None and mark.read_text() == content
    for content in ("", "17 0\n"):
        mark.write_text(content)
        exits.mark_final(tmp_path, exits.EXIT_USER_ERROR)
        assert mark.read_text().split() == ["2", "1", "1"]
    assert [entry.name for entry in tmp_path.iterdir()] == [mark.name]
