#!/usr/bin/env python3
"""Index shards and write the data set's manifest: reads each shard once, decodes every image, counts tokens.

    tools/prepare_data.py 'data/train-{00000..00127}.tar' --tokenizer tokenizer.json
    tools/prepare_data.py data/*.tar --tokenizer tokenizer.json --part 3/64         one of 64 jobs; then once without

It writes SHARD.index.safetensors beside each shard and, for the whole set, NAME.dataset.json (for --train-data),
NAME.dataset.plan, and NAME.quarantine.jsonl with every refused sample and the reason. Shards with an up-to-date index
(same size and time, or same checksum) are skipped, so a killed run continues where it stopped.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import collections
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from genlip_megatron import storage
from genlip_megatron.config import DEFAULT_PROMPT, DataConfig
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.dataset import open_dataset
from genlip_megatron.data.image import IMAGE_SUFFIXES
from genlip_megatron.data.index import ShardIndex
from genlip_megatron.data.manifest import Totals, check_files, manifest_paths, other_shards, write_manifest
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.data.plan import Plan, Source
from genlip_megatron.data.prepare import index_shards
from genlip_megatron.data.tables import table_suffix
from genlip_megatron.data.text import encode_prompt
from genlip_megatron.tokenizer import Tokenizer, load_tokenizer

_ESTIMATE_SAMPLES = 50_000
_LISTED = 20  # shards listed one by one
_MOST_PREFIXES = 8  # more are names without meaning, such as checksums
_SIDE_BINS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 16)
_TOKEN_BINS = (0, 16, 32, 64, 128, 256, 512, 1024, 4096, 1 << 16)


def default_manifest(shards: Sequence[str]) -> str:
    """Default path of the manifest: beside the shards, named after the common prefix of their names.

    >>> default_manifest(["d/train-00000.tar", "d/train-00001.tar"]), default_manifest(["d/a.tar", "d/b.tar"])
    ('d/train.dataset.json', 'd/dataset.json')
    """
    folders = {storage.parent(shard) for shard in shards}
    if len(folders) > 1 and any(storage.is_remote(folder) for folder in folders):
        raise ValueError("the shards are in several folders. Name the manifest to write with --manifest.")
    folder = folders.pop() if len(folders) == 1 else os.path.commonpath(list(folders))
    names = [shard.rsplit("/", 1)[-1].removesuffix(".tar") for shard in shards]
    common = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    stem = re.sub(r"[-_.,0-9]+$", "", "".join(letters[0] for letters in common))
    return storage.join(folder, f"{stem}.dataset.json" if stem else "dataset.json")


def refuse_unpacked(paths: Sequence[str]) -> None:
    """Raise ValueError if a path is a table or an image, by its suffix: it would count as an unreadable shard."""
    for path in paths:
        pack = f"not a shard. Pack it first: python tools/make_shards.py {shlex.quote(path)} --output SHARDS"
        if table_suffix(path):
            raise ValueError(f"PATH {path}: is a table, {pack}")
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            raise ValueError(f"PATH {path}: is an image, not a shard. Pack its folder with tools/make_shards.py first")


def mixed_prefixes(shards: Sequence[str]) -> str:
    """A line about shards whose names differ in more than numbers, as those of several splits do; else "".

    >>> mixed_prefixes(["d/train-00000.tar", "d/train-00001.tar", "d/val-00000.tar"])
    'the shards have 2 prefixes: train (2 shards), val (1)'
    >>> mixed_prefixes(["d/00000.tar", "d/00001.tar", "e/00000.tar"])
    ''
    """
    names = (re.sub(r"[-_.,\d]+$", "", shard.rsplit("/", 1)[-1].removesuffix(".tar")) for shard in shards)
    counts = collections.Counter(re.sub(r"\d+", "#", name) for name in names)
    if not 1 < len(counts) <= _MOST_PREFIXES:
        return ""
    (first, many), *rest = sorted(counts.items())
    others = "".join(f", {name or '(none)'} ({count})" for name, count in rest)
    return f"the shards have {len(counts)} prefixes: {first or '(none)'} ({many} shards){others}"


def show_histogram(title: str, counts: np.ndarray, bins: Sequence[int]) -> None:
    """Print a histogram; element i of ``counts`` is the count of value i."""
    total = max(int(counts.sum()), 1)
    print(f"{title}:")
    for low, high in itertools.pairwise(bins):
        if part := int(counts[low:high].sum()):
            label = f"{low} to {high - 1}" if high < bins[-1] else f"{low} and more"
            print(f"  {label:>14} {part:>12,} {100 * part / total:5.1f}% {'#' * round(40 * part / total)}")


def estimate(manifest: str, tokenizer: Tokenizer, prompt: str, seq_length: int) -> list[str]:
    """Expected packs per epoch and their fill under both resolution rules, from planning some samples."""
    lines = []
    for mode, name in (("fixed", "stage 1, 224x224"), ("native", "stage 2, native aspect")):
        data = DataConfig(image_mode=mode, seq_length=seq_length, prompt=prompt)
        try:
            dataset = open_dataset([manifest], data, tokenizer.fingerprint, "manifest")
        except ValueError as error:
            lines.append(f"  {name}: {error}")
            continue
        plan = Plan([Source(len(dataset), dataset.lengths)], seq_length, 1, seed=0, epochs=1)
        packs: list[list[int]] = []
        planned = 0
        while planned < _ESTIMATE_SAMPLES and (pack := plan.next_pack(0)):
            packs.append(pack)
            planned += len(pack)
        # The last pack of this small plan is partly empty; in training the next epoch fills it.
        packs = packs[:-1] if planned == len(dataset) and len(packs) > 1 else packs
        ids = np.array([sample for pack in packs for sample in pack])
        tokens = int(dataset.lengths(ids).sum())
        lines.append(
            f"  {name}: {round(len(packs) * len(dataset) / len(ids)):,} packs of {seq_length} tokens per epoch, "
            f"fill {100 * tokens / (len(packs) * seq_length):.2f}%, {tokens / len(ids):.0f} tokens per sample"
        )
    return lines


def merge(manifest: str, shards: Sequence[str], quarantine: str, problems: dict[str, str]) -> tuple[Totals, list[str]]:
    """Write the manifest and the list of refused samples; returns (totals, one line per shard that lost samples).

    Args:
        problems: {skipped shard: the reason}.
    """
    lines = [json.dumps({"shard": shard, "key": "(shard)", "reason": reason}) for shard, reason in problems.items()]
    losses: list[tuple[tuple[bool, bool, int], str]] = []  # by severity
    bar = tqdm(total=len(shards), desc="merge", unit="shard", file=sys.stderr)

    def on_shard(index: ShardIndex) -> None:
        bar.update()
        for key, reason in index.refused.items():
            lines.append(json.dumps({"shard": index.shard, "key": key, "reason": reason}))
        if index.refused:
            reasons = collections.Counter(reason.split(":")[0] for reason in index.refused.values())
            # In a damaged archive one entry may stand for thousands of samples.
            damaged = "truncated archive" in reasons or any(key.startswith("(") for key in index.refused)
            named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
            good, bad = len(index.rows), len(index.refused)
            line = f"{index.shard}: {good:,} good samples, {bad:,} refused ({named})"
            losses.append(((not good, damaged, bad), line))

    with bar:
        totals = write_manifest(manifest, shards, on_shard)
    storage.write_bytes(quarantine, "".join(f"{line}\n" for line in lines).encode())
    return totals, [line for _, line in sorted(losses, reverse=True)]


def show_list(lines: Sequence[str], rest: str) -> None:
    """Print the first lines and the number of the others."""
    for line in lines[:_LISTED]:
        print(f"  {line}")
    if len(lines) > _LISTED:
        print(f"  and {len(lines) - _LISTED:,} more{rest}")


def report(totals: Totals) -> None:
    refused = sum(totals.refused.values())
    print(f"{totals.samples:,} good samples, {refused:,} refused")
    for reason, count in totals.refused.most_common():
        print(f"  refused {count:,}: {reason}")
    if totals.ignored:
        print("  ignored " + ", ".join(f"{count:,} {kind}" for kind, count in totals.ignored.most_common()))
    good = max(totals.samples, 1)
    print(f"{totals.text_tokens / good:.1f} text tokens per sample, {totals.loss_tokens / good:.1f} of them with loss")
    for title, column, bins in (
        ("image height in pixels", "height", _SIDE_BINS),
        ("image width in pixels", "width", _SIDE_BINS),
        ("text tokens", "text_tokens", _TOKEN_BINS),
    ):
        show_histogram(title, totals.histograms[column], bins)


def _part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with 0 <= i < n, for example 0/64 to 63/64")
    return int(match[1]), int(match[2])


@command
def main() -> None:
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="PATH", help=".tar files, folders, globs, brace lists; or URLs")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer.json or SentencePiece .model")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="prompt for samples that have only a caption")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: all cores)")
    parser.add_argument(
        "--part", type=_part, metavar="i/n", help="index only shards i, i + n, i + 2n, ...; writes no manifest"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="skip unreadable shards")
    parser.add_argument("--manifest", help="manifest to write (default: beside the shards, with their common name)")
    parser.add_argument("--seq-length", type=int, default=16384, help="tokens per pack, for the estimate in the report")
    options = parser.parse_args()
    if options.workers < 1 or options.seq_length < 1:
        raise ValueError(f"--workers {options.workers}, --seq-length {options.seq_length}: must be at least 1")
    tokenizer = load_tokenizer(options.tokenizer)
    encode_prompt(options.prompt, tokenizer, "--prompt")
    shards = expand_shards(options.shards, "PATH", check_files=False)
    refuse_unpacked(shards)
    manifest = options.manifest or default_manifest(shards)
    if not manifest.endswith(".json"):
        raise ValueError(f"--manifest {manifest}: must end in .json")
    if not options.part:
        check_files(manifest)
    folder = storage.parent(manifest) or "."
    if not storage.is_remote(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ValueError(f"--manifest {manifest}: {folder} is not a writable folder")
    first, step = options.part or (0, 1)
    mine = shards[first::step]
    try:
        unchanged, problems = index_shards(mine, options.tokenizer, options.prompt, options.workers)
    except BrokenProcessPool:
        parser.exit(1, f"{parser.prog}: error: a worker was killed, perhaps out of memory. Run it again with fewer "
                       "--workers to continue.\n")  # fmt: skip
    print(f"{len(mine)} shards ({unchanged} unchanged)")
    show_list(list(problems.values()), "")
    if problems and not options.skip_unreadable:
        parser.exit(1, f"{parser.prog}: error: {len(problems)} shards could not be indexed. Run it again for them, or "
                       "skip them with --skip-unreadable.\n")  # fmt: skip
    named, shards = shards, [shard for shard in shards if shard not in problems]
    if not shards:
        parser.exit(1, f"{parser.prog}: error: none of the {len(named)} shards can be read\n")
    if options.part:
        print(f"part {first} of {step} is done; when all parts are done, run this without --part to write the manifest")
        return
    if others := other_shards(manifest, named):
        print(f"{manifest} stays unchanged: it lists {others} other shards. Name all shards to replace it.")
        return
    _, quarantine = manifest_paths(manifest)
    try:
        totals, losses = merge(manifest, shards, quarantine, problems)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    report(totals)
    if totals.samples == 0:
        show_list(losses, "")
        parser.exit(1, f"{parser.prog}: error: no good sample in {len(shards)} shards; see {quarantine}\n")
    print("expected packs:")
    for line in estimate(manifest, tokenizer, options.prompt, options.seq_length):
        print(line)
    if losses:
        print(f"{len(losses):,} of {len(shards):,} shards lost samples, the worst first:")
        show_list(losses, f"; see {quarantine}")
    for file in (manifest, quarantine):
        print(f"{file} written")
    if mixed := mixed_prefixes(shards):
        print(
            f"WARNING: {mixed}, and {manifest} lists them all. If one is for validation, index each split by its own "
            "glob, such as 'shards/train-*.tar'"
        )


if __name__ == "__main__":
    sys.exit(main())
