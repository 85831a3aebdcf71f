"""The first hour of a new user: from a table of pictures to captions, by the commands of the quick start.

Every kind of line that these commands print must be in ``docs/quick-start.md``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from genlip_megatron.testing import CHECKOUT
from tests.evaluate.browser import look

# Real pictures with captions, where they lie beside the checkout; else the demo's rendered scenes.
OPENMOJI = CHECKOUT.parent / "shared" / "data" / "openmoji" / "train-00004.tar"
PAGE = (CHECKOUT / "docs" / "quick-start.md").read_text()
PICTURES, STEPS = 64, 12


class User:
    """A folder in which a user runs commands, and what they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, list[str]()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in names}
        self.env = env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}

    def words(self, command: str) -> list[str]:
        """The command line of the page, with this checkout's programs."""
        words = [sys.executable if word == "python" else word for word in command.split()]
        if words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [str(CHECKOUT / word) if re.fullmatch(r"(tools/)?\w+\.py", word) else word for word in words]

    def run(self, command: str, status: int = 0) -> str:
        """What a command prints to standard output."""
        done = subprocess.run(
            self.words(command), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, f"{command}\n{done.stderr}"
        self.printed += done.stdout.splitlines()
        return done.stdout


def kind(line: str) -> str:
    """A line up to its first number, path or value."""
    return re.split(r"[\d:|/'\"]", line.strip())[0].strip()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    """A table with a relative path, a caption and a licence for each picture."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "pictures").mkdir()
    rows = []
    if OPENMOJI.exists():
        with tarfile.open(OPENMOJI) as archive:
            members = archive.getmembers()
            for image, text in zip(members[::2], members[1::2], strict=True):
                content, record = (archive.extractfile(member).read() for member in (image, text))  # type: ignore[union-attr]
                (folder / "pictures" / image.name).write_bytes(content)
                caption = json.loads(record)["caption"] if text.name.endswith(".json") else record.decode()
                rows.append((f"pictures/{image.name}", caption, "CC BY-SA 4.0"))
                if len(rows) == PICTURES:
                    break
    else:
        for i in range(PICTURES):
            Image.radial_gradient("L").rotate(6 * i).resize((64 + i, 64)).save(folder / "pictures" / f"{i}.png")
            rows.append((f"pictures/{i}.png", f"A bright ring of number {i} on a dark ground.", "CC0"))
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "licence"), *rows])
    return User(folder)


@pytest.mark.slow
def test_the_first_hour(user: User) -> None:
    """Split, index, look, train, Ctrl-C, resume on another layout, validate, export, use."""
    folder = user.folder
    user.run("python tools/make_shards.py table.csv --output shards --val-fraction 0.2 --workers 2")
    user.run("python tools/train_tokenizer.py shards/train-00000.tar --output tokenizer.model")
    for split in ("train", "val"):
        user.run(f"python tools/prepare_data.py shards/{split}-*.tar --tokenizer tokenizer.model --workers 2")
    user.run(
        "python tools/inspect_data.py shards/train.dataset.json --tokenizer tokenizer.model --output page.html "
        "--samples 2"
    )
    assert "licence CC" in (folder / "page.html").read_text()

    training = (
        "pretrain_genlip.py --config demo --tokenizer tokenizer.model --save runs/mine --train-data "
        "shards/train.dataset.json --valid-data shards/val.dataset.json --max-pixels 4096 --seq-length 512 "
        f"--train-iters {STEPS} --log-interval 2 --caption-samples 1"
    )
    words = user.words(f"torchrun --nproc-per-node 2 {training} --train-iters 1000")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, cwd=folder, env=user.env, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 300
    while "iteration 4/" not in (text := (folder / "log").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    process.wait(120)
    time.sleep(1)
    text = (folder / "log").read_text()
    assert text.splitlines()[-1].startswith("ended: stop requested by a signal: leaving after step"), text
    stopped = int(re.findall(r"leaving after step (\d+)", text)[0])
    assert f"runs/mine/iter_{stopped:07d}" in text

    STEPS_LEFT = stopped + 3
    resumed = user.run(f"torchrun --nproc-per-node 2 {training} --train-iters {STEPS_LEFT} --tp 2")
    assert f"resumed at step {stopped} from" in resumed and "tensor_model_parallel_size" in resumed
    ours = re.sub(r"^Traceback .*?(?=^ended: )|^[WE]\d{4} .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    user.printed += ours.splitlines()
    loss = re.findall(r"validation loss ([\d.]+)", resumed)[-1]
    only = user.run(f"python {training} --eval-only")
    assert re.findall(r"validation loss ([\d.]+)", only)[-1][:5] == loss[:5]

    user.run("python tools/convert_checkpoint.py to-hf runs/mine --output exported")
    user.run("python tools/caption.py pictures --load exported --limit 2 --output captions.jsonl --max-new-tokens 4")
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 2
    example = (CHECKOUT / "README.md").read_text().split("    from PIL import Image\n")[1].split("\n\n## ")[0]
    first = min((folder / "pictures").iterdir()).name
    (folder / "example.py").write_text(
        re.sub("^    ", "", "    from PIL import Image\n" + example, flags=re.MULTILINE)
        .replace("photo.jpg", f"pictures/{first}")
        .replace("generate(**inputs)", "generate(**inputs, max_new_tokens=4)")
        + "\nprint(features.shape[-1])\n"
    )
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, env=user.env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "128"


@pytest.mark.slow
def test_a_browser_shows_the_page_of_the_data_at_both_widths(user: User, tmp_path: Path) -> None:
    page = user.folder / "page.html"
    if not page.exists():
        pytest.skip("the journey did not run")
    for seen in look({"page": page.read_text()}, tmp_path, widths=(1280, 420)):
        assert seen["images"] and not seen["problems"], seen


@pytest.mark.slow
def test_the_quick_start_shows_every_kind_of_line(user: User) -> None:
    if not user.printed:
        pytest.skip("the journey did not run")
    shown = {kind(line) for line in PAGE.splitlines()}
    missing = sorted({line for line in user.printed if kind(line) and kind(line) not in shown})
    assert not missing, "docs/quick-start.md does not show:\n" + "\n".join(missing)
