"""The launch examples are valid commands, and their headings name the requirements. ``tests/launch`` runs them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args

FOLDER = Path(__file__).parent.parent.parent / "examples"
GPUS = {"single_gpu.sh": 1, "one_node.sh": 8, "multi_node.sh": 64, "slurm_stage1.sbatch": 64, "slurm_stage2.sbatch": 32}
EXAMPLES = [FOLDER / name for name in GPUS]
SOURCED = ("launch.sh", "slurm_run.sh")
SCRIPTS = sorted(path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch") and path.name not in SOURCED)


def entry_flags(example: Path) -> list[str]:
    """The arguments of ``pretrain_genlip.py`` in the example, with variables replaced by names."""
    _, _, launch = example.read_text().partition("pretrain_genlip.py --config")
    flags, _, _ = launch.partition('"$@"')
    words = shlex.split(f"--config {flags}".replace("\\\n", " "))
    return [re.sub(r"\$\w+", "name", word) for word in words]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_command_line_accepts_the_example_on_its_gpus(example: Path) -> None:
    config, _ = parse_args(entry_flags(example))
    check(config, world_size=GPUS[example.name])


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda path: path.name)
def test_the_heading_names_command_gpus_and_hours(example: Path) -> None:
    heading = example.read_text().split("\nset -", 1)[0]
    assert f"examples/{example.name}" in heading
    assert "GPUs:" in heading and "Hours" in heading
    subprocess.run(["bash", "-n", str(example)], check=True)


def test_the_pods_of_kubernetes_run_a_valid_command() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]
    worker = job["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    config, _ = parse_args(container["args"])
    check(config, world_size=worker["replicas"] * int(job["nprocPerNode"]))
    assert worker["replicas"] == job["elasticPolicy"]["minReplicas"] == job["elasticPolicy"]["maxReplicas"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert f"touch {config.stop_file} " in container["lifecycle"]["preStop"]["exec"]["command"][-1]
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"])
    for path in (config.checkpoint.save, config.data.tokenizer, *config.data.train_data, *config.data.valid_data):
        assert path.startswith(mounts)


def test_an_unknown_flag_in_an_example_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([*entry_flags(EXAMPLES[0]), "--overlap-grad-reduction"])
    assert "Did you mean '--overlap-grad-reduce'?" in capsys.readouterr().err
