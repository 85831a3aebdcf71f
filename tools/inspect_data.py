#!/usr/bin/env python3
"""Show what the model sees of a data set: images, tokens, packs and attention masks, on one HTML page.

    tools/inspect_data.py data/train.dataset.json --tokenizer tokenizer.json --output page.html
    tools/inspect_data.py data/*.tar --tokenizer tokenizer.json --image-mode native --packs 2 --output page.html
    tools/inspect_data.py data/*.tar --tokenizer tokenizer.json --key 000000123 --key 000004567 --output page.html
    tools/inspect_data.py --config so16_stage2 data/*.tar --tokenizer tokenizer.json --output page.html

Everything comes from the training loader, so the page cannot disagree with training. It shows the first samples of the
first packs, or those named by --key; of several samples with one key it shows the first, so give the PATH of one shard
to choose. With --config the packs are the first of that run (its data, batch size and seed; flags take precedence).
Without it the data set is dealt to --packs lanes. The page needs no network and no scripts. It replaces an earlier
page, but no other file.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from inspect_page import Origin, Pack, build_page, escape, heading, is_page, refused_card, sample_card

from genlip_megatron.batch import PATCH_SIZE
from genlip_megatron.config import CheckpointConfig, DataConfig, RunConfig, from_dict, load_yaml, override
from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.loader import Loader
from genlip_megatron.outputs import check_file, write

SETTINGS = {
    "tokenizer": "data.tokenizer",
    "prompt": "data.prompt",
    "image_mode": "data.image_mode",
    "image_size": "data.image_size",
    "fixed_resize": "data.fixed_resize",
    "seq_length": "data.seq_length",
    "seed": "train.seed",
}


def configure(options: argparse.Namespace) -> RunConfig:
    """The loader's configuration. Raises ValueError if a setting is wrong."""
    if options.samples < 1 or options.packs < 1:
        raise ValueError(f"--samples {options.samples}, --packs {options.packs}: must be at least 1")
    config = from_dict(load_yaml(options.config) if options.config else {}, f"--config {options.config}")
    values = {dotted: getattr(options, name) for name, dotted in SETTINGS.items() if getattr(options, name) is not None}
    if options.paths:
        # The recipe's weights belong to its own entries.
        values |= {"data.train_data": options.paths, "data.train_weights": [], "data.train_epochs": ""}
    if not options.config:
        values["train.global_batch_size"] = options.packs
    config = override(config, values)
    check(config)
    if not config.data.train_data:
        raise ValueError("PATH is missing: name shards or manifests, or a --config with data.train_data")
    if not config.data.tokenizer:
        raise ValueError("--tokenizer is missing: name the tokenizer of the index")
    return replace(
        config,
        # No model is built, so vocabulary and DropPath do not matter. Bad samples are shown and do not stop the tool.
        model=replace(config.model, vocab_size=sys.maxsize, drop_path_rate=0.0),
        data=replace(config.data, max_consecutive_failures=0),
        checkpoint=CheckpointConfig(),
    )


def assemble(loader: Loader, samples: list[int], step: int, name: str) -> Pack:
    records = loader.quarantine.records
    records.clear()
    batch = loader.assemble([samples], step).to("cpu")
    reasons = {(bad.shard, bad.key): bad.reason for bad in records}
    origins = []
    for sample in samples:
        dataset, number = loader.samples.source(sample)
        row = dataset.plan_rows(np.array([number]))[0]
        shard, key = loader.samples.shard(sample), loader.samples.key(sample)
        size = int(row["height"]), int(row["width"]), int(row["text_tokens"])
        source = describe_source(loader.samples.record(sample).get("source"))
        origins.append(Origin(key, shard, *size, reasons.get((shard, key), ""), source))
    return Pack(batch, origins, name)


def describe_source(source: object) -> str:
    """The source that make_shards.py keeps with a sample, on one line.

    >>> describe_source({"path": "a.png", "row": 3, "columns": {"license": "CC0"}}), describe_source("web")
    ('path a.png, row 3, license CC0', 'web')
    """
    if not isinstance(source, dict):
        return str(source) if source else ""
    columns = source.get("columns")
    named = {**source, **columns} if isinstance(columns, dict) else source
    return ", ".join(f"{name} {value}" for name, value in named.items() if not isinstance(value, dict))


def first_packs(loader: Loader, packs: int, samples: int) -> list[Pack]:
    """The first packs of training: ``packs`` of them, or more if these hold fewer than ``samples`` samples."""
    taken: list[Pack] = []
    while len(taken) < packs or sum(len(pack.samples) for pack in taken) < samples:
        step, lane = divmod(len(taken), loader.plan.lanes)
        name = f"step {step + 1}, pack {lane + 1} of {loader.plan.lanes}"
        taken.append(assemble(loader, loader.plan.next_pack(lane), step + 1, name))
    return taken


def find_keys(loader: Loader, keys: Sequence[str]) -> tuple[dict[str, int], dict[str, tuple[str, str]]]:
    """({key: sample id}, {key: (shard, reason)} of samples that indexing refused).

    Raises:
        ValueError: no sample has one of the keys.
    """
    found: dict[str, int] = {}
    refused: dict[str, tuple[str, str]] = {}
    wanted, first = set(keys), 0
    for dataset in loader.datasets:
        for number, shard in enumerate(dataset.shards):
            if wanted <= found.keys():
                break
            try:
                index = dataset.index(number)
            except ValueError:  # without an index its samples are bad and have no keys
                first += shard.samples
                continue
            for row, key in enumerate(index.keys):
                if key in wanted:
                    found.setdefault(key, first + row)
            refused |= {key: (shard.path, index.refused[key]) for key in wanted & index.refused.keys() - refused.keys()}
            first += shard.samples
    if missing := [key for key in keys if key not in found and key not in refused]:
        shards = sum(len(dataset.shards) for dataset in loader.datasets)
        raise ValueError(f"--key {missing[0]}: no sample with this key in {shards} shards")
    return found, {key: place for key, place in refused.items() if key not in found}


def resize_rule(data: DataConfig) -> str:
    if data.image_mode == "fixed":
        side = data.image_size // PATCH_SIZE
        return f"fixed, {data.image_size} x {data.image_size} ({data.fixed_resize}): {side * side} patches"
    low, high = data.min_pixels // PATCH_SIZE**2, data.max_pixels // PATCH_SIZE**2
    return f"native aspect, {data.min_pixels:,} to {data.max_pixels:,} pixels: {low} to {high} patches"


def totals(loader: Loader) -> dict[str, str]:
    """Names and values for the heading, as HTML."""
    data, tokenizer = loader.config.data, loader.tokenizer
    shards = sum(len(dataset.shards) for dataset in loader.datasets)
    name, mark = escape(Path(data.tokenizer).name), tokenizer.fingerprint
    return {
        "samples": f"{len(loader):,}",
        "shards": f"{shards:,}" + (f" in {len(loader.datasets)} sources" if len(loader.datasets) > 1 else ""),
        "images": resize_rule(data),
        "pack": f"{data.seq_length:,} tokens",
        "tokenizer": f"<span title='sha256 {mark}'>{name} <code>{mark[:12]}</code></span>, "
        f"{tokenizer.vocab_size:,} tokens",
        "default prompt": f"“{escape(data.prompt)}”",
        "seed": str(loader.config.train.seed),
    }


def inspect(loader: Loader, options: argparse.Namespace) -> tuple[str, str]:
    """(the page, a summary of it). Raises ValueError if a --key does not exist."""
    tokenizer, keys = loader.tokenizer, list(dict.fromkeys(options.key or []))
    found, refused = find_keys(loader, keys)
    packs = first_packs(loader, options.packs, 0 if keys else options.samples)
    if keys:
        single = {key: assemble(loader, [sample], 0, "alone in its pack") for key, sample in found.items()}
        cards = [
            sample_card(single[key], 0, tokenizer) if key in single else refused_card(key, *refused[key])
            for key in keys
        ]
    else:
        single = {}
        places = [(pack, number) for pack in packs for number in range(len(pack.samples))]
        cards = [sample_card(*place, tokenizer) for place in places[: options.samples]]
    shown = packs[: options.packs]
    page = build_page(heading(loader.config.data.train_data, totals(loader)), cards, shown)
    bad = sum(bool(origin.reason) for pack in (*packs, *single.values()) for origin in pack.samples) + len(refused)
    return page, f"samples: {len(cards)}, packs: {len(shown)}, bad samples: {bad}"


@command
def main() -> None:
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="indexed shards or manifests, as for --train-data")
    parser.add_argument("--output", required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--config", default="", metavar="NAME|FILE", help="recipe or YAML file of a run")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer.json or SentencePiece .model")
    parser.add_argument("--prompt", help="prompt of samples that have only a caption, as indexed")
    parser.add_argument("--image-mode", metavar="fixed|native", help="how images are resized (default: fixed)")
    parser.add_argument("--image-size", metavar="PIXELS", help="side of fixed-size images (default: 224)")
    parser.add_argument("--fixed-resize", metavar="squash|resize-center-crop", help="default: squash")
    parser.add_argument("--seq-length", metavar="TOKENS", help="tokens of a pack (default: 16384)")
    parser.add_argument("--seed", help="seed of the data order (default: 1234)")
    parser.add_argument("--samples", type=int, default=8, help="how many samples to show (default: 8)")
    parser.add_argument("--packs", type=int, default=1, help="how many packs to show (default: 1)")
    parser.add_argument("--key", action="append", help="show this sample instead of the first ones; may be repeated")
    options = parser.parse_args()
    logging.getLogger("genlip_megatron.data.quarantine").setLevel(logging.ERROR)  # the page shows bad samples
    config = configure(options)
    check_file(options.output, is_page)
    loader = Loader(config, "train")
    try:
        page, summary = inspect(loader, options)
    finally:
        loader.close()
    write(options.output, page, is_page)
    print(f"{options.output}: {summary}")


if __name__ == "__main__":
    sys.exit(main())
