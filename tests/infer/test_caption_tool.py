"""tools/caption.py: inputs, order of rows, equality with and without a cache, and errors."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.caption import main as caption_images
from tools.demo import PLAIN_TRANSFORMERS
from tools.extract_features import main as extract_features
from tools.patch_readout import main as patch_readout

Tool = Callable[..., str]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def caption(tool: Tool, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the tool and return its rows."""

    def run(*words: Any, status: int = 0) -> list[dict[str, Any]]:
        target = tmp_path / "captions.jsonl"
        tool(caption_images, *words, "--output", target, "--max-new-tokens", 12, status=status)
        assert [entry.name for entry in tmp_path.glob("*captions*")] == ["captions.jsonl"]
        return rows(target)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1", "TP2"])
def test_captions_with_a_cache_are_those_of_the_megatron_model(
    layout: str, caption: Any, checkpoints: dict[str, Path], demo_data: Path, photos: Path
) -> None:
    """On checkpoints of any layout, with mixed sizes in a batch, for the default prompt and another."""
    words = [demo_data / "val-00000.tar", photos, "--load", checkpoints[layout], "--batch-size", 9]
    for prompt in ([], ["--prompt", " one"]):
        found = caption(*words, *prompt)
        assert found == caption(*words, *prompt, "--recompute")
        assert len({row["caption"] for row in found if "caption" in row}) > 5


@pytest.mark.slow
def test_an_exported_folder_gives_the_same_captions(
    caption: Any, checkpoints: dict[str, Path], exported: Path, photos: Path
) -> None:
    """Compares token ids, because tokenizers decode bytes that form no character differently."""
    found, expected = (
        [row.get("token_ids") for row in caption(photos, "--load", place, "--token-ids")]
        for place in (exported, checkpoints["1"])
    )
    assert found == expected and sum(ids is not None for ids in found) == 5


@pytest.mark.slow
def test_an_exported_folder_needs_only_transformers(
    caption: Any, exported: Path, demo_data: Path, tmp_path: Path
) -> None:
    """Runs the demo's snippet in a process that cannot import this project."""
    shard = demo_data / "val-00000.tar"
    expected = caption(shard, "--load", exported, "--limit", 4, "--token-ids")
    words = [str(word) for word in (exported, shard, 4, 12, tmp_path / "plain.jsonl")]
    subprocess.run([sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, *words], cwd=tmp_path, check=True)
    found = rows(tmp_path / "plain.jsonl")
    assert [(row["key"], row["token_ids"]) for row in found] == [(row["key"], row["token_ids"]) for row in expected]


def test_rows_keep_the_order_of_the_inputs_for_any_batch_size(
    caption: Any, checkpoints: dict[str, Path], demo_data: Path, photos: Path
) -> None:
    """A folder is sorted by name, at every depth; hidden and other files are skipped; bad images have an error."""
    words = [photos / "more" / "*.jpg", demo_data / "val-00000.tar", photos, "--load", checkpoints["1"]]
    found = caption(*words, "--batch-size", 2)
    assert found == caption(*words, "--batch-size", 50)
    names = [Path(row["path"]).name if "path" in row else row["key"] for row in found]
    keys = [f"val{i:06}" for i in range(24)]
    # A file named twice is captioned once.
    assert names == ["image1.jpg", *keys, "broken.jpg", "image0.png", "image2.webp", "image4.jpg", "short.jpg",
                     "image3.png"]  # fmt: skip
    assert [names[i] for i, row in enumerate(found) if "error" in row] == ["broken.jpg", "short.jpg"]
    assert all("does not decode" in row["error"] for row in found if "error" in row)
    assert all(row["truth"].endswith(".") for row in found if "key" in row)
    assert all(set(row) == {"path", "caption"} for row in found if "path" in row and "error" not in row)


def test_a_limit_and_an_earlier_output(
    caption: Any, checkpoints: dict[str, Path], demo_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "captions.jsonl").write_text('{"path": "old.jpg", "caption": "old"}\n')
    found = caption(demo_data / "val.dataset.json", "--load", checkpoints["1"], "--limit", 3)
    assert [row["key"] for row in found] == ["val000000", "val000001", "val000002"]


def test_sampled_captions_repeat_with_their_seed(caption: Any, checkpoints: dict[str, Path], photos: Path) -> None:
    words = [photos, "--load", checkpoints["1"], "--temperature", 1.0, "--top-p", 0.9, "--top-k", 40]
    assert caption(*words, "--seed", 3) == caption(*words, "--seed", 3) != caption(*words, "--seed", 4)
    greedy = caption(photos, "--load", checkpoints["1"])
    # With top-k 1 sampling is greedy.
    assert caption(photos, "--load", checkpoints["1"], "--temperature", 1.0, "--top-k", 1) == greedy
    assert caption(photos, "--load", checkpoints["1"], "--num-beams", 3) != greedy


def test_only_bad_images_end_with_status_1(
    caption: Any, tool: Tool, checkpoints: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    words = (photos / "broken.jpg", "--load", checkpoints["1"])
    (row,) = caption(*words, status=1)
    assert row["path"] == str(photos / "broken.jpg")
    assert row["error"].startswith("image does not decode: not a JPEG, PNG or WebP file, but text")
    tool(extract_features, *words, "--output", tmp_path / "features", status=1)
    index = json.loads((tmp_path / "features" / "index.json").read_text())
    assert not index["images"] and index["failed"] == [row]


def test_unusual_file_names_and_pipes(
    tool: Tool, caption: Any, checkpoints: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A name that is not UTF-8, and a pipe without a writer."""
    (tmp_path / "odd").mkdir()
    shutil.copy(photos / "image0.png", os.fsencode(tmp_path / "odd") + b"/odd\xe9.png")
    os.mkfifo(tmp_path / "odd" / "pipe.jpg")
    words = [tmp_path / "odd", "--load", checkpoints["1"]]
    named, pipe = caption(*words)
    assert named["path"] == f"{tmp_path}/odd/odd\\xe9.png" and "caption" in named
    assert pipe == {"path": f"{tmp_path}/odd/pipe.jpg", "error": "cannot be read: not a regular file"}
    for other in (extract_features, patch_readout):
        tool(other, *words, "--output", tmp_path / "new", "--overwrite")
        assert "odd\\\\xe9.png" in "".join(file.read_text() for file in (tmp_path / "new").glob("*.json"))
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize("killed", ["caption", "extract_features", "patch_readout"])
def test_sigterm_leaves_nothing_and_leftovers_of_kills_are_removed(
    killed: str,
    caption: Any,
    tool: Tool,
    checkpoints: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM arrives while the first images are computed."""
    from genlip_megatron.infer import caption as captions
    from genlip_megatron.infer import features, readout

    place, name, other = {
        "caption": (captions.Captioner, "tokens", caption_images),
        "extract_features": (features, "features", extract_features),
        "patch_readout": (readout, "readout", patch_readout),
    }[killed]
    words = [photos, "--load", checkpoints["1"], "--limit", 2, "--output", tmp_path / "out"]
    rest = tmp_path / ".out.partial-0123abcd"
    with monkeypatch.context() as patched:
        patched.setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        rest.mkdir()
        (rest / "out").write_text("half")
        tool(other, *words, status=143)
    assert not list(tmp_path.iterdir())
    rest.mkdir()
    tool(other, *words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_no_input_is_replaced(tool: Tool, checkpoints: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(photos, tmp_path / "photos"))
    (tmp_path / "link").symlink_to(copied)
    for words in ([copied], [copied / "more" / "*"], [copied, "--limit", 1]):
        target = tmp_path / "link" / "more" / "image1.jpg"
        line = tool(caption_images, *words, "--load", checkpoints["1"], "--output", target, status=2)
        assert f"--output {target}: it is one of the inputs" in line


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (caption_images, "--load {empty}", "no checkpoint found"),
        (caption_images, "--load {tmp}/missing", "no such folder"),
        (caption_images, "--dtype fp8", "--dtype"),
        (caption_images, "--device abacus", "--device abacus"),
        (caption_images, "--device meta", "--device meta: cannot be used"),
        (caption_images, f"--seed {10**23}", f"--seed {10**23}: must be from 0 to 2**64 - 1"),
        (caption_images, "--top-p 0.9", "Set --temperature above"),
        (caption_images, "--top-p 0", "above 0 and at most 1"),
        (caption_images, "--num-beams 2 --recompute", "not with --recompute"),
        (caption_images, "--batch-size 0", "at least 1"),
        (caption_images, "--prompt ' '", "it is empty"),
        (caption_images, "--prompt <image>", "it is empty"),
        (caption_images, "--prompt 'a <|im_end|>'", "--prompt = 'a <|im_end|>': it spells the control token"),
        (caption_images, "--tokenizer {tmp}/none.json", "no such file"),
        (caption_images, "--tokenizer {other}", "not the tokenizer"),
        (caption_images, "--output {empty}", "Name a file"),
        (caption_images, "--output {tmp}/no/where.jsonl", "Make it first"),
        (caption_images, "--top-q 1", "unknown flag --top-q. Did you mean '--top-"),
        (extract_features, "--image-size 50 --image-mode fixed", "multiples of 16"),
        (extract_features, "--image-size 64", "needs --image-mode fixed; this model's images are native"),
        (extract_features, "--max-patches 0", "must be above 0"),
        (extract_features, "--max-file-size inf", "--max-file-size inf: must be above 0 and finite"),
        (extract_features, "--feature-dtype bf16 --format npy", "NumPy has no such type"),
        (extract_features, "--output {full}", "not empty"),
        (extract_features, "--output {full} --overwrite", "holds something else"),
        (patch_readout, "--top 6", "--top 6: must be from 1 to 5"),
        (patch_readout, "--font {other}", "TrueType"),
    ],
)
def test_a_user_error_is_one_line(
    main: Callable[[list[str]], int],
    words: str,
    message: str,
    tool: Tool,
    checkpoints: dict[str, Path],
    demo_data: Path,
    photos: Path,
    tmp_path: Path,
) -> None:
    places = {name: tmp_path / name for name in ("empty", "full", "other")}
    for name in ("empty", "full"):
        places[name].mkdir()
    (places["full"] / "thesis.txt").write_text("years")
    places["other"] = tmp_path / "other.model"
    # An extra empty field: the same model with another fingerprint.
    places["other"].write_bytes((demo_data / "tokenizer.model").read_bytes() + b"\x1a\x00")
    filled = [word.format(tmp=tmp_path, **places) for word in shlex.split(words)]
    place = ["--load", checkpoints["1"], "--output", tmp_path / "output"]
    assert message in tool(main, photos, *place, *filled, status=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("notes.txt", "not an image"),
        ("*.gif", "no such file"),
        ("{}", "no image"),
        ("s3://bucket/cat.jpg", "only .tar shards are read from a store"),
    ],
)
def test_inputs_without_images(
    name: str, message: str, tool: Tool, checkpoints: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "{}").mkdir()
    place = name if "://" in name else (tmp_path if name == "{}" else photos) / name
    line = tool(caption_images, place, "--load", checkpoints["1"], "--output", tmp_path / "captions.jsonl", status=2)
    assert message in line and name in line
