"""Files of an earlier commit still load: checkpoints, indexes, manifests, exports and YAML files.

``files_0.1.0.tar.gz`` was written at commit e906170 by the project's own commands:

    render_demo_data.py --train-samples 40 --val-samples 8; train_tokenizer.py --vocab-size 320; prepare_data.py
    pretrain_genlip.py --config run.yaml --save run               # 6 steps; the checkpoint of step 3 is kept
    torchrun --nproc-per-node 2 pretrain_genlip.py --config run.yaml --tp 2 --exit-interval 3 --save run_tp2
    convert_checkpoint.py to-hf run --output export               # of step 6
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genlip_megatron.config import from_dict, load_yaml
from genlip_megatron.testing import CHECKOUT

ARCHIVE = Path(__file__).parent / "files_0.1.0.tar.gz"
# Printed by the earlier commit for steps 4 to 6 and the validation after them.
LOSSES, GRAD_NORMS, VALIDATION_LOSS = [5.7255, 5.6198, 5.5027], [0.494, 0.679, 0.866], 5.4647
ROUNDING = 1.1e-4  # of four printed decimals


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)  # our own archive; Python 3.11.0 to 3.11.3 have no filter
    return folder


def run(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("checkpoint", ["run", "run_tp2"])
@pytest.mark.slow
def test_a_run_continues_from_an_older_checkpoint(older: Path, checkpoint: str, tmp_path: Path) -> None:
    shutil.copytree(older, tmp_path, dirs_exist_ok=True)
    entry = str(CHECKOUT / "pretrain_genlip.py")
    printed = run(tmp_path, entry, "--config", "run.yaml", "--save", checkpoint)
    losses = [float(loss) for loss in re.findall(r"lm loss ([\d.]+)", printed)]
    norms = [float(norm) for norm in re.findall(r"grad norm ([\d.]+)", printed)]
    assert losses == pytest.approx(LOSSES, abs=ROUNDING)
    assert norms == pytest.approx(GRAD_NORMS, abs=1.1e-3)
    assert float(re.findall(r"validation loss ([\d.]+)", printed)[-1]) == pytest.approx(VALIDATION_LOSS, abs=ROUNDING)
    run(tmp_path, str(CHECKOUT / "tools/convert_checkpoint.py"), "to-hf", checkpoint, "--output", "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("export", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)


def test_an_older_index_and_manifest_are_kept(older: Path, tmp_path: Path) -> None:
    shutil.copytree(older, tmp_path, dirs_exist_ok=True)
    sidecar = tmp_path / "data/train-00000.tar.index.safetensors"
    before = load_file(sidecar)
    tool = str(CHECKOUT / "tools/prepare_data.py")
    printed = run(tmp_path, tool, "data/train-*.tar", "--tokenizer", "data/tokenizer.model")
    after = load_file(sidecar)
    assert "1 shards (1 unchanged)" in printed and before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_an_older_export_captions_and_converts(older: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    images = str(older / "data/val-00000.tar")
    tools = CHECKOUT / "tools"
    flags = ("--load", str(older / "export"), "--output", "captions.jsonl", "--max-new-tokens", "2")
    run(tmp_path, str(tools / "caption.py"), images, *flags)
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 8
    run(tmp_path, str(tools / "convert_checkpoint.py"), "to-megatron", str(older / "export"), "--output", "weights")
    run(tmp_path, str(tools / "convert_checkpoint.py"), "to-hf", "weights", "--output", "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (older / "export/model.safetensors").read_bytes()


def test_an_older_yaml_file_gives_the_same_settings(older: Path) -> None:
    config = from_dict(load_yaml(str(older / "run.yaml")), "run.yaml")
    assert (config.train.lr, config.model.hidden_size, config.parallel.recompute) == (0.02, 16, "none")
    assert config.checkpoint.fully_reshardable_every == 0
