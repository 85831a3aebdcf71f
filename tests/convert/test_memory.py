"""A conversion holds one parameter in memory, for any size of model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.safetensors_file import Planned, SafetensorsWriter
from genlip_megatron.model.state_dict import canonical_shapes

# The embedding and the head are 156 MB each in float32, seven times as much as all layers together.
MODEL = ModelConfig(num_layers=8, hidden_size=256, num_attention_heads=4, ffn_hidden_size=512, text_hidden_size=256)
EMBEDDING = 151936 * 256 * 4
ALLOWANCE = 24e6  # interpreter and file buffers

CONVERT = """
import sys, torch
from pathlib import Path
from tests.convert.test_memory import MODEL
from tests.convert.test_round_trips import to_hf, to_megatron
from tests.convert.weights import VARIANTS, random_weights, run_of, write_released

torch.set_num_threads(1)
work, dtype = Path(sys.argv[2]), {"keep": None, "bf16": torch.bfloat16}[sys.argv[3]]
small = run_of(VARIANTS["l16"])
first = work / f"{sys.argv[1]} first"
write_released(first / "small", random_weights(small.model))
to_hf(to_megatron(first / "small", first / "run", small, dtype), first / "back", dtype)  # imports everything
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "to-megatron":
    to_megatron(work / "big", work / "big run", run_of(MODEL), dtype)
else:
    to_hf(work / "big run", work / "big back", dtype)
"""


def anonymous(process: int) -> int:
    """Bytes of a process's memory that are not mapped files."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak(work: Path, direction: str, dtype: str) -> float:
    """Peak bytes of a conversion in a new process, beyond those of the process before it."""
    command = [sys.executable, "-c", CONVERT, direction, str(work), dtype]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        while process.stdout.readline().strip() not in ("ready", ""):
            pass
        before = most = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    return most - before


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["keep", pytest.param("bf16", marks=pytest.mark.long)])
def test_the_largest_parameter_bounds_the_memory(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    tensors = {name: Planned(shape, torch.float32) for name, shape in canonical_shapes(MODEL).items()}
    SafetensorsWriter(tmp_path / "big", tensors, 10**10)  # sparse zeros, which take no disk space
    for direction in ("to-megatron", "to-hf"):
        taken = peak(tmp_path, direction, dtype)
        print(f"{direction} {dtype}: {taken / 1e6:.0f} MB of memory, {taken / EMBEDDING:.2f} times the largest tensor")
        assert taken < 1.2 * EMBEDDING + ALLOWANCE
