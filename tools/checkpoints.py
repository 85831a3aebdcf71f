#!/usr/bin/env python3
"""Manage the checkpoints of a run: list, verify, prune, describe, convert the optimizer state, rewind.

    python tools/checkpoints.py list runs/so16
    python tools/checkpoints.py verify runs/so16                     (or one checkpoint: runs/so16/iter_0002000)
    python tools/checkpoints.py prune runs/so16 --keep-last 3 --keep-every 10000 --dry-run
    python tools/checkpoints.py info runs/so16/iter_0002000
    python tools/checkpoints.py reshard runs/so16/iter_0002000       (then any layout can resume from it)
    python tools/checkpoints.py rewind runs/so16 --step 2000         (the run resumes from there)

Every command runs on a CPU. ``verify`` ends with status 1 if a checkpoint is damaged, and names its damaged files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.lock import acquire
from genlip_megatron.checkpoint.manifest import CONFIG
from genlip_megatron.checkpoint.paths import NotSaved
from genlip_megatron.checkpoint.retention import Keeper, deletable, kept
from genlip_megatron.command import command
from genlip_megatron.config import CheckpointConfig, RunConfig
from genlip_megatron.config.command_line import StrictParser

_KINDS = ("fully_reshardable", "dp_reshardable")
_ROW = "{:>9}  {:19}  {:>8}  {:17}  {:12}  {:>9}  {}"


def build_parser() -> StrictParser:
    """The command line, with one sub-command per action."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="checkpoints.py", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function: Callable[[argparse.Namespace], int], text: str, where: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__.removesuffix("_checkpoints"), help=text, description=text)
        added.set_defaults(function=function)
        added.add_argument("path", type=Path, help=where)
        return added

    run, one = "folder of checkpoints", "a checkpoint, iter_NNNNNNN"
    added = add(list_checkpoints, "print one line per checkpoint", run)
    added.add_argument("--full", action="store_true", help="read every file instead of comparing sizes")
    added = add(verify, "read every file and compare checksums", f"{run}, or {one}")
    added.add_argument("--sizes", action="store_true", help="compare only sizes")
    added = add(prune, "delete good checkpoints, by default by the run's own rules", run)
    added.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N; 0: all")
    added.add_argument("--keep-every", type=int, metavar="N", help="keep every Nth step; 0: none")
    added.add_argument("--keep-best", type=int, metavar="N", help="keep the N lowest validation losses")
    added.add_argument("--damaged", action="store_true", help="also delete damaged ones older than the newest good one")
    added.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    add(info, "describe a checkpoint", f"{one}, or {run} for its newest")
    added = add(reshard, "write a checkpoint with the other kind of optimizer state", one)
    added.add_argument("--to", choices=_KINDS, default=_KINDS[0], help="kind of optimizer state")
    added.add_argument("--output", type=Path, help="folder of checkpoints to write to (default: replace it)")
    for flag, size in (("--tp", "tensor"), ("--pp", "pipeline"), ("--vpp", "virtual_pipeline")):
        text = f"{size.replace('_', ' ')} parallel size of the run that will read dp_reshardable state"
        added.add_argument(flag, type=int, dest=f"{size}_model_parallel_size", metavar="SIZE", help=text)
    added = add(rewind, "set later checkpoints aside, so that the run resumes from a step", run)
    added.add_argument("--step", type=int, required=True, help="step to resume from")
    return parser


def _places(path: Path) -> list[Path]:
    """The checkpoint at ``path``, or those in it, newest first. Raises ValueError if there is none."""
    if paths.step_of(path) is not None and path.is_dir():
        return [path]
    if found := [paths.step_folder(path, step) for step in paths.steps(path)]:
        return found
    raise ValueError(f"{path}: neither a checkpoint (iter_NNNNNNN) nor a folder with one")


def _look(place: Path, checksums: bool) -> tuple[manifest.Manifest | None, list[str]]:
    """(manifest, or None if it cannot be read; list of problems)."""
    try:
        facts = manifest.read(place)
    except manifest.Damaged as error:
        return None, [str(error)]
    if not checksums:
        return facts, manifest.problems(place, facts, False)
    from tqdm import tqdm

    with tqdm(total=facts.size, desc=place.name, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:
        return facts, manifest.problems(place, facts, True, progress=bar.update)


def _sizes(facts: manifest.Manifest) -> str:
    """The layout in short form, for example TP2xDP4."""
    layout = facts.layout
    names = {"TP": "tensor_model", "PP": "pipeline_model", "VPP": "virtual_pipeline_model", "CP": "context"}
    sizes = {short: layout[f"{name}_parallel_size"] for short, name in names.items()}
    sizes["DP"] = layout["world_size"] // (sizes["TP"] * sizes["PP"] * sizes["CP"])
    return "x".join(f"{short}{size}" for short, size in sizes.items() if size > 1) or "1"


def list_checkpoints(options: argparse.Namespace) -> int:
    """Print one line per checkpoint."""
    looked = [(place, *_look(place, options.full)) for place in _places(options.path)]
    good = [(f.iteration, f.validation_loss) for _, f, wrong in looked if f is not None and not wrong]
    defaults = CheckpointConfig()
    best = [step for step, why in kept(good, len(good) and 1, 0, defaults.keep_best).items() if why == "best"]
    print(_ROW.format("step", "saved (UTC)", "GB", "optimizer state", "layout", "val. loss", "state"))
    for place, facts, wrong in looked:
        step = paths.step_of(place)
        if facts is None:
            print(_ROW.format(step, *[""] * 5, "damaged"))
            continue
        loss = "" if facts.validation_loss is None else f"{facts.validation_loss:.4f}"
        state = "damaged" if wrong else "good, best" if step in best else "good"
        size = f"{facts.size / 1e9:.3f}"
        print(_ROW.format(step, facts.created[:19], size, facts.kind, _sizes(facts), loss, state))
    pointer, newest = paths.pointed(options.path), max((step for step, _ in good), default=None)
    if paths.step_of(options.path) is None and newest is not None and pointer != newest:
        print(f"{paths.LATEST} names {pointer}; a run resumes from {newest}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Print whether each checkpoint is good; returns 1 if one is damaged."""
    status = 0
    for place in _places(options.path):
        facts, wrong = _look(place, not options.sizes)
        for problem in wrong:
            print(f"damaged: {problem}")
            status = 1
        if facts is not None and not wrong:
            print(f"good: {place}, {len(facts.files)} files, {facts.size / 1e9:.3f} GB" + " (sizes)" * options.sizes)
    return status


def prune(options: argparse.Namespace) -> int:
    """Delete the checkpoints that the rules do not keep."""
    rules, keeper = _rules(options), Keeper()
    _places(options.path)
    lock, _ = acquire(options.path)
    gone, wrong = keeper.prune(options.path, rules, options.dry_run)
    for problem in wrong:
        print(f"damaged, ignored: {problem}")
    verb = "would delete" if options.dry_run else "deleted"
    print(f"{verb} steps: {', '.join(map(str, gone)) or 'none'}")
    if options.damaged:
        good, _ = keeper.good(options.path)
        old = [step for step in paths.steps(options.path) if step not in good and good and step < max(good)]
        damaged, left = deletable(options.path, old)
        for step in () if options.dry_run else damaged:
            paths.remove(options.path, step)
        print(f"{verb} damaged steps: {', '.join(map(str, damaged)) or 'none'}")
        keeper.left += left
    for line in keeper.left:
        print(line)
    lock.close()
    return 0


def _rules(options: argparse.Namespace) -> CheckpointConfig:
    """The rules: the given flags, else those of the newest good checkpoint's run."""
    given = {name: getattr(options, name) for name in ("keep_last", "keep_every", "keep_best")}
    for name, value in given.items():
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 0")
    rules = CheckpointConfig()
    for place in _places(options.path):
        if not _look(place, False)[1]:
            file = place / CONFIG
            tree = yaml.safe_load(file.read_text()).get("checkpoint", {}) if file.exists() else {}
            rules = replace(rules, **{name: tree[name] for name in [*given, "fully_reshardable_every"] if name in tree})
            break
    return replace(rules, **{name: value for name, value in given.items() if value is not None})


def info(options: argparse.Namespace) -> int:
    """Print a checkpoint's facts as YAML."""
    place = _places(options.path)[0]
    facts = manifest.read(place)
    tree = {
        "checkpoint": str(place),
        "step": facts.iteration,
        "saved": facts.created,
        "bytes": facts.size,
        "files": len(facts.files),
        "optimizer_state": facts.kind,
        "validation_loss": facts.validation_loss,
        "layout": facts.layout,
        "tokenizer": facts.tokenizer,
        "data": facts.data,
        "revision": facts.revision,
        "versions": facts.versions,
    }
    print(yaml.safe_dump(tree, sort_keys=False), end="")
    return 0


def _build_run(config: RunConfig) -> Any:
    from genlip_megatron.train.setup import build_run  # after megatron_patches.install in the new process

    return build_run(config)


def reshard(options: argparse.Namespace) -> int:
    """Write a checkpoint with the other kind of optimizer state."""
    from genlip_megatron.checkpoint.reshard import reshard as write

    place = _places(options.path)[0]
    sizes = {name: getattr(options, name) for name in vars(options) if name.endswith("_model_parallel_size")}
    layout = {name: size for name, size in sizes.items() if size is not None}
    target = (options.output or place.parent) / place.name
    if target.exists() and not target.samefile(place):
        raise ValueError(f"--output {options.output}: already has a checkpoint {place.name}. Name another folder.")
    if layout and options.to != "dp_reshardable":
        raise ValueError("--tp, --pp and --vpp need --to dp_reshardable; fully_reshardable state fits any layout")
    print(f"wrote {write(place, options.to, options.output or place.parent, _build_run, layout)}")
    return 0


def rewind(options: argparse.Namespace) -> int:
    """Set later checkpoints aside."""
    place = paths.step_folder(options.path, options.step)
    if not place.is_dir():
        steps = ", ".join(map(str, paths.steps(options.path))) or "none"
        raise ValueError(f"--step {options.step}: {place} is missing. Existing steps: {steps}.")
    if wrong := _look(place, True)[1]:
        raise ValueError("; ".join(wrong))
    lock, _ = acquire(options.path)
    for moved in paths.set_aside(options.path, options.step):
        print(f"set aside: {moved}")
    lock.close()
    print(f"a run with --save {options.path} resumes from step {options.step}")
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user errors end with status 2 and one line."""
    options = build_parser().parse_args(argv)
    try:
        status: int = options.function(options)
        return status
    except NotSaved as error:
        raise ValueError(error) from error


if __name__ == "__main__":
    sys.exit(main())
