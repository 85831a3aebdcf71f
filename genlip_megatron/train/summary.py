"""The head of a run's log: its data, machine and start, in a few lines. The whole configuration is in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state

from genlip_megatron.config import RunConfig
from genlip_megatron.data.loader import Loader
from genlip_megatron.log import log
from genlip_megatron.model.specs import compute_dtype

CONFIG_FILE = "config.yaml"
_MARK = "# The settings of this run's last start, as pretrain_genlip.py resolved them. Do not edit: it is replaced.\n"


def data_lines(config: RunConfig, train: Loader | None, valid: Loader | None) -> list[str]:
    """A line about the training data, and one for each validation set.

    Steps of an epoch assume full packs. They are left out for a mixture, whose sources have epochs of their own.
    """
    lines = []
    sources = train.datasets if train else []
    for i, dataset in enumerate(sources):
        name = f" {config.data.train_data[i]}" if len(sources) > 1 else ""
        tokens, per_step = dataset.tokens(), config.train.global_batch_size * config.data.seq_length
        refused = dataset.refused / (len(dataset) + dataset.refused)
        lines.append(
            f"train data{name}: {len(dataset):,} samples | {len(dataset.shards):,} shards | {tokens:,} tokens | "
            f"{100 * refused:.2g}% refused by the index"
            + ("" if name else f" | {tokens / per_step:,.1f} steps an epoch")
        )
    for of_set in valid.sets if valid else ():
        lines.append(
            f"validation data {of_set.name}: {of_set.samples:,} of {of_set.size:,} samples in {of_set.steps} batches"
        )
    return lines


def machine_line(config: RunConfig) -> str:
    """What the run computes on and in."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return (
        f"device {name} | precision {str(compute_dtype(config)).removeprefix('torch.')} | data-parallel ranks "
        f"{parallel_state.get_data_parallel_world_size()}" + (" | fsdp" if config.parallel.fsdp else "")
    )


def start_line(config: RunConfig) -> str:
    """What a run that does not resume will do."""
    save = config.checkpoint.save
    where = f" into {save}" if save else "; no checkpoints, because checkpoint.save is not set"
    return f"a new run of {config.train.train_iters} steps{where}"


def write_config(config: RunConfig) -> None:
    """Write the configuration to ``config.yaml`` in the run's folder, on rank 0. It replaces no other file."""
    if not config.checkpoint.save or config.log.eval_only or torch.distributed.get_rank():
        return
    file = Path(config.checkpoint.save) / CONFIG_FILE
    try:
        before = file.read_text(errors="replace") if file.exists() else ""
        if not before or before.startswith(_MARK):
            file.write_text(_MARK + config.to_yaml())
            log(f"configuration in {file}")
    except OSError as error:
        log(f"WARNING: {file} could not be written: {error.strerror}")
