"""The launch examples are commands that the entry accepts, and their headings say what a user must know."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from genlip_megatron.arguments import parse_args
from genlip_megatron.checks import check

FOLDER = Path(__file__).parent.parent.parent / "examples"
EXAMPLES = sorted(FOLDER.iterdir())
GPUS = {"single_gpu.sh": 1, "one_node.sh": 8, "multi_node.sh": 64, "slurm_stage1.sbatch": 64, "slurm_stage2.sbatch": 32}


def entry_flags(example: Path) -> list[str]:
    """The words after ``pretrain_genlip.py`` in the example's launch, variables replaced by names."""
    text = example.read_text().replace("\\\n", " ").replace('"${start[@]}"', "--load stage1 --finetune")
    launch = next(line for line in text.splitlines() if "pretrain_genlip.py --config" in line)
    words = shlex.split(launch.split("pretrain_genlip.py", 1)[1].replace('"$@"', "").rstrip("& "))
    return [re.sub(r"\$\w+", "name", word) for word in words]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_entry_accepts_the_example_on_its_gpus(example: Path) -> None:
    config, _ = parse_args(entry_flags(example))
    check(config, world_size=GPUS[example.name])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_heading_says_command_gpus_and_hours(example: Path) -> None:
    heading = example.read_text().split("\nset -", 1)[0]
    assert f"examples/{example.name}" in heading
    assert "GPUs:" in heading and "Hours" in heading
    subprocess.run(["bash", "-n", str(example)], check=True)


def test_unknown_flag_in_an_example_would_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([*entry_flags(EXAMPLES[0]), "--overlap-grad-reduction"])
    assert "Did you mean '--overlap-grad-reduce'?" in capsys.readouterr().err
