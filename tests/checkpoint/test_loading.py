"""A run resumes from the newest good checkpoint that fits, or names what does not fit."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pathlib
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from genlip_megatron.checkpoint import loading, manifest, paths, torch_metadata
from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, Manifest
from genlip_megatron.checkpoint.reshard import reshard
from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import build_run, layout, run_steps, tiny_config, weights
from genlip_megatron.train.resume import finish_saves
from genlip_megatron.train.resume import save as save_run
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.validation import evaluate
from tests.checkpoint.test_retention import flip
from tests.fault_table import FaultRow


@pytest.fixture(scope="module")
def saved(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved") / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    for steps in (1, 2):
        run_distributed(1, run_steps, config, steps, False)
    return root


def begun(config: RunConfig) -> Any:
    """(step, step of the data, learning rate) at the start of a run, or the error."""
    try:
        run = set_up(config)
    except ValueError as error:
        return str(error)
    assert run.train_loader is not None
    return run.iteration, run.train_loader.step, run.optimizer.param_groups[0]["lr"]


def begun_saying(config: RunConfig) -> tuple[Any, str]:
    """(result of ``begun``, printed text)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return begun(config), said.getvalue()


def start(config: RunConfig) -> Any:
    return run_distributed(1, begun, config)[0]


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("which", [0, 1])  # two files that different ranks check
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(which: int, root: Path, demo_data: Path) -> None:
    file = sorted((root / "iter_0000002").glob("*.distcp"))[which]
    flip(file)
    config = tiny_config(demo_data, checkpoint__save=str(root), data__num_workers=1)
    (where, said), _ = run_distributed(2, begun_saying, config)
    assert where[:2] == (1, 1)
    assert f"WARNING: skipping damaged checkpoints:\n  {file}: damaged, its SHA-256" in said
    assert "WARNING: resuming from step 1 instead" in said and f"{root}/set_aside/iter_0000002" in said
    assert paths.steps(root) == [1] and paths.pointed(root) == 1
    # Given directly, it is refused.
    error = start(tiny_config(demo_data, checkpoint__load=str(root / "set_aside" / "iter_0000002")))
    assert "no good checkpoint" in error and "its SHA-256 does not match" in error


def test_a_check_of_sizes_misses_a_flipped_bit(root: Path) -> None:
    place = root / "iter_0000002"
    file = next(place.glob("*.distcp"))
    flip(file)
    content = file.read_bytes()
    assert loading.find(place, False, print) is not None
    with pytest.raises(ValueError, match="its SHA-256 does not match"):
        loading.find(place, True, print)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{len(content) - 1} bytes, {len(content)} were written"):
        loading.find(place, False, print)
    # All other files are small and always read.
    file.write_bytes(content)
    common = place / "common.pt"
    common.write_bytes(bytes(common.stat().st_size))
    with pytest.raises(ValueError, match=r"common\.pt: damaged"):
        loading.find(place, False, print)


def test_a_checkpoint_under_another_steps_name_is_skipped(root: Path) -> None:
    said: list[str] = []
    shutil.copytree(root / "iter_0000001", root / "iter_0000003")
    found = loading.find(root, True, said.append)
    assert found is not None and found[1].iteration == 2 and "its manifest.json says step 1, not 3" in said[0]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "removed"),
        (b"", "empty"),
        (b"\xff\x00", "garbage"),
        (b"1000\n", "missing checkpoint"),
        (b"1\n", "older checkpoint"),
    ],
)
def test_the_pointer_is_not_trusted(content: bytes | None, what: str, root: Path, fault_row: FaultRow) -> None:
    pointer, said = root / paths.LATEST, list[str]()
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    found = loading.find(root, True, said.append)
    assert found is not None and found[1].iteration == 2 and "the newest good one is 2" in said[-1]
    fault_row("latest_checkpointed_iteration.txt damaged", what, "newest good checkpoint used")


def test_a_checkpoint_that_was_being_replaced_is_restored(root: Path, demo_data: Path) -> None:
    assert loading.find(root / "nowhere", True, print) is None
    (root / "iter_0000002").rename(root / ".iter_0000002.replaced")
    config = tiny_config(demo_data, checkpoint__save=str(root))
    assert start(config)[:2] == (2, 2)
    # A checkpoint that cannot be moved away stops the run at its start.
    (root / "iter_0000002" / "common.pt").unlink()
    (root / paths.SET_ASIDE).touch()
    error = start(config)
    assert f"checkpoint.save = {root}: " in error and "set_aside" in error and "Move later checkpoints" in error


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            {"model__num_layers": 3, "data__seq_length": 256},
            [
                "model.num_layers: 4 in the checkpoint, 3 here",
                "data seq_length: 512 in the checkpoint, 256 here (--change-data restarts the data",
            ],
        ),
        (
            {"checkpoint__finetune": True, "model__num_layers": 3, "train__precision": "bf16"},
            ["does not fit this run: model.num_layers: 4 in the checkpoint, 3 here"],
        ),
        ({"model__freeze_head": True}, ["model.freeze_head: False in the checkpoint, True here (--finetune starts"]),
        ({"data__max_pixels": 8192}, ["data fingerprint: ", "data.max_pixels: 16384 in the checkpoint, 8192 here"]),
        ({"train__seed": 7}, ["data seed: 1234 in the checkpoint, 7 here"]),
        ({"train__global_batch_size": 2}, ["has 4 lanes, this run 2", "--change-lanes"]),
        (
            {"train__precision": "bf16"},
            ["holds optimizer state of kind dp_reshardable", "precision: 'fp32' in", "tools/checkpoints.py reshard"],
        ),
    ],
)
def test_settings_that_do_not_fit_are_listed(
    flags: dict[str, Any], parts: list[str], saved: Path, demo_data: Path
) -> None:
    error = start(tiny_config(demo_data, checkpoint__load=str(saved), **flags))
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("fused", "advice"),
    [
        (False, "or make it readable by any layout: tools/checkpoints.py reshard"),
        (True, "or load its last save, of kind"),
    ],
)
def test_the_error_of_another_layout_says_what_helps(fused: bool, advice: str) -> None:
    saved = Manifest(2, DP_RESHARDABLE, {"fused_norms": fused, "tensor_model_parallel_size": 2})
    with pytest.raises(ValueError, match=f"size: 2 in the checkpoint, 1 here; .*. Use that layout, {advice}"):
        loading.check_layout(Path("run"), saved, RunConfig())


@pytest.mark.parametrize(
    ("flags", "step_of_data"),
    [
        ({"model__drop_path_rate": 0.1, "checkpoint__change_drop_path": True}, 2),
        ({"data__seq_length": 256, "data__change_data": True}, 0),
        ({"data__change_data": True}, 2),
        ({"train__global_batch_size": 2, "data__change_lanes": True}, 2),
    ],
)
def test_safe_changes_have_a_flag(flags: dict[str, Any], step_of_data: int, saved: Path, demo_data: Path) -> None:
    config = tiny_config(demo_data, checkpoint__load=str(saved), **flags)
    assert start(config) == (2, step_of_data, config.train.lr)


def test_another_tokenizer_is_refused(root: Path, demo_data: Path) -> None:
    place = root / "iter_0000002"
    facts = manifest.read(place)
    (place / manifest.MANIFEST).write_bytes(replace(facts, tokenizer="another").to_bytes())
    for finetune in (False, True):
        config = tiny_config(demo_data, checkpoint__load=str(place), checkpoint__finetune=finetune)
        assert "data.tokenizer: another in the checkpoint" in start(config)


def loss_of(config: RunConfig) -> float:
    """The validation loss of an eval-only run."""
    return evaluate(set_up(config))


@pytest.mark.slow
def test_optimizer_shards_need_their_layout_until_resharded(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    world_size, flags = layout("TP2xPP2")
    run_distributed(world_size, run_steps, tiny_config(demo_data, **flags, checkpoint__save=str(root)), 2, False)
    error = start(tiny_config(demo_data, checkpoint__load=str(root)))
    assert "parallel.tensor_model_parallel_size: 2 in the checkpoint, 1 here" in error
    assert "parallel.pipeline_model_parallel_size: 2 in the checkpoint, 1 here" in error
    assert f"tools/checkpoints.py reshard {root}/iter_0000002" in error
    # Any layout reads its weights.
    evaluated = tiny_config(demo_data, checkpoint__load=str(root), log__eval_only=True)
    assert run_distributed(1, loss_of, evaluated)[0] > 0
    unbroken = run_distributed(world_size, run_steps, tiny_config(demo_data, **flags, checkpoint__load=str(root)), 4)
    fully = tmp_path / "fully"
    place = reshard(root / "iter_0000002", FULLY_RESHARDABLE, fully, build_run)
    assert manifest.read(place).kind == FULLY_RESHARDABLE
    assert (place / "config.yaml").read_text() == (root / "iter_0000002" / "config.yaml").read_text()
    # Another layout adds in another order.
    config = tiny_config(demo_data, checkpoint__load=str(fully))
    assert run_distributed(1, run_steps, config, 4)[0]["losses"] == pytest.approx(unbroken[0]["losses"], rel=1e-5)
    # Resharded back, on the first layout: equal bit for bit.
    shards = reshard(place, DP_RESHARDABLE, tmp_path / "shards", build_run, {"tensor_model_parallel_size": 2})
    back = tiny_config(demo_data, **flags, checkpoint__load=str(shards.parent))
    again = run_distributed(world_size, run_steps, back, 4)
    assert again[0]["losses"] == unbroken[0]["losses"] and again[0]["keys"] == unbroken[0]["keys"]
    for name, weight in weights(unbroken).items():
        assert torch.equal(weights(again)[name], weight), name
    with pytest.raises(ValueError, match="holds fully_reshardable optimizer state already"):
        reshard(place, FULLY_RESHARDABLE, fully, build_run)
    fully.joinpath("file").touch()
    with pytest.raises(ValueError, match="could not be resharded: ValueError: checkpoint.save = .*. Choose a folder"):
        reshard(place, DP_RESHARDABLE, fully / "file", build_run)
    (place / "common.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"common.pt: 0 bytes, \d+ were written"):
        reshard(place, DP_RESHARDABLE, tmp_path / "other", build_run)
    assert not (tmp_path / "other").exists()


def drawn(config: RunConfig, save: bool) -> list[float]:
    """Random numbers of this rank after a save, or after a load."""

    run = set_up(config)
    if save:
        torch.rand(5 + torch.distributed.get_rank())
        with get_cuda_rng_tracker().fork():
            torch.rand(3 + torch.distributed.get_rank())
        run.iteration = 1
        assert save_run(run) and finish_saves(run)
    values = torch.rand(2).tolist()
    with get_cuda_rng_tracker().fork():
        return values + torch.rand(2).tolist()


@pytest.mark.slow
def test_random_states_of_every_rank_are_restored(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    before = run_distributed(2, drawn, config, True)
    assert before[0] != before[1]
    assert run_distributed(2, drawn, config, False) == before
    for kind in (FULLY_RESHARDABLE, DP_RESHARDABLE):  # by one rank
        place = reshard(tmp_path / "run" / "iter_0000001", kind, tmp_path / "run", build_run)
        assert manifest.read(place).kind == kind
        assert run_distributed(2, drawn, config, False) == before


def test_a_restarted_finetuned_run_continues_from_its_own_checkpoints(
    saved: Path, demo_data: Path, tmp_path: Path
) -> None:
    root = str(tmp_path / "stage2")
    flags = {"checkpoint__load": str(saved), "checkpoint__finetune": True, "checkpoint__save": root}
    config = tiny_config(demo_data, **flags)
    assert start(config)[:2] == (0, 0)
    run_distributed(1, run_steps, config, 1)
    assert start(config)[:2] == (1, 1)


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


class _OlderPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do, Debian 12's among them."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, enum.Enum) else NotImplemented


class _Attribute:
    def __reduce__(self) -> Any:
        return getattr, (pathlib.PosixPath, "unlink")


def test_metadata_of_an_older_python_are_read(root: Path) -> None:
    place = root / "iter_0000002"
    expected, file = torch_metadata.read(place), io.BytesIO()
    _OlderPickler(file).dump(expected)
    assert b"getattr" in file.getvalue()
    (place / ".metadata").write_bytes(file.getvalue())
    assert torch_metadata.read(place) == expected
    (place / ".metadata").write_bytes(pickle.dumps(_Attribute()))
    with pytest.raises(ValueError, match=r"it would load <class 'pathlib.PosixPath'>.unlink. Do not use it"):
        torch_metadata.read(place)


def test_loading_runs_no_code(root: Path) -> None:
    place = root / "iter_0000002"
    torch_metadata.read(place)
    (place / ".metadata").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(ValueError, match=r"it would load posix\.system. Do not use it"):
        torch_metadata.read(place)
    torch.save({"objects": _Runs()}, place / "common.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        loading.read_common(place)
