"""tools/checkpoints.py finds good checkpoints, never deletes the ones to keep, and can rewind a run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from genlip_megatron.checkpoint import paths
from genlip_megatron.checkpoint.lock import acquire
from tests.checkpoint.test_retention import flip, write

TOOL = Path(__file__).parent.parent.parent / "tools" / "checkpoints.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoints_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 to 50; step 40 is damaged, step 20 is the best."""
    for step, loss in ((10, 3.0), (20, 1.5), (30, 2.0), (40, 1.0), (50, None)):
        write(tmp_path, step, loss)
    flip(tmp_path / "iter_0000040" / "weights.distcp")
    return tmp_path


def test_list_prints_one_line_per_checkpoint(tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["list", str(run)]) == 0
    # All sizes are right.
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "50", "40", "30", "20", "10"]
    assert tool.main(["list", str(run), "--full"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["40"].endswith("damaged") and lines["20"].endswith("1.5000  good, best")
    assert lines["50"].endswith("good") and "TP2xDP4" in lines["50"] and "dp_reshardable" in lines["50"]


def test_verify_names_damaged_files(tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {run}/iter_0000040/weights.distcp: damaged, its SHA-256 does not match the manifest's" in out
    assert out.count("good: ") == 4
    assert tool.main(["verify", str(run / "iter_0000030")]) == 0
    assert tool.main(["verify", str(run / "iter_0000040"), "--sizes"]) == 0


def test_prune_counts_only_good_checkpoints(tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["prune", str(run), "--keep-last", "2", "--keep-best", "1"]
    assert tool.main([*flags, "--dry-run"]) == 0
    assert "would delete steps: 10\n" in capsys.readouterr().out and len(paths.steps(run)) == 5
    assert tool.main(flags) == 0
    assert "damaged, ignored" in capsys.readouterr().out and paths.steps(run) == [50, 40, 30, 20]
    assert tool.main([*flags, "--damaged"]) == 0
    assert "deleted damaged steps: 40" in capsys.readouterr().out and paths.steps(run) == [50, 30, 20]


def test_prune_follows_the_runs_rules_by_default(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / "iter_0000040" / "config.yaml").write_text("checkpoint: {keep_last: 1, keep_every: 20}")
    assert tool.main(["prune", str(tmp_path), "--dry-run"]) == 0
    assert "would delete steps: 10, 30\n" in capsys.readouterr().out
    assert tool.main(["prune", str(tmp_path), "--dry-run", "--keep-last", "3"]) == 0
    assert "would delete steps: 10\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["prune"], ["rewind", "--step", "10"]])
def test_nothing_is_changed_while_a_run_is_active(
    words: list[str], tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, _ = acquire(run)
    assert tool.main([words[0], str(run), *words[1:]]) == 2
    assert f"process {os.getpid()} is saving to {run}. End it" in capsys.readouterr().err
    lock.close()
    assert tool.main([words[0], str(run), *words[1:]]) == 0


def test_info_is_yaml(tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["info", str(run)]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["step"], tree["optimizer_state"], tree["files"]) == (50, "dp_reshardable", 1)


def test_rewind_sets_later_checkpoints_aside(tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["rewind", str(run), "--step", "40"]) == 2
    assert "its SHA-256 does not match" in capsys.readouterr().err
    assert tool.main(["rewind", str(run), "--step", "35"]) == 2
    assert "Existing steps: 50, 40, 30, 20, 10" in capsys.readouterr().err
    assert tool.main(["rewind", str(run), "--step", "30"]) == 0
    assert paths.steps(run) == [30, 20, 10] and paths.pointed(run) == 30
    assert sorted(path.name for path in (run / paths.SET_ASIDE).iterdir()) == ["iter_0000040", "iter_0000050"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "/nowhere"], "/nowhere: neither a checkpoint (iter_NNNNNNN) nor a folder with one"),
        (["reshard", "RUN", "--tp", "2"], "--tp, --pp and --vpp need --to dp_reshardable"),
        (["prune", "RUN", "--keep-last", "-1"], "--keep-last -1: must be at least 0"),
        (["reshard", "RUN", "--to", "dp_reshardable"], "holds dp_reshardable optimizer state already"),
    ],
)
def test_user_errors_are_one_line(
    words: list[str], message: str, tool: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(run / "iter_0000030") if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
