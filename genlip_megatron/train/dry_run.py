"""Check a run without starting it: settings, tokenizer, data, memory and disk. Takes seconds and needs no GPU.

A launch script calls it before it starts processes on all nodes, and a person before queueing a job.
"""

from __future__ import annotations

import torch

from genlip_megatron.checkpoint.saving import check_free_space
from genlip_megatron.config import RunConfig
from genlip_megatron.config.checks import check
from genlip_megatron.data.loader import open_split
from genlip_megatron.data.presence import absent
from genlip_megatron.data.text import encode_prompt
from genlip_megatron.estimate import GIB, check_fits, memory
from genlip_megatron.model.state_dict import parameter_count
from genlip_megatron.tokenizer import load_tokenizer


def dry_run(config: RunConfig, world_size: int) -> str:
    """Check what ``config`` needs on ``world_size`` processes; returns one line about it.

    Memory is compared with that of this machine's GPU, if it has one. Nothing is written but an empty save folder.

    Raises:
        ValueError: a setting or a file is wrong, the layout needs too much memory, or a checkpoint too much disk.
    """
    check(config, world_size)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocab_size)
    encode_prompt(config.data.prompt, tokenizer, "data.prompt")
    samples = {}
    for split in ("train", "valid"):
        given = config.data.train_data if split == "train" else config.data.valid_data
        if not given or (split == "train" and config.log.eval_only):
            continue
        datasets = open_split(config, split, tokenizer.fingerprint)
        shards = [shard for dataset in datasets for shard in dataset.shards]
        if fault := absent(shards, f"data.{split}_data", remote=True):
            raise ValueError(fault)
        samples[split] = sum(len(dataset) for dataset in datasets)
    if config.train.check_memory and torch.cuda.is_available():
        check_fits(config, world_size, torch.cuda.get_device_properties(0).total_memory, "cuda")
    parameters = parameter_count(config.model)
    if config.checkpoint.save and not config.log.eval_only:
        check_free_space(config.checkpoint.save, config, parameters)
    facts = {f"{split} samples": count for split, count in samples.items()} | {
        "world size": world_size,
        "parameters": parameters,
        "estimated GPU memory of the fullest rank": f"{memory(config, world_size, 'cuda').total / GIB:.1f} GiB",
    }
    return "dry run passed | " + " | ".join(f"{name} {value}" for name, value in facts.items())
