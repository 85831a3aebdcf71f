#!/usr/bin/env python3
"""The whole way in one command: render scenes, index, train on two processes, stop, resume, caption, export.

    make demo                    (or: .venv/bin/python tools/demo.py)
    tools/demo.py --quick        the same path in a few steps, for CI: shows that it runs, not that it learns

Ends with validation loss before and after, attribute accuracy of the captions of 200 held-out scenes, the same with
the images shuffled among the captions, and where the log and the checkpoint lie. The checkpoint is exported as a
Hugging Face folder as well: plain transformers, in a process without this project, must caption scenes just as the
Megatron model does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_ACCURACY, MINIMUM_MARGIN = 0.60, 0.30
MAX_NEW_TOKENS = "48"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command of the project, show its output as it comes, and return it."""
    words = [str(word) for word in command]
    print("\n$ " + " ".join(words), flush=True)
    process = subprocess.Popen(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit(f"demo: {words[0]} {words[1]} ended with status {process.returncode}")
    return "".join(lines)


def validation_losses(output: str) -> list[float]:
    """Every validation loss in a training log, in order."""
    return [float(found) for found in re.findall(r"validation loss[^\d-]*([\d.]+(?:e[-+]?\d+)?)", output)]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


def export(checkpoint: Path, shard: str, count: str) -> Path:
    """Export the checkpoint, caption with plain transformers and with the Megatron model, and compare; the folder.

    Exits with status 1 when a caption differs.
    """
    folder = checkpoint.with_name(f"{checkpoint.name}-exported")
    run(sys.executable, "tools/convert_checkpoint.py", "to-hf", checkpoint, "--output", folder, "--overwrite")
    plain, recomputed = checkpoint / "captions-exported.jsonl", checkpoint / "captions-recomputed.jsonl"
    words = ["--limit", count, "--max-new-tokens", MAX_NEW_TOKENS]
    # Both in float32 on the CPU, also where there is a GPU: in bfloat16 two likely tokens may change places.
    run(sys.executable, "tools/caption.py", shard, "--load", checkpoint, "--recompute", "--token-ids", "--output",
        recomputed, "--dtype", "fp32", "--device", "cpu", *words, CUDA_VISIBLE_DEVICES="")  # fmt: skip
    # Isolated, elsewhere and with a new cache of the folder's code, so that nothing but the folder can be used.
    with tempfile.TemporaryDirectory() as elsewhere:
        run(sys.executable, "-I", ROOT / "tools/caption_exported.py", ROOT / folder, ROOT / shard, "--output",
            ROOT / plain, *words, cwd=Path(elsewhere), HF_MODULES_CACHE=elsewhere, HF_HUB_OFFLINE="1",
            CUDA_VISIBLE_DEVICES="")  # fmt: skip
    for ours, theirs in zip(read_rows(recomputed), read_rows(plain), strict=True):
        # Tokenizers write bytes that are no character each in their way.
        names = ["key", "token_ids"] + ([] if "\ufffd" in ours["caption"] else ["caption"])
        if any(ours[name] != theirs[name] for name in names):
            sys.exit(f"demo: the exported model captions {theirs}, the Megatron model {ours}")
    return folder


def main() -> None:
    """Run the demo; exit with status 1 when the model has not learned to see."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that the path runs")
    parser.add_argument("--data", type=Path, default=None, help="folder of the rendered scenes (default: demo)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the run (default: runs/demo)")
    options = parser.parse_args()
    begin = time.monotonic()
    data = options.data or Path("demo-quick" if options.quick else "demo")
    output = options.output or Path("runs/demo-quick" if options.quick else "runs/demo")
    shutil.rmtree(ROOT / output, ignore_errors=True)

    python = sys.executable
    samples = ["--train-samples", "400", "--val-samples", "64"] if options.quick else []
    run(python, "tools/render_demo_data.py", "--output", data, *samples)
    shards = sorted(str(shard.relative_to(ROOT)) for shard in (ROOT / data).glob("*.tar"))
    train = [shard for shard in shards if Path(shard).name.startswith("train")]
    tokenizer = data / "tokenizer.model"
    run(python, "tools/train_tokenizer.py", *train, "--output", tokenizer)
    run(python, "tools/prepare_data.py", *shards, "--tokenizer", tokenizer)

    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [
        "--config", "demo", "--tp", "2", "--save", output, "--load", output, "--tokenizer", tokenizer,
        "--train-data", f"{data}/train-*.tar", "--valid-data", f"{data}/val-*.tar",
    ]  # fmt: skip
    stop = "half"
    if options.quick:
        settings += ["--train-iters", "6", "--save-interval", "3", "--log-interval", "1", "--eval-iters", "1"]
        settings += ["--lr-warmup-iters", "1", "--eval-interval", "3"]
        stop = "3"
    else:
        from genlip_megatron.config import from_dict, load_yaml

        stop = str(from_dict(load_yaml("demo"), "demo").train.train_iters // 2)
    first = run(*torchrun, "pretrain_genlip.py", *settings, "--exit-interval", stop)
    second = run(*torchrun, "pretrain_genlip.py", *settings)
    losses = validation_losses(first) + validation_losses(second)

    from genlip_megatron.evaluate.attributes import attribute_accuracy, parse_attributes, shuffled_control

    captions = output / "captions.jsonl"
    count = "16" if options.quick else "200"
    shards = [shard for shard in shards if Path(shard).name.startswith("val")]
    run(python, "tools/caption.py", *shards, "--load", output, "--limit", count, "--output", captions,
        "--max-new-tokens", MAX_NEW_TOKENS)  # fmt: skip
    rows = read_rows(captions)
    compared = "4" if options.quick else "32"
    exported = export(output, shards[0], compared)
    texts, truths = [row["caption"] for row in rows], [parse_attributes(row["truth"]) for row in rows]
    accuracy, control = attribute_accuracy(texts, truths), shuffled_control(texts, truths, seed=0)

    print("\n" + "=" * 80)
    print(f"validation loss before {losses[0]:.4f}  after {losses[-1]:.4f}")
    for name, result in (("attribute accuracy", accuracy), ("shuffled control", control)):
        parts = "  ".join(f"{key} {100 * value:.1f}%" for key, value in result.items() if key != "mean")
        print(f"{name} {100 * result['mean']:.1f}%  ({parts})")
    for row in rows[:3]:
        print(f"\n  caption: {row['caption']}\n  truth:   {row['truth']}")
    print(f"\nTensorBoard log: {output}/tensorboard\ncheckpoint: {output}")
    print(
        f"Hugging Face folder: {exported}, whose captions by plain transformers equal the Megatron model's ({compared})"
    )
    print(f"minutes: {(time.monotonic() - begin) / 60:.1f}")
    if options.quick:
        return
    if accuracy["mean"] < MINIMUM_ACCURACY or accuracy["mean"] - control["mean"] < MINIMUM_MARGIN:
        sys.exit(f"demo: accuracy below {MINIMUM_ACCURACY:.0%}, or less than {MINIMUM_MARGIN:.0%} above the control")


if __name__ == "__main__":
    main()
