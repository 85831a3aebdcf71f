"""The demo's scenes: the same bytes for any number of workers, and true captions."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

from genlip_megatron.evaluate import scenes
from genlip_megatron.evaluate.attributes import attribute_accuracy, parse_attributes, shuffled_control

ROOT = Path(__file__).parent.parent.parent


def render(folder: Path, workers: int) -> dict[str, bytes]:
    """The bytes of every rendered shard."""
    options = ["--train-samples", "60", "--val-samples", "20", "--samples-per-shard", "25", "--workers", str(workers)]
    command = [sys.executable, "tools/render_demo_data.py", "--output", str(folder), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {file.name: file.read_bytes() for file in folder.glob("*.tar")}


def test_shards_are_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    one, three = render(tmp_path / "one", 1), render(tmp_path / "three", 3)
    assert sorted(one) == ["train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"]
    assert one == three


def test_captions_name_every_attribute(demo_data: Path) -> None:
    truths = []
    for shard in demo_data.glob("*.tar"):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    record = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                    assert parse_attributes(record["caption"]) == record["attributes"]
                    truths.append(record)
    captions, attributes = [record["caption"] for record in truths], [record["attributes"] for record in truths]
    perfect, control = attribute_accuracy(captions, attributes), shuffled_control(captions, attributes, seed=0)
    assert perfect["mean"] == 1.0
    # The expected score of guessing: the mean over attributes of 1 / number of choices.
    chance = sum(
        1 / n for n in map(len, (scenes.COLOURS, scenes.SHAPES, scenes.COUNTS, scenes.POSITIONS, scenes.WORDS))
    )
    assert abs(control["mean"] - chance / 5) < 0.06


def test_an_ambiguous_caption_names_no_value() -> None:
    parsed = parse_attributes("Two red or blue circles at the top left. The word says moon.")
    assert parsed["colour"] is None and parsed["count"] == "two" and parsed["shape"] == "circle"
