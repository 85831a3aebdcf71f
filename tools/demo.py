#!/usr/bin/env python3
"""The whole pipeline in one command: render scenes, index, train on two processes, stop, resume, caption, export.

    make demo                    (or: .venv/bin/python tools/demo.py)
    tools/demo.py --quick        the same path in a few steps, for CI: shows that it runs, not that it learns

The run's folder must be new, or that of an earlier demo, which is replaced once the data is ready.
The demo ends with the validation loss before and after, the attribute accuracy of captions of 200 held-out scenes, the
same with captions shuffled among the images, and the places of log and checkpoint. It also exports the checkpoint as a
Hugging Face folder and checks that plain transformers, without this project, writes the Megatron model's captions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from genlip_megatron.checkpoint import manifest
from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.convert.hf_folder import foreign
from genlip_megatron.convert.staging import check_target
from genlip_megatron.outputs import first_other

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_ACCURACY, MINIMUM_MARGIN = 0.60, 0.30
MAX_NEW_TOKENS = "48"
# The file that marks a folder as a demo's run, and the other files that may be in it.
MARK, MARK_TEXT = "made_by_demo", "This run was made by tools/demo.py, which replaces it when it runs again.\n"
RUN_FILES = (
    MARK, "config.yaml", "latest_checkpointed_iteration.txt", "run.lock", "quarantine.jsonl", "final_exit",
    "captions.jsonl", "captions-exported.jsonl", "captions-recomputed.jsonl",
    "tensorboard/events.out.tfevents.*", "profile/rank*.gz",
)  # fmt: skip
# Captions an exported folder with transformers only. float32 on the CPU, so that tokens can be compared one by one.
PLAIN_TRANSFORMERS = """
import io, json, sys, tarfile
sys.modules["genlip_megatron"] = None  # from here on importing this project fails
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder, shard, count, max_new_tokens, output = sys.argv[1:]
with tarfile.open(shard) as tar:
    names = [name for name in tar.getnames() if name.endswith(".jpg")][: int(count)]
    images = [Image.open(io.BytesIO(tar.extractfile(name).read())) for name in names]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=images).to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=int(max_new_tokens))[:, inputs["input_ids"].shape[1] :]
end = processor.tokenizer.eos_token_id
with open(output, "w", encoding="utf-8") as file:
    for name, ids, text in zip(names, tokens.tolist(), processor.batch_decode(tokens)):
        ids = ids[: ids.index(end)] if end in ids else ids
        print(json.dumps({"key": name[:-4], "caption": text.strip(), "token_ids": ids}), file=file)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command of the project, show its output as it comes, and return it."""
    words = [str(word) for word in command]
    print("\n$ " + " ".join(words), flush=True)
    process = subprocess.Popen(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except BaseException:
        process.terminate()
        process.communicate()  # discards its last output
        raise
    if process.wait():
        sys.exit(f"demo: {words[0]} {words[1]} ended with status {process.returncode}")
    return "".join(lines)


def from_root(path: Path) -> Path:
    """The user's path, relative to the project's folder if it is inside; every command runs there."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) and path != ROOT else path


def check_run(folder: Path) -> None:
    """Raise ValueError unless a folder is missing, empty, or holds only the run of an earlier demo."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"--output {folder}: it is a file. Name a folder.")
    if not (folder / MARK).is_file() or (folder / MARK).read_text(errors="replace") != MARK_TEXT:
        raise ValueError(f"--output {folder}: it holds files that no demo made. Name another folder, or remove it.")
    steps = [entry for entry in folder.iterdir() if re.fullmatch(r"iter_\d{7,}", entry.name)]
    for step in steps:
        if other := manifest.foreign(step):
            raise ValueError(f"--output {folder}: {step.name} holds files that no demo made ({other}). Move them away.")
    checkpoints = tuple(f"{step.name}/" for step in steps)
    known = lambda path: path.startswith(checkpoints) or any(fnmatch(path, name) for name in RUN_FILES)  # noqa: E731
    if other := first_other(folder, known):
        raise ValueError(f"--output {folder}: it holds files that no demo made ({other}). Move them away.")


def check_places(data: Path, output: Path) -> None:
    """Raise ValueError, before anything is written, if one of the two folders cannot be used."""
    inner, outer = sorted((data.resolve(), output.resolve()), key=lambda path: -len(path.parts))
    if inner.is_relative_to(outer):
        raise ValueError(f"--output {output}: it must not overlap with --data {data}. Name another folder.")
    check_run(output)
    check_target(exported_folder(output), True, foreign)


def begin_run(folder: Path) -> None:
    """Create the folder with its mark, or empty that of an earlier demo. A link to a folder stays a link."""
    check_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The mark is removed last, so an interrupted removal can be continued.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == MARK):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / MARK).write_text(MARK_TEXT)


def validation_losses(output: str) -> list[float]:
    """Every validation loss in a training log, in order."""
    return [float(found) for found in re.findall(r"validation loss[^\d-]*([\d.]+(?:e[-+]?\d+)?)", output)]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


def exported_folder(run: Path) -> Path:
    """Where the Hugging Face folder of a run goes."""
    return run.with_name(f"{run.name}-exported")


def export(checkpoint: Path, shard: str, count: str) -> Path:
    """Export the checkpoint, compare captions by plain transformers and the Megatron model; returns the folder.

    Exits with status 1 if a caption differs.
    """
    folder = exported_folder(checkpoint)
    run(sys.executable, "tools/convert_checkpoint.py", "to-hf", checkpoint, "--output", folder, "--overwrite")
    plain, recomputed = checkpoint / "captions-exported.jsonl", checkpoint / "captions-recomputed.jsonl"
    words = ["--limit", count, "--max-new-tokens", MAX_NEW_TOKENS]
    # Both in float32 on the CPU, even on a machine with a GPU: in bfloat16 two likely tokens may swap.
    run(sys.executable, "tools/caption.py", shard, "--load", checkpoint, "--recompute", "--token-ids", "--output",
        recomputed, "--dtype", "fp32", "--device", "cpu", *words, CUDA_VISIBLE_DEVICES="")  # fmt: skip
    # Isolated, in another folder and with an empty cache, so that only the exported folder can be used.
    with tempfile.TemporaryDirectory() as elsewhere:
        run(sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, ROOT / folder, ROOT / shard, count, MAX_NEW_TOKENS,
            ROOT / plain, cwd=Path(elsewhere), HF_MODULES_CACHE=elsewhere, HF_HUB_OFFLINE="1",
            CUDA_VISIBLE_DEVICES="")  # fmt: skip
    for ours, theirs in zip(read_rows(recomputed), read_rows(plain), strict=True):
        # Tokenizers differ in how they write bytes that form no character.
        names = ["key", "token_ids"] + ([] if "\ufffd" in ours["caption"] else ["caption"])
        if any(ours[name] != theirs[name] for name in names):
            sys.exit(f"demo: the exported model captions {theirs}, the Megatron model {ours}")
    return folder


@command
def main() -> None:
    """Run the demo; exit with status 1 if the model has not learned to see."""
    parser = StrictParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few steps only, to check that everything runs")
    parser.add_argument("--data", type=Path, default=None, help="folder of the rendered scenes (default: demo)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the run (default: runs/demo)")
    options = parser.parse_args()
    begin = time.monotonic()
    data = from_root(options.data or ROOT / ("demo-quick" if options.quick else "demo"))
    output = from_root(options.output or ROOT / ("runs/demo-quick" if options.quick else "runs/demo"))
    check_places(ROOT / data, ROOT / output)

    python = sys.executable
    samples = ["--train-samples", "400", "--val-samples", "64"] if options.quick else []
    run(python, "tools/render_demo_data.py", "--output", data, *samples)
    train = [str(data / shard.name) for shard in sorted((ROOT / data).glob("train-*.tar"))]
    held_out = [str(data / shard.name) for shard in sorted((ROOT / data).glob("val-*.tar"))]
    tokenizer = data / "tokenizer.model"
    run(python, "tools/train_tokenizer.py", *train, "--output", tokenizer)
    run(python, "tools/prepare_data.py", *train, *held_out, "--tokenizer", tokenizer)
    begin_run(ROOT / output)

    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings: list[str | Path] = [
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
    run(python, "tools/caption.py", *held_out, "--load", output, "--limit", count, "--output", captions,
        "--max-new-tokens", MAX_NEW_TOKENS)  # fmt: skip
    rows = read_rows(captions)
    compared = "4" if options.quick else "32"
    exported = export(output, held_out[0], compared)
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
    print(f"Hugging Face folder: {exported} (plain transformers and the Megatron model agree on {compared} captions)")
    print(f"minutes: {(time.monotonic() - begin) / 60:.1f}")
    if options.quick:
        return
    if accuracy["mean"] < MINIMUM_ACCURACY or accuracy["mean"] - control["mean"] < MINIMUM_MARGIN:
        sys.exit(f"demo: accuracy below {MINIMUM_ACCURACY:.0%}, or less than {MINIMUM_MARGIN:.0%} above the control")


if __name__ == "__main__":
    sys.exit(main())
