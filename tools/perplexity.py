#!/usr/bin/env python3
"""Measure how well a language model reads an encoder: perplexity of held-out answers after a short tuning.

    python tools/perplexity.py --encoder runs/so16 random:runs/so16 --llm Qwen/Qwen2.5-1.5B-Instruct \\
        --data blip_laion_cc_sbu_558k.json --image-folder LLaVA-Pretrain/images --val-fraction 0.005 --output ppl
    python tools/perplexity.py --encoder runs/so16 hf:google/siglip2-so400m-patch16-384 --size 384 \\
        --llm HuggingFaceTB/SmolLM2-135M --data captions.csv --output ppl
    python tools/perplexity.py --encoder runs/so16 --llm HuggingFaceTB/SmolLM2-135M --data 'train-*.tar' \\
        --val 'val-*.tar' --data2 llava_v1_5_mix665k.json --image-folder images llava --output ppl --no-cache
    torchrun --nproc-per-node 8 tools/perplexity.py --encoder runs/so16 --llm ... --data ... --output ppl

PPL1 tunes only the projector (Linear, GELU, Linear) on captions: image, then caption, without a prompt. PPL2 continues
with projector and language model on --data2 as conversations, or on --data again. The encoder is frozen.
PPL = exp(sum NLL / sum tokens) over the answers and end tokens of held-out samples, also with another sample's image
and without an image. Lower is better. PPL with another sample's image shows what the language model knows
without looking; the gap to it is what the encoder adds.

--data and --data2: LLaVA's json ("conversations" with <image>), a table of images and captions (CSV, TSV, JSON, JSONL,
Parquet, Arrow), or indexed WebDataset shards. Samples without an image are left out. The protocol: docs/evaluation.md.

The output folder holds results.json, results.png, and for each encoder the projectors. A killed command continues where
it was when it is run again; what is finished is not measured again.

Exit status: 0 done; 1 an error of the machine; 2 a setting or a file is wrong.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser, check_least
from genlip_megatron.encoders.flags import add_encoder_flags, check_encoder_flags, file_name
from genlip_megatron.optional import need
from genlip_megatron.outputs import check_folder

if TYPE_CHECKING:
    from genlip_megatron.encoders.cache import CacheImage
    from genlip_megatron.encoders.interface import Encoder
    from genlip_megatron.evaluate.language_model import LanguageModel
    from genlip_megatron.evaluate.perplexity import Sample, Stage

_GRID = 24  # patches on a side, as the paper's language models see


def build_parser() -> StrictParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(
        prog="perplexity.py", description=summary, epilog=rest, allow_abbrev=False, formatter_class=raw
    )
    add_encoder_flags(parser, default_size=f"{_GRID} patches")
    text = "causal language model: a folder that transformers wrote, or a name on the hub"
    parser.add_argument("--llm", required=True, metavar="FOLDER", help=text)
    parser.add_argument("--data", required=True, nargs="+", help="captions of PPL1")
    parser.add_argument("--data2", nargs="+", help="instruction data of PPL2 (default: --data, as captions)")
    parser.add_argument("--ppl1-only", action="store_true", help="do not tune the language model")
    parser.add_argument("--val", nargs="+", help="held-out samples of --data (default: part of it)")
    parser.add_argument("--val2", nargs="+", help="held-out samples of --data2 (default: part of it)")
    text = "share of the images to hold out, with all their samples, without --val (default: 0.1)"
    parser.add_argument("--val-fraction", type=float, default=0.1, help=text)
    text = "folder of the image paths of --data, and a second one for --data2 (default: that of the table)"
    parser.add_argument("--image-folder", nargs="+", default=[""], metavar="FOLDER", help=text)
    parser.add_argument("--image-column", default="image", help="column of a table (default: image)")
    parser.add_argument("--caption-column", default="caption", help="column of a table (default: caption)")
    text = "leave out samples of more text and visual tokens (default: 8192, or the language model's limit)"
    parser.add_argument("--seq-length", type=int, default=8192, metavar="N", help=text)
    parser.add_argument("--lr1", type=float, default=1e-3, help="learning rate of PPL1 (default: 1e-3)")
    parser.add_argument("--lr2", type=float, default=1e-5, help="learning rate of PPL2 (default: 1e-5)")
    text = "samples of an update, of all ranks together (default: 128)"
    parser.add_argument("--batch-size", type=int, default=128, help=text)
    text = "samples per forward pass and rank, as memory allows (default: 8)"
    parser.add_argument("--micro-batch-size", type=int, default=8, help=text)
    parser.add_argument("--epochs", type=int, default=1, help="of each stage (default: 1)")
    text = "at most N updates in each stage; the learning rate falls to its end within them (default: 0, no limit)"
    parser.add_argument("--max-steps", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder of the results")
    text = "folder of features that are computed once (default: in --output)"
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=text)
    text = "compute features for each batch, for data whose features do not fit on the disk"
    parser.add_argument("--no-cache", action="store_true", help=text)
    text = "dtype of the cache (default: that of the encoder)"
    parser.add_argument("--cache-dtype", choices=("fp32", "bf16", "fp16"), help=text)
    text = "steps between two saved states (default: 500)"
    parser.add_argument("--save-interval", type=int, default=500, metavar="N", help=text)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images, per rank (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of projector, order and split (default: 0)")
    return parser


def perplexity(options: argparse.Namespace) -> int:
    """Measure every encoder; returns the exit status.

    Raises:
        ValueError: a setting or a file is wrong.
    """
    _check_flags(options)
    from genlip_megatron.encoders.compared import open_compared
    from genlip_megatron.evaluate import perplexity_results, ranks
    from genlip_megatron.evaluate.language_model import open_language_model
    from genlip_megatron.evaluate.loading import check_batch_size

    need("matplotlib")
    data = _read(options)
    device = ranks.start(options.device)
    try:
        check_batch_size(options.batch_size)
        language = open_language_model(options.llm, device)
        encoders = open_compared(options, device, lambda encoder: _GRID * encoder.patch)
        images: dict[str, CacheImage] = {}
        visual = max(math.prod(encoder.grid(size, size)) for encoder, size in encoders)
        stages, facts = _stages(options, language, data, images, visual)
        jobs = [_job(options, encoder, size, language, stages, list(images.values())) for encoder, size in encoders]
        rows = [job() for job in jobs]
        if ranks.rank() == 0:
            perplexity_results.write(options.output, {"llm": options.llm, **facts}, rows)
            print(perplexity_results.table(rows))
            print(f"results in {options.output}/results.json and results.png")
    finally:
        ranks.stop()
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Raise ValueError for a wrong flag; needs no torch."""
    check_least(options, batch_size=1, micro_batch_size=1, epochs=1, save_interval=1, seq_length=2)
    check_least(options, max_steps=0, workers=0, seed=0)
    for flag in ("lr1", "lr2"):
        if not 0 < (value := getattr(options, flag)) < math.inf:
            raise ValueError(f"--{flag} {value}: must be above 0")
    if not 0 < options.val_fraction < 1:
        raise ValueError(f"--val-fraction {options.val_fraction}: must be above 0 and below 1")
    check_encoder_flags(options)
    if len(options.image_folder) > 2:
        raise ValueError("--image-folder: at most two, of --data and of --data2")
    if options.val2 and not options.data2:
        raise ValueError("--val2: needs --data2")
    if options.ppl1_only and options.data2:
        raise ValueError("--data2: is of PPL2. Leave out --ppl1-only or --data2.")
    if options.no_cache and (options.cache or options.cache_dtype):
        raise ValueError("--no-cache: excludes --cache and --cache-dtype")
    if options.dtype == "fp16":
        raise ValueError("--dtype fp16: gradients would underflow. Choose bf16 or fp32.")
    check_folder(options.output)


def _read(options: argparse.Namespace) -> dict[str, Any]:
    """Flag -> (samples, number of samples without an image)."""
    from genlip_megatron.evaluate.dialogues import read_dialogues

    columns = (options.image_column, options.caption_column)
    return {
        flag: read_dialogues(where, f"--{flag}", options.image_folder[-1 if flag.endswith("2") else 0], *columns)
        for flag in ("data", "val", "data2", "val2")
        if (where := getattr(options, flag))
    }


def _stages(
    options: argparse.Namespace,
    language: LanguageModel,
    data: dict[str, Any],
    images: dict[str, CacheImage],
    visual_tokens: int,
) -> tuple[list[Stage], dict[str, Any]]:
    """(PPL1 and perhaps PPL2, facts for the results). ``images`` receives every image, by its stamp."""
    from genlip_megatron.evaluate.dialogues import split_by_image
    from genlip_megatron.evaluate.perplexity import Stage

    limit = min(options.seq_length, language.max_length or options.seq_length) - visual_tokens
    facts: dict[str, Any] = {"visual_tokens": visual_tokens}
    found: dict[str, list[Sample]] = {}
    for flag, (dialogues, without_image) in data.items():
        form = language.conversation if flag.endswith("2") else language.caption
        found[flag], too_long = _samples(dialogues, form, images, limit)
        facts[flag] = {
            "where": getattr(options, flag),
            "samples": len(found[flag]),
            "samples_without_image": without_image,
            "samples_too_long": too_long,
        }
        if not found[flag]:
            raise ValueError(
                f"--{flag}: no sample has at most {limit} text tokens, which --seq-length {options.seq_length} and the "
                f"language model leave after {visual_tokens} visual tokens. Choose a smaller --size."
            )

    def stage(name: str, train_llm: bool, rate: float, data_flag: str, val_flag: str) -> Stage:
        train = found[data_flag]
        val = found.get(val_flag)
        if val is None:
            chosen, held = split_by_image([sample.image for sample in train], options.val_fraction, options.seed)
            train, val = [train[number] for number in chosen], [train[number] for number in held]
        if len(train) < options.batch_size:
            raise ValueError(
                f"--{data_flag}: too few samples, {len(train)} to train on, for --batch-size {options.batch_size}. "
                "Choose a smaller batch size, or more data."
            )
        if len({sample.image for sample in val}) < 2:
            where = f"--{val_flag}" if val_flag in found else f"--val-fraction {options.val_fraction}"
            raise ValueError(f"{where}: fewer than 2 held-out images. Hold out more.")
        return Stage(name, train_llm, rate, train, val)

    stages = [stage("ppl1", False, options.lr1, "data", "val")]
    if not options.ppl1_only:
        second = ("data2", "val2") if options.data2 else ("data", "val")
        stages.append(stage("ppl2", True, options.lr2, *second))
    return stages, facts


def _samples(
    dialogues: Sequence[Any], form: Any, images: dict[str, CacheImage], limit: int
) -> tuple[list[Sample], int]:
    """(the samples of at most ``limit`` text tokens, the number of longer ones)."""
    from genlip_megatron.evaluate.perplexity import Sample

    places = {stamp: number for number, stamp in enumerate(images)}
    samples = []
    for dialogue in dialogues:
        text, stamp = form(dialogue.turns), dialogue.image.stamp
        if len(text.ids) <= limit:
            images.setdefault(stamp, dialogue.image)
            samples.append(Sample(text, places.setdefault(stamp, len(places)), stamp))
    return samples, len(dialogues) - len(samples)


def _job(
    options: argparse.Namespace,
    encoder: Encoder,
    size: int,
    language: LanguageModel,
    stages: Sequence[Stage],
    images: Sequence[CacheImage],
) -> Any:
    """A function that measures one encoder and returns its row. Everything that can be wrong is checked before."""
    import torch

    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.evaluate import perplexity as library
    from genlip_megatron.evaluate import perplexity_results
    from genlip_megatron.evaluate.probe_state import ProbeFolder

    place = options.output / file_name(encoder.name)
    cache = options.cache / file_name(encoder.name) if options.cache else place / "features"
    same = ("batch_size", "micro_batch_size", "epochs", "max_steps", "seed", "save_interval", "workers")
    chosen = library.Options(
        size=size,
        cache=None if options.no_cache else cache,
        cache_dtype=DTYPES[options.cache_dtype] if options.cache_dtype else encoder.dtype,
        bf16=options.dtype == "bf16" or (options.dtype == "auto" and encoder.device.type == "cuda"),
        **{name: getattr(options, name) for name in same},
    )
    features = library.VisualFeatures(encoder, images, chosen)
    folders = [
        ProbeFolder(place / stage.name, library.settings(encoder, language, stages[: number + 1], chosen))
        for number, stage in enumerate(stages)
    ]

    def run() -> dict[str, Any]:
        results = library.measure(encoder, language, features, stages, chosen, folders)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        return perplexity_results.row({s.name: result for s, result in zip(stages, results, strict=True)})

    return run


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; user errors end with status 2 and one line."""
    return perplexity(build_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
