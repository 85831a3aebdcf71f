#!/usr/bin/env python3
"""Show a run on one HTML page: curves, captions, readouts, attention, probes, data. It needs no network and no scripts.

    python tools/report.py runs/so16
    python tools/report.py runs/so16 --images data/val-00000.tar --limit 4 --attention runs/so16/attention
    python tools/report.py runs/so16 --results probes/so16 zeroshot/so16 sweeps/so16 --output so16.html

Curves and captions of the validation come from the run's TensorBoard files; steps that were repeated after a crash or a
rollback are grey. Data and settings come from the newest checkpoint. --images adds that checkpoint's captions and patch
readouts, --attention a folder of tools/attention.py, --results folders of tools/probe.py, zeroshot.py, perplexity.py or
sweep.py (a results.json with pictures). Each part shows the command that made it, or would make it.
The page replaces an earlier report, but no other file.

Exit status: 0 done; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(prog="report.py", description=summary, epilog=rest, allow_abbrev=False, formatter_class=raw)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, checkpoint.save")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    text = "folder of the event files (default: RUN/tensorboard, or the run's log.tensorboard_dir)"
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help=text)
    text = "images to caption and read out: files, indexed .tar shards, folders, or globs"
    parser.add_argument("--images", nargs="+", default=[], metavar="INPUT", help=text)
    parser.add_argument("--limit", type=int, default=4, help="use only the first N images; 0: all (default: 4)")
    text = "results of tools/attention.py"
    parser.add_argument("--attention", type=Path, nargs="+", default=[], metavar="FOLDER", help=text)
    text = "results of tools/probe.py, zeroshot.py, perplexity.py or sweep.py"
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FOLDER", help=text)
    parser.add_argument(
        "--tokenizer", default="", help="the model's tokenizer file, if it was moved after the training"
    )
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, a GPU if there is one)")
    text = "dtype to compute in (default: auto, the dtype of the stored weights)"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    return parser


def report(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Write the page; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    run: Path = options.run
    if not run.is_dir():
        raise ValueError(f"RUN {run}: no such folder. Name the folder of a run, its --save.")
    if options.limit < 0:
        raise ValueError(f"--limit {options.limit}: must be at least 0, which means all")
    output: Path = options.output or run / "report.html"
    from genlip_megatron.evaluate import report_page, report_parts
    from genlip_megatron.evaluate.probe_results import provenance
    from genlip_megatron.evaluate.run_log import read_log
    from genlip_megatron.optional import need
    from genlip_megatron.outputs import check_file, write

    need("matplotlib")
    need("jinja2")
    if options.images:
        need("transformers")
    check_file(output, report_page.is_page)
    report_parts.check_attention(options.attention)
    report_parts.check_results(options.results)
    found = report_parts.newest(run)
    config = found[1] if found else None
    if options.images and config is None:
        raise ValueError(f"--images {options.images[0]}: {run} holds no checkpoint yet. Leave it out, or wait for one.")
    moved = Path(config.log.tensorboard_dir) if config and config.log.tensorboard_dir else run / "tensorboard"
    events: Path = options.tensorboard or moved
    if options.tensorboard and not any(events.glob("*tfevents*")):
        raise ValueError(f"--tensorboard {events}: it holds no event files. Name the folder that the run wrote.")
    log = read_log(events)
    if config is None and not log.curves:
        raise ValueError(f"RUN {run}: no checkpoint and no TensorBoard events. Name the folder of a run, its --save.")
    line = shlex.join(["tools/report.py", *words])
    parts = [
        report_parts.training(log, events, run, line),
        report_parts.captions(log, events, run, line),
        report_parts.checkpoint(run, options.images, options.limit, options.device, options.dtype, options.tokenizer),
        report_parts.attention(options.attention, run, config),
        report_parts.results(options.results, run),
        report_parts.data(config, line),
    ]
    versions = provenance()["versions"]
    facts = dict(report_parts.heading(run, found, versions))
    write(output, report_page.render(run.resolve().name, facts, parts, line), report_page.is_page)
    missing = [part.title for part in parts if part.missing]
    print(f"report in {output}" + (f" | missing: {', '.join(missing)}" if missing else ""))
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    return report(build_parser().parse_args(argv), sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
