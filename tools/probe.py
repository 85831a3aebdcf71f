#!/usr/bin/env python3
"""Measure frozen vision encoders: classification by a probe, and semantic segmentation by a linear layer.

    python tools/probe.py classify --encoder runs/so16 --train imagenet/train --val imagenet/val --output probes/so16
    python tools/probe.py classify --encoder runs/so16 hf:google/siglip2-so400m-patch16-384 --size 384 \\
        --preset cached --train ... --val ... --output x
    python tools/probe.py classify --head knn --encoder exported --train 'train-*.tar' --val 'val-*.tar' --output knn
    python tools/probe.py segment --encoder runs/so16 --train ADE/images/training --val ADE/images/validation \\
        --output ade
    torchrun --nproc-per-node 8 tools/probe.py classify --encoder runs/so16 --train ... --val ... --output probes/so16

classify  top-1 accuracy. The attentive probe (default) trains one classifier per learning rate and weight decay,
          all at once. --head mean-linear and --head knn use the mean of the patches. 10 % of --train selects the
          classifier; only that one is measured on --val.
segment   mIoU. BatchNorm and one linear layer classify each patch, or its nearest patches do (--preset knn-capi).

--train and --val: a folder, WebDataset shards (.cls, .seg.png) or a table. For classify a folder has one subfolder for
each class (ImageNet); for segment it is .../images/... beside .../annotations/... (ADE20K). docs/evaluation.md has the
protocols.

The output folder has results.json, results.png and a folder for each encoder. To continue a killed command, run it
again; finished encoders are not measured again.

Exit status: 0 done; 1 an error of the machine; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser, check_least
from genlip_megatron.encoders.flags import add_encoder_flags, check_encoder_flags, file_name
from genlip_megatron.optional import need
from genlip_megatron.outputs import check_folder

if TYPE_CHECKING:
    from genlip_megatron.encoders.interface import Encoder

_CLASSIFY = ("capi", "aimv2", "cached")
_SEGMENT = ("dinov2", "dinov3", "knn-capi")
_HEADS = ("attentive", "mean-linear", "knn")
_DTYPES = ("fp32", "bf16", "fp16")
_NO_CACHE = "Leave out --cache and --cache-dtype."


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(prog="probe.py", description=summary, epilog=rest, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(dest="task", required=True, parser_class=StrictParser)
    classify = commands.add_parser("classify", help="top-1 accuracy", allow_abbrev=False)
    segment = commands.add_parser("segment", help="mIoU", allow_abbrev=False)
    text = "protocol of the attentive probe (default: capi)"
    classify.add_argument("--preset", choices=_CLASSIFY, help=text)
    text = "attentive (default); mean-linear: of the mean patch, as DINOv2; knn: nearest mean patches"
    classify.add_argument("--head", choices=_HEADS, default="attentive", help=text)
    text = "use at most N training images of each class; 0: all (default: 100 for --preset cached, else 0)"
    classify.add_argument("--per-class", type=int, metavar="N", help=text)
    text = "the preset's augmentation; --no-augment computes features once, which a CPU can afford (default: on)"
    classify.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "RandAugment of --preset aimv2, which needs timm (default: on)"
    classify.add_argument("--rand-augment", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "dinov2 (default), dinov3, or knn-capi: nearest patches, quick"
    segment.add_argument("--preset", choices=_SEGMENT, default="dinov2", help=text)
    text = "label 0 does not count, label k is class k - 1, as in ADE20K (default: on)"
    segment.add_argument("--reduce-zero-label", action=argparse.BooleanOptionalAction, default=True, help=text)
    for sub in (classify, segment):
        _add_shared(sub)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_encoder_flags(parser, default_size="the encoder's own; see docs")
    parser.add_argument("--train", required=True, nargs="+", help="training data: a folder, .tar shards or a table")
    parser.add_argument("--val", required=True, nargs="+", help="validation data, as --train")
    parser.add_argument("--image-column", default="image", help="column of a table (default: image)")
    parser.add_argument("--label-column", default="label", help="column of classes or masks (default: label)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of the results")
    text = "folder of features, of presets that compute them once (default: in --output)"
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=text)
    text = "dtype of these features (default: that of the encoder)"
    parser.add_argument("--cache-dtype", choices=_DTYPES, help=text)
    parser.add_argument("--batch-size", type=int, default=0, help="of all ranks together (default: the preset's)")
    text = "train at most N steps; the learning rate falls to its end within them (default: the preset's steps)"
    parser.add_argument("--max-steps", type=int, default=0, metavar="N", help=text)
    text = "steps between two saved states (default: 500)"
    parser.add_argument("--save-interval", type=int, default=500, metavar="N", help=text)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images, per rank (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of heads, order and augmentation (default: 0)")


def probe(options: argparse.Namespace) -> int:
    """Measure every encoder; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    _check_flags(options)
    from genlip_megatron.encoders.compared import open_compared
    from genlip_megatron.evaluate import labelled, ranks
    from genlip_megatron.evaluate.loading import check_batch_size

    need("matplotlib")
    columns = (options.image_column, options.label_column)
    masks = options.task == "segment"
    train: Sequence[Any]
    val: Sequence[Any]
    if masks:
        train = labelled.read_masks(options.train, "--train", *columns)
        val = labelled.read_masks(options.val, "--val", *columns)
        classes = 0
    else:
        train, names = labelled.read_classes(options.train, "--train", *columns)
        val, _ = labelled.read_classes(options.val, "--val", *columns, known=names)
        train = labelled.per_class(train, _per_class(options), options.seed)
        classes = len(names)
    if len(train) < 10:
        raise ValueError(f"--train {options.train[0]}: {len(train)} images. A probe needs 10 or more.")
    device = ranks.start(options.device)
    try:
        if options.batch_size:
            check_batch_size(options.batch_size)
        encoders = open_compared(options, device, lambda encoder: _size(options, encoder))
        if masks:
            classes = _count_classes(options, train, val)
        jobs = [_job(options, encoder, size, train, val, classes) for encoder, size in encoders]
        rows = [job() for job in jobs]
        if ranks.rank() == 0:
            _report(options, rows, classes)
    finally:
        ranks.stop()
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Raise ValueError for a wrong flag; needs no torch."""
    check_least(options, batch_size=0, max_steps=0, workers=0, seed=0, save_interval=1)
    check_encoder_flags(options)
    check_folder(options.output)
    if options.task == "segment" and options.preset != "knn-capi" and (options.cache or options.cache_dtype):
        raise ValueError(f"--preset {options.preset}: computes features for each step. {_NO_CACHE}")
    trains_nothing = options.preset == "knn-capi" if options.task == "segment" else options.head == "knn"
    if trains_nothing and (options.max_steps or options.batch_size):
        which = "--preset knn-capi" if options.task == "segment" else "--head knn"
        raise ValueError(f"{which}: trains nothing. Leave out --max-steps and --batch-size.")
    if options.task == "segment":
        return
    if options.head != "attentive" and options.preset:
        raise ValueError(f"--preset {options.preset}: works only with --head attentive. Leave out --preset or --head.")
    if options.per_class is not None and options.per_class < 0:
        raise ValueError(f"--per-class {options.per_class}: must be at least 0, which means all")
    options.protocol = (options.preset or "capi") if options.head == "attentive" else options.head
    if not options.augment and options.protocol in ("cached", "knn"):
        raise ValueError(f"--no-augment: {options.protocol} has no augmentation. Leave it out.")
    augments = options.augment and options.protocol not in ("cached", "knn")
    if augments and (options.cache or options.cache_dtype):
        raise ValueError(f"{options.protocol}: computes features for each step. {_NO_CACHE} Or add --no-augment.")
    if not options.rand_augment and not (augments and options.protocol == "aimv2"):
        raise ValueError("--no-rand-augment: only --preset aimv2 with its augmentation has it. Leave it out.")


def _per_class(options: argparse.Namespace) -> int:
    from genlip_megatron.evaluate.classify import PRESETS

    if options.per_class is not None:
        return int(options.per_class)
    return PRESETS[options.protocol].images_per_class if options.protocol in PRESETS else 0


def _size(options: argparse.Namespace, encoder: Encoder) -> int | None:
    """Side of the images without ``--size``; None for native shapes."""
    if options.task == "segment":
        least = 224 if options.preset == "knn-capi" else 512
        return -(-least // encoder.patch) * encoder.patch
    if options.protocol in ("cached", "knn"):
        return encoder.size
    return encoder.size or 224


def _count_classes(options: argparse.Namespace, train: Sequence[Any], val: Sequence[Any]) -> int:
    from genlip_megatron.evaluate.labelled import check_masks
    from genlip_megatron.evaluate.probe_state import progress_bar

    with progress_bar(len(train) + len(val), 0, "checking masks", "mask") as bar:
        reduce_zero = options.reduce_zero_label
        classes = check_masks(train, "--train", reduce_zero, None, bar.update)
        check_masks(val, "--val", reduce_zero, classes, bar.update)
    return classes


def _job(
    options: argparse.Namespace,
    encoder: Encoder,
    size: int | None,
    train: Sequence[Any],
    val: Sequence[Any],
    classes: int,
) -> Any:
    """A function that measures one encoder and returns its row. Everything that can be wrong is checked before."""
    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.evaluate import classify, segment
    from genlip_megatron.evaluate.loading import check_batch_size
    from genlip_megatron.evaluate.probe_options import settings
    from genlip_megatron.evaluate.probe_state import ProbeFolder

    place = options.output / file_name(encoder.name)
    shared: dict[str, Any] = {
        "cache": options.cache / file_name(encoder.name) if options.cache else place / "features",
        "cache_dtype": DTYPES[options.cache_dtype] if options.cache_dtype else encoder.dtype,
        **{name: getattr(options, name) for name in ("batch_size", "max_steps", "workers", "seed", "save_interval")},
    }
    if options.task == "segment":
        assert size is not None
        chosen = segment.Options(size=size, reduce_zero=options.reduce_zero_label, **shared)
        preset = segment.PRESETS.get(options.preset)
        folder = ProbeFolder(place, settings(encoder, options.preset, train, val, classes, chosen))
        if preset is None:
            run = lambda: segment.nearest_patches(encoder, train, val, classes, chosen)  # noqa: E731
        else:
            check_batch_size(options.batch_size or preset.batch_size)
            run = lambda: segment.linear_segmentation(encoder, train, val, classes, preset, chosen, folder)  # noqa: E731
    else:
        ours = classify.Options(size=size, rand_augment=options.rand_augment, augment=options.augment, **shared)
        protocol = classify.PRESETS.get(options.protocol)
        folder = ProbeFolder(place, settings(encoder, options.protocol, train, val, classes, ours))
        cached = protocol is None or protocol.augment == "none" or not options.augment
        if cached:
            for part, samples in (("train", train), ("val", val)):
                # Refuses features of another encoder now, before anything is computed.
                classify.feature_cache(encoder, samples, ours, part, pool=protocol is None)
        if protocol is None:
            run = lambda: classify.nearest_neighbours(encoder, train, val, classes, ours)  # noqa: E731
        else:
            check_batch_size(options.batch_size or protocol.batch_size)
            if not cached:
                classify.training_view(protocol.augment, size or 0, options.rand_augment)  # timm imports
            run = lambda: classify.trained_probe(encoder, train, val, classes, protocol, ours, folder)  # noqa: E731
    return lambda: folder.result() or folder.finish(run())


def _report(options: argparse.Namespace, rows: Sequence[dict[str, Any]], classes: int) -> None:
    from genlip_megatron.evaluate import probe_results

    measure, what = ("miou", "mIoU, %") if options.task == "segment" else ("accuracy", "top-1 accuracy, %")
    protocol = options.preset if options.task == "segment" else options.protocol
    facts = {"task": options.task, "protocol": protocol, "classes": classes, "train": options.train, "val": options.val}
    probe_results.write(options.output, facts, rows, measure, f"{what} ({protocol}, {classes} classes)")
    for row in rows:
        held = row.get("held_out_accuracy", row.get("held_out_miou"))
        selected = "" if held is None else f" | held out {held:.1%}"
        print(f"encoder {row['settings']['encoder']} | {measure} {row[measure]:.1%}{selected}")
    print(f"results in {options.output}/results.json and results.png")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    return probe(build_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
