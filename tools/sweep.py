#!/usr/bin/env python3
"""Run another tool at several image sizes and draw its scores as one curve for each encoder.

    python tools/sweep.py --output sweep -- tools/probe.py classify --encoder runs/so16 --train train/ --val val/
    python tools/sweep.py --output sweep --sizes 224 336 448 -- tools/zeroshot.py classify imagenet/val \\
        --load runs/so16 --class-names names.json
    python tools/sweep.py --output sweep --measure mass.generated.image -- tools/attention.py photos/ --load runs/so16
    python tools/sweep.py --output sweep -- torchrun --nproc-per-node 8 tools/probe.py segment --encoder runs/so16 ...

After -- comes the tool's command line without its size and --output; the sweep adds --size N (or --image-mode fixed
--image-size N) and --output FOLDER/size-N. Before anything runs, the command line is checked, and sizes that an encoder
cannot read are refused. results.json and results.png hold the curve of the sizes that are finished; tools/report.py
--results shows them. The same command continues a sweep that was stopped; finished sizes are not measured again, and
more --sizes can be added.

Exit status: 0 done; 2 a setting or a file is wrong; otherwise that of the tool that failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.outputs import check_folder

# Of the paper's Fig. 5, by our choice: 196 to 1024 patches of 16 pixels.
SIZES = (224, 288, 336, 384, 448, 512)


def build_parser() -> StrictParser:
    """The command line before ``--``."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="sweep.py",
        usage="%(prog)s --output FOLDER [--sizes N ...] [--measure KEY] -- TOOL ARGUMENTS ...",
        description=summary,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of the results")
    text = f"sides of the images in pixels (default: {' '.join(map(str, SIZES))})"
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help=text)
    text = (
        "number in the rows of the tool's results, with dots for inner keys, for example accuracies.bytes.none; "
        "lists are averaged (default: the tool's own measure; of tools/attention.py mass.image.first)"
    )
    parser.add_argument("--measure", default="", metavar="KEY", help=text)
    return parser


def tool_options(words: Sequence[str], size: int) -> tuple[argparse.Namespace, list[str]]:
    """(the options of the tool's own parser, the words that set the size, without the size).

    Raises:
        ValueError: no tool of this project, or one without image sizes. A wrong flag ends the process with status 2.
    """
    script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if script is None or not Path(words[script]).is_file():
        raise ValueError(f"-- {shlex.join(words)}: names no tool that exists, such as tools/probe.py")
    path, arguments = Path(words[script]), list(words[script + 1 :])
    spec = importlib.util.spec_from_file_location(f"swept_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "build_parser"):
        raise ValueError(f"-- {path}: has no build_parser, so its flags cannot be checked. Name a tool of tools/.")
    parser: StrictParser = module.build_parser()
    flags = _flags(parser)
    flag = next((flag for flag in ("--size", "--image-size") if flag in flags), None)
    if flag is None or "--output" not in flags:
        raise ValueError(f"-- {path}: has no --size or --image-size with --output. Name a tool that measures images.")
    for own in ("--output", flag):
        if any(word == own or word.startswith(f"{own}=") for word in arguments):
            raise ValueError(f"-- {path} {own}: the sweep sets it. Leave it out.")
    fixed = flag == "--image-size" and "--image-mode" in flags and "--image-mode" not in arguments
    setting = [*(["--image-mode", "fixed"] if fixed else []), flag]
    return parser.parse_args([*arguments, *setting, str(size), "--output", "unused"]), setting


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= _flags(sub)
    return found


def sweep(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the tool at every size; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    sizes = sorted(set(options.sizes))
    if sizes[0] < 1:
        raise ValueError(f"--sizes {sizes[0]}: must be at least 1")
    check_folder(options.output)
    inner, setting = tool_options(words, sizes[0])
    given = getattr(inner, "encoder", None) or getattr(inner, "load", None)
    if not given:
        raise ValueError(f"-- {shlex.join(words)}: names no encoder with --encoder or --load")
    from tqdm import tqdm

    from genlip_megatron.evaluate import sweep as results
    from genlip_megatron.log import to_stderr
    from genlip_megatron.optional import need

    script = next(word for word in words if word.endswith(".py"))
    results.check_measure(Path(script).name, getattr(inner, "task", ""), options.measure)
    if options.measure.startswith("attributes.") and not getattr(inner, "attributes", True):
        raise ValueError(f"--measure {options.measure}: add --attributes after {script}, or leave it out")
    need("matplotlib")
    known: dict[str, Any] = {"layer": inner.layer} if hasattr(inner, "layer") else {}
    fingerprints, grids = results.open_and_check(
        [given] if isinstance(given, str) else given,
        sizes,
        allow_unequal=getattr(inner, "allow_unequal", False),
        log=to_stderr,
        **known,
    )
    results.begin(options.output, words, fingerprints)
    command_line = [*words] if not words[0].endswith(".py") else [sys.executable, *words]
    for size in tqdm(sizes, desc="sweep", unit="size", file=sys.stderr):
        if not results.finished(options.output, size):
            place = results.size_folder(options.output, size)
            status = _run([*command_line, *setting, str(size), "--output", str(place)])
            if status:
                to_stderr(f"sweep.py: size {size}: the tool ended with status {status}. The same command continues.")
                return status
            if not results.finished(options.output, size):
                raise ValueError(f"-- {shlex.join(words)}: wrote no results.json. Name a tool that measures encoders.")
        measure, scores = results.collect(options.output, sizes, options.measure)
        results.write(options.output, words, measure, scores, fingerprints, grids)
    for name, found in scores.items():
        print(" | ".join((f"encoder {name} | {measure}", *(f"{size} {value:.4g}" for size, value in found.items()))))
    print(f"results in {options.output}/results.json and results.png")
    return 0


def _run(words: Sequence[str]) -> int:
    """Run a command; if this process is told to end, the command is too."""
    with subprocess.Popen(words) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, words = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = build_parser().parse_args(own)
    if not words:
        raise ValueError("-- TOOL: is missing. Write a tool's command line after --, such as -- tools/probe.py ...")
    return sweep(options, words)


if __name__ == "__main__":
    raise SystemExit(main())
