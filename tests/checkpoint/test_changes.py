"""A resumed run applies every changed setting or refuses it."""

from __future__ import annotations

import contextlib
import io
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.checkpoint.changes import RULES, accepted_changes, data_differences, model_differences
from genlip_megatron.config import SECTIONS, SETTINGS, OnResume, RunConfig, override
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, run_steps, tiny_config
from genlip_megatron.train.resume import rewind, save
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.step import train_step

STEPS = 2
# Allowed values of settings for which ``other_value`` would give an invalid one.
OTHERS = {
    "model.num_attention_heads": 2,
    "model.rope_sections": (1, 2, 1),
    "train.adam_beta1": 0.5,
    "train.adam_beta2": 0.5,
    "train.global_batch_size": 2,
    "log.profile_steps": "1:2",
}
# Free settings that one process on a CPU cannot change, or whose change leaves files behind.
NOT_HERE = {name for name in RULES if name.startswith("parallel.")} | {
    "data.valid_data",
    "data.cache_dir",
    "train.attention_backend",
    "train.transformer_impl",
    "train.fp8",
    "train.fp8_primary_weights",
    "train.fp8_attention",
    "train.first_last_layers_bf16",
    "train.cuda_graph",
    "faults.inject_fault",
    "log.profile",
    "log.prometheus_file",
    "log.tensorboard_dir",
    "log.wandb_project",
}
HINTS = {OnResume.RUN: "(--finetune starts a new run", OnResume.DATA: "(--change-data accepts it)"}
CONTENT = {"data.tokenizer", "data.train_data"}  # compared by file content
# Compared by the data plan; ``test_loading.py`` tests its messages.
BY_THE_PLAN = {"data.seq_length", "data.pack_buffer", "data.shuffle_window", "data.chunk_size", "train.seed"} | {
    "train.global_batch_size"
}


def other_value(name: str, config: RunConfig) -> Any:
    """A value of a setting that differs from the configured one."""
    section, key = name.split(".")
    value, kind = getattr(getattr(config, section), key), typing.get_type_hints(SECTIONS[section])[key]
    if name in OTHERS:
        return OTHERS[name]
    held = value if isinstance(value, tuple) else (value,)
    if choices := [choice for choice in SETTINGS[name].metadata["choices"] if choice not in (*held, "auto", "dali")]:
        return choices[0]
    if kind is bool:
        return not value
    if kind in (int, float):
        return value * 2 or 1
    return "other" if kind is str else (*value, 1 if "int" in str(kind) else "other")


def changed(config: RunConfig, *rules: OnResume) -> dict[str, Any]:
    """Another value for every setting under ``rules`` that the test can change."""
    names = [name for name, rule in RULES.items() if rule in rules and name not in NOT_HERE | CONTENT]
    return {name: other_value(name, config) for name in names}


@pytest.mark.parametrize("name", RULES)
def test_a_change_is_refused_or_printed(name: str) -> None:
    saved = RunConfig()
    config = override(saved, {name: other_value(name, saved)})
    rule = RULES[name]
    models = {same_run: model_differences(saved, config, same_run) for same_run in (True, False)}
    data = data_differences(saved, config, other_data=True)
    hint = "--change-drop-path" if name == "model.drop_path_rate" else HINTS.get(rule, "")
    for lines, rules in (
        (models[True], (OnResume.MODEL, OnResume.RUN)),
        (models[False], (OnResume.MODEL,)),
        (data, (OnResume.DATA,)),
    ):
        expected = rule in rules and name not in {"data.tokenizer"} | BY_THE_PLAN
        assert len(lines) == expected and all(line.startswith(f"{name}: ") and hint in line for line in lines)
    assert [line.split(" was ")[0] for line in accepted_changes(saved, config)] == (
        [name] * (rule is not OnResume.START)
    )


@pytest.fixture(scope="module")
def saved(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of runs by layout, each with a checkpoint of two steps that any layout can load."""
    roots = {}
    for name in ("1", "TP2"):
        world_size, flags = layout(name)
        roots[name] = str(tmp_path_factory.mktemp("saved") / name)
        run_distributed(world_size, run_steps, tiny_config(demo_data, **flags, checkpoint__save=roots[name]), STEPS)
    return roots


def resumed(config: RunConfig) -> tuple[str, list[str]]:
    """(why the run is refused, settings that it prints as different)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            run = set_up(config)
        except ValueError as error:
            return str(error), []
    assert run.iteration == STEPS and run.train_loader is not None
    run.train_loader.close()
    judge = run.verdicts.spike_judge  # it is restored, and its settings are not
    assert (judge._losses.maxlen, judge.threshold) == (config.faults.spike_window, config.faults.spike_threshold)
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("settings that differ")] or [": "]
    return "", line.partition(": ")[2].split("; ")


@pytest.mark.slow
def test_every_free_setting_is_used_and_printed(saved: dict[str, str], demo_data: Path) -> None:
    base = tiny_config(demo_data, checkpoint__load=saved["1"])
    values = changed(base, OnResume.FREE)
    config = override(base, values)
    error, said = run_distributed(1, resumed, config)[0]
    assert not error and {line.split(" was ")[0] for line in said} == values.keys()
    # "auto" is resolved before the comparison, so nothing differs here.
    same = override(base, {"train.precision": "auto"})
    assert run_distributed(1, resumed, same)[0] == ("", [""])


def test_every_data_setting_is_refused(saved: dict[str, str], demo_data: Path) -> None:
    base = tiny_config(demo_data, checkpoint__load=saved["1"])
    # These need other data, or affect only later steps, or only fixed images.
    values = changed(base, OnResume.DATA)
    for name in ("data.train_weights", "data.train_epochs", "data.prompt", "data.fixed_resize"):
        values.pop(name, None)
    error, _ = run_distributed(1, resumed, override(base, values))[0]
    for name in values:
        assert f"{name}: " in error or f"data {name.split('.')[1]}: " in error, name
    for name in ("data.train_weights", "data.train_epochs"):
        error, _ = run_distributed(1, resumed, override(base, {name: "2"}))[0]
        assert f"the weights of the {STEPS} steps already taken were" in error


def test_another_resize_is_refused_only_for_fixed_images() -> None:
    saved = RunConfig()  # fixed images
    config = override(saved, {"data.fixed_resize": "resize-center-crop", "data.prompt": "Describe."})
    assert [line.split(":")[0] for line in data_differences(saved, config, other_data=False)] == [
        "data.prompt",
        "data.fixed_resize",
    ]
    native = {"data.image_mode": "native"}
    assert not data_differences(
        override(saved, native), override(config, native | {"data.prompt": saved.data.prompt}), False
    )


NEW = {
    "train__lr": 3e-4,
    "train__min_lr": 2e-5,
    "train__lr_warmup_iters": 4,
    "train__train_iters": 9,
    "train__weight_decay": 0.3,
    "train__adam_beta1": 0.8,
    "train__adam_beta2": 0.7,
    "train__adam_eps": 1e-6,
    "train__clip_grad": 0.5,
}


def rolled_back(config: RunConfig, steps: int) -> Any:
    """A run that has taken ``steps`` steps and rolled back to its newest checkpoint."""
    run = set_up(config)
    assert run.train_loader is not None
    batches = iter(run.train_loader)
    for _ in range(steps):
        assert train_step(run, batches).updated
    batches.close()
    assert rewind(run) is not None
    return run


def groups_of(config: RunConfig, begun: int) -> tuple[list[dict[str, Any]], list[list[float]], float]:
    """(settings of the optimizer's groups after ``begun`` steps, learning rates of the later steps, clip_grad).

    A new run is moved forward by ``begun`` steps. With ``checkpoint.save`` the run first rolls back to its checkpoint.
    """
    run = rolled_back(config, 1) if config.checkpoint.save else set_up(config)
    run.train_loader.close()
    if not config.checkpoint.save and not config.checkpoint.load:
        run.scheduler.step(increment=begun)
        for group in run.optimizer.param_groups:
            group["step"] = begun
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    rates = []
    for _ in range(begun, config.train.train_iters):
        run.scheduler.step(increment=1)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    return groups, rates, run.optimizer.config.clip_grad


@pytest.mark.parametrize(
    ("saving", "on", "flags"),
    [
        ("1", "1", {}),
        ("1", "DP2", {}),
        ("TP2", "1", {}),
        ("1", "DP2", {"parallel__fsdp": True}),
    ],
)
def test_optimizer_and_schedule_use_the_new_settings(
    saving: str, on: str, flags: dict[str, Any], saved: dict[str, str], demo_data: Path
) -> None:
    world_size, sizes = layout(on)
    fresh, expected = (
        run_distributed(
            world_size, groups_of, tiny_config(demo_data, **sizes, **flags, **NEW, checkpoint__load=root), STEPS
        )
        for root in ("", saved[saving])
    )
    assert fresh == expected
    (group,), _, clip_grad = fresh[0]
    settings = {"betas": (0.8, 0.7), "eps": 1e-6, "weight_decay": 0.3, "max_lr": 3e-4, "min_lr": 2e-5}
    assert group.items() >= settings.items() and clip_grad == 0.5


@pytest.mark.parametrize(("world_size", "fsdp"), [(1, False), (2, True)])
@pytest.mark.slow
def test_a_rollback_keeps_the_new_settings(world_size: int, fsdp: bool, demo_data: Path, tmp_path: Path) -> None:
    flags = {"parallel__fsdp": fsdp, "checkpoint__save": str(tmp_path / "run")}
    run_distributed(world_size, run_steps, tiny_config(demo_data, **flags), STEPS, False)
    back = run_distributed(world_size, groups_of, tiny_config(demo_data, **flags, **NEW), STEPS)
    fresh = run_distributed(world_size, groups_of, tiny_config(demo_data, parallel__fsdp=fsdp, **NEW), STEPS)
    assert back == fresh


def back_to_the_start(config: RunConfig) -> tuple[int, list[Any], float]:
    """(step of the data, optimizer steps, largest moment) after a rollback to before the first update."""
    run = set_up(config)
    run.iteration += 1  # a step without an update
    assert save(run, last=True)
    run.close()
    run = rolled_back(config, 2)
    run.train_loader.close()
    states = run.optimizer.state if config.parallel.fsdp else run.optimizer.chained_optimizers[0].optimizer.state
    largest = max(float(moment.abs().max()) for state in states.values() for moment in state.values())
    return run.train_loader.step, [group.get("step", 0) for group in run.optimizer.param_groups], largest


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_rollback_to_before_the_first_update(fsdp: bool, demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, parallel__fsdp=fsdp, checkpoint__save=str(tmp_path / "run"))
    assert run_distributed(1, back_to_the_start, config)[0] == (0, [0], 0.0)


def first_data_after_a_rollback(config: RunConfig) -> tuple[int, Any]:
    """(step of the data, first samples) after a rollback, or at the start without a checkpoint."""
    run = rolled_back(config, 1) if config.checkpoint.save else set_up(config)
    step = run.train_loader.step
    keys = next(iter(run.train_loader)).keys
    run.train_loader.close()
    return step, keys


def test_a_rollback_to_a_checkpoint_of_other_data_restarts_the_data(
    saved: dict[str, str], demo_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved["1"], tmp_path / "run")
    flags = {"data__seq_length": 256, "data__change_data": True}
    begun, back = (
        run_distributed(1, first_data_after_a_rollback, tiny_config(demo_data, **flags, checkpoint__save=save))[0]
        for save in ("", str(tmp_path / "run"))
    )
    assert begun == back and back[0] == 0
