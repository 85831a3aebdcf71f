"""Mistakes that a new user makes, and the line that each gets: the table of docs/troubleshooting.md.

    python -m tests.docs.test_mistakes        # writes the table

Every command is run as a user would, in a folder with photos, shards, a tokenizer and a short run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from genlip_megatron.testing import CHECKOUT

PAGE = CHECKOUT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- mistakes:begin -->", "<!-- mistakes:end -->"
TRAIN = "--config mine.yaml --train-iters 2"


class Mistake(NamedTuple):
    what: str
    command: str  # begins with a script, or with a variable of the environment
    status: int = 2


MISTAKES = [
    Mistake("no model is named", "pretrain_genlip.py --train-data shards/train.dataset.json"),
    Mistake("a recipe's name is cut short", "pretrain_genlip.py --config so16"),
    Mistake("the YAML file does not exist", "pretrain_genlip.py --config other.yaml"),
    Mistake("a flag is misspelled", "pretrain_genlip.py --config demo --hiden-size 64"),
    Mistake("a flag has underscores", "pretrain_genlip.py --config demo --micro_batch_size 2"),
    Mistake("a flag is Megatron-LM's", "pretrain_genlip.py --config demo --max-position-embeddings 1024"),
    Mistake("a flag is OpenCLIP's", "pretrain_genlip.py --config demo --resume latest"),
    Mistake("a key of the YAML file is misspelled", "pretrain_genlip.py --config misspelled.yaml"),
    Mistake("a key is given twice", "pretrain_genlip.py --config twice.yaml"),
    Mistake("the YAML file leaves out sizes", "pretrain_genlip.py --config partial.yaml --print-config", 0),
    Mistake(
        "a recipe is cut to a few steps", "pretrain_genlip.py --config so16_stage1 --train-iters 10 --print-config", 0
    ),
    Mistake("warmup is longer than the run", "pretrain_genlip.py --config demo --train-iters 10 --lr-warmup-iters 20"),
    Mistake("a switch gets a value", "pretrain_genlip.py --config demo --fsdp true"),
    Mistake("a number is none", "pretrain_genlip.py --config demo --lr 1e"),
    Mistake("a number is out of range", "pretrain_genlip.py --config demo --global-batch-size 0"),
    Mistake("tensor parallelism does not divide the heads", "pretrain_genlip.py --config demo --tp 3"),
    Mistake("weights without sources", "pretrain_genlip.py --config demo --train-weights 7:3"),
    Mistake("--finetune without --load", "pretrain_genlip.py --config demo --finetune"),
    Mistake("--eval-only without a run", "pretrain_genlip.py --config demo --eval-only"),
    Mistake("checkpoints in a bucket", "pretrain_genlip.py --config demo --save s3://bucket/run"),
    Mistake("more processes in the layout than started", f"pretrain_genlip.py {TRAIN} --tp 2"),
    Mistake("a left-over WORLD_SIZE", f"WORLD_SIZE=2 pretrain_genlip.py {TRAIN}"),
    Mistake("no tokenizer is named", f"pretrain_genlip.py {TRAIN} --tokenizer ''"),
    Mistake("the tokenizer is a folder", f"pretrain_genlip.py {TRAIN} --tokenizer photos"),
    Mistake("the vocabulary is too small", f"pretrain_genlip.py {TRAIN} --vocab-size 64"),
    Mistake("training on photos that are not packed", f"pretrain_genlip.py {TRAIN} --train-data photos"),
    Mistake("training on shards that are not indexed", f"pretrain_genlip.py {TRAIN} --train-data raw"),
    Mistake("another tokenizer than the index's", f"pretrain_genlip.py {TRAIN} --tokenizer other.model"),
    Mistake("another prompt than the index's", f"pretrain_genlip.py {TRAIN} --prompt 'Say it.'"),
    Mistake("packs are too short for an image", f"pretrain_genlip.py {TRAIN} --seq-length 8"),
    Mistake("validation on training images", f"pretrain_genlip.py {TRAIN} --valid-data shards/train-*.tar", 0),
    Mistake("the run's folder is a file", f"pretrain_genlip.py {TRAIN} --save table.csv"),
    Mistake("no checkpoint in the folder", f"pretrain_genlip.py {TRAIN} --load photos"),
    Mistake("resuming with another model", f"pretrain_genlip.py {TRAIN} --save run --num-layers 2"),
    Mistake("the source does not exist", "tools/make_shards.py pictures --output new"),
    Mistake("the table has no caption column", "tools/make_shards.py text.csv --output new"),
    Mistake("the table holds links", "tools/make_shards.py links.csv --output new"),
    Mistake("the images are not where the table says", "tools/make_shards.py lost.csv --output new", 1),
    Mistake("a spreadsheet instead of a table", "tools/make_shards.py table.xlsx --output new"),
    Mistake("packing again into the same folder", "tools/make_shards.py photos --output shards"),
    Mistake("no image goes to validation", "tools/make_shards.py photos --output few --val-fraction 0.0001", 1),
    Mistake("indexing a table", "tools/prepare_data.py table.csv --tokenizer tokenizer.model"),
    Mistake("indexing photos", "tools/prepare_data.py photos --tokenizer tokenizer.model"),
    Mistake("indexing both splits together", "tools/prepare_data.py shards --tokenizer tokenizer.model", 0),
    Mistake(
        "looking at data without an index", "tools/inspect_data.py raw --tokenizer tokenizer.model --output page.html"
    ),
]


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of a mistake in a folder."""
    words = shlex.split(command)
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    words = [sys.executable, str(CHECKOUT / words[0]), *words[1:]]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def prepare(folder: Path) -> None:
    """The user's folder: 24 photos with captions, shards of them, tokenizers, YAML files and tables, and a run."""
    (folder / "photos").mkdir(parents=True)
    colours = ["red", "blue", "green", "black", "white", "yellow", "pink", "grey"]
    for i in range(24):
        Image.new("RGB", (64 + i, 48), colours[i % 8]).save(folder / "photos" / f"{i:02d}.png")
        (folder / "photos" / f"{i:02d}.txt").write_text(f"Picture {i} shows nothing but {colours[i % 8]}.")
    sizes = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 48,
        "text_hidden_size": 32,
    }
    tree = {
        "model": {**sizes, "vocab_size": 512, "rope_sections": [4, 2, 2], "drop_path_rate": 0.0},
        "data": {"train_data": ["shards/train-*.tar"], "tokenizer": "tokenizer.model", "image_size": 64}
        | {"seq_length": 256, "num_workers": 1},
        "train": {"global_batch_size": 1, "lr_warmup_iters": 1},
        "log": {"caption_samples": 0},
    }
    (folder / "mine.yaml").write_text(json.dumps(tree))
    (folder / "partial.yaml").write_text("model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n")
    (folder / "misspelled.yaml").write_text("base: demo\ntrain: {learning_rate: 0.1}\n")
    (folder / "twice.yaml").write_text("base: demo\ntrain: {lr: 0.1, lr: 0.2}\n")
    (folder / "table.csv").write_text("image,caption\nphotos/00.png,A picture.\n")
    (folder / "text.csv").write_text("image,text\nphotos/00.png,A picture.\n")
    (folder / "links.csv").write_text("url,caption\nhttps://example.org/1.jpg,A picture.\n")
    (folder / "lost.csv").write_text("image,caption\nimages/1.jpg,A picture.\nimages/2.jpg,Another.\n")
    (folder / "table.xlsx").write_bytes(b"PK\x03\x04")
    for command in (
        "tools/make_shards.py photos --output shards --val-fraction 0.2 --workers 1",
        "tools/make_shards.py photos --output raw --workers 1",
        "tools/train_tokenizer.py raw/train-00000.tar --output tokenizer.model",
        "tools/train_tokenizer.py raw/train-00000.tar --output other.model --vocab-size 300",
        "tools/prepare_data.py shards/train-00000.tar --tokenizer tokenizer.model --workers 1",
        "tools/prepare_data.py shards/val-00000.tar --tokenizer tokenizer.model --workers 1",
        f"pretrain_genlip.py {TRAIN} --save run",
    ):
        done = run(folder, command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def answer(folder: Path, mistake: Mistake) -> str:
    """The line that a mistake gets; AssertionError if it gets a traceback or another exit status."""
    done = run(folder, mistake.command)
    everything = done.stdout + done.stderr
    shown = f"{mistake.command}\n{everything[-4000:]}"
    assert done.returncode == mistake.status and "Traceback" not in everything, shown
    lines = re.findall(r"^.*?(?:error|WARNING): (.+)$", everything, re.MULTILINE)
    assert len(lines) == 1, f"expected one line, not {lines}: {shown}"
    return lines[0].removesuffix(" (see --help)")


def table(folder: Path) -> str:
    """The table of all mistakes."""
    prepare(folder)
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda mistake: answer(folder, mistake), MISTAKES)
        rows = [
            f"| {mistake.what}: `{mistake.command}` | {line.replace('|', chr(92) + '|')} |"
            for mistake, line in zip(MISTAKES, answers, strict=True)
        ]
    return "\n".join(["| mistake | what it says |", "|---|---|", *rows])


@pytest.mark.slow
def test_every_mistake_gets_one_line_and_the_page_shows_it(tmp_path: Path) -> None:
    text = PAGE.read_text()
    assert len(MISTAKES) >= 40
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    assert table(tmp_path / "user") == shown, f"run python -m tests.docs.test_mistakes to write {PAGE.name} again"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        rows = table(Path(place) / "user")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}")
