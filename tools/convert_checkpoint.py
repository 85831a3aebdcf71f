#!/usr/bin/env python3
"""Convert weights: a Megatron checkpoint of any layout to a Hugging Face or OpenCLIP folder, or the reverse.

    python tools/convert_checkpoint.py to-hf runs/so16 --output exports/so16 --dtype bf16 --verify
    python tools/convert_checkpoint.py to-hf runs/so16/iter_0002000 --output exports/encoder --encoder-only
    python tools/convert_checkpoint.py to-hf runs/so16 --output exports/tower --for llava-next --image-size 384
    python tools/convert_checkpoint.py to-openclip runs/so16 --output exports/so16-openclip
    python tools/convert_checkpoint.py to-megatron exports/so16 --output runs/so16-weights
    python tools/convert_checkpoint.py to-megatron epoch_8.pt --openclip-config naflexgenlip_so16.json \
        --tokenizer tokenizer.json --output runs/so16-weights
    python pretrain_genlip.py --config so16_stage2 --load runs/so16-weights --finetune --save runs/stage2 ...

Runs on a CPU in one process, with one parameter in memory at a time. It converts the model's weights in the dtype of
the run, not the float32 master weights of the optimizer. Values stay the same bit for bit unless --dtype rounds them.
It reads the authors' released folders like its own, and the GenLIP models of OpenCLIP: a folder with
open_clip_config.json, or a training checkpoint. Another mean and standard deviation of the pixels is folded into the
patch embedding.

The output appears when it is complete. A failure leaves nothing; a killed process leaves a hidden folder that the next
run removes. The exit status is 2, with one line of error, if the input cannot be converted, and 1 if --verify finds
that the models differ.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.log import to_stderr
from genlip_megatron.optional import need, need_open_clip

if TYPE_CHECKING:
    import torch

    from genlip_megatron.checkpoint.manifest import Manifest
    from genlip_megatron.config import DataConfig, RunConfig
    from genlip_megatron.convert.megatron_source import MegatronSource
    from genlip_megatron.convert.verify import Difference

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of a size such as 5GB or 512MiB.

    >>> size("1.5GB"), size("2KiB")
    (1500000000, 2048)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    count = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 512MiB")
    return int(count)


def build_parser() -> StrictParser:
    """The command line, with one sub-command for each direction."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="convert_checkpoint.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, source: str, output: str, dtypes: Sequence[str], tokenizer: str) -> StrictParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("source", type=Path, help=source)
        added.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=output)
        added.add_argument("--overwrite", action="store_true", help="replace the output of an earlier conversion")
        added.add_argument("--verify", action="store_true", help="afterwards compare both models on one batch")
        text = "dtype of the written weights; keep: unchanged (default)"
        added.add_argument("--dtype", choices=("keep", *dtypes), default="keep", help=text)
        added.add_argument("--tokenizer", type=Path, help=tokenizer)
        return added

    to_hf = command(
        "to-hf",
        "Megatron checkpoint to Hugging Face folder",
        "a checkpoint iter_NNNNNNN, or a run folder for its newest good checkpoint",
        "folder to write: weights, configuration, tokenizer and the model's code",
        ("fp32", "bf16", "fp16"),
        "file of the run's tokenizer, if it has moved",
    )
    text = "leave out the token embedding, the projections and the LM head"
    to_hf.add_argument("--encoder-only", action="store_true", help=text)
    to_hf.add_argument("--max-shard-size", type=size, default="5GB", help="largest weight file (default: 5GB)")
    text = "add what LLaVA-NeXT reads: sizes for pad, anyres, merging of patches and samples without an image"
    to_hf.add_argument("--for", choices=("llava-next",), dest="use", help=text)
    text = "with --for: side of its images in pixels, a multiple of 16 (default: the run's, if its images are fixed)"
    to_hf.add_argument("--image-size", type=int, help=text)
    text = "licence of the weights, for the model card (default: unknown)"
    to_hf.add_argument("--license", default="unknown", help=text)
    command(
        "to-openclip",
        "Megatron checkpoint to a folder for OpenCLIP's local-dir: names",
        "a checkpoint iter_NNNNNNN, or a run folder for its newest good checkpoint",
        "folder to write: weights, configuration and tokenizer",
        ("fp32", "bf16", "fp16"),
        "file of the run's tokenizer, if it has moved",
    )
    to_megatron = command(
        "to-megatron",
        "Hugging Face or OpenCLIP weights to Megatron checkpoint of weights only",
        "a folder with config.json and safetensors, exported or released by the authors; or OpenCLIP's folder or file",
        "folder of checkpoints to write; load with --load --finetune",
        ("fp32", "bf16"),
        "tokenizer.json or SentencePiece .model of the weights (default: the folder's tokenizer.json)",
    )
    to_megatron.add_argument("--num-attention-heads", type=int, help="needed if config.json does not give it")
    text = "OpenCLIP's JSON file of the model, for a file of weights (default: open_clip_config.json beside it)"
    to_megatron.add_argument("--openclip-config", type=Path, metavar="FILE", help=text)
    return parser


def _bar(total: int | None, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr, leave=False)


def _open_run(options: argparse.Namespace, with_tokenizer: bool) -> tuple[Path, Manifest, MegatronSource, RunConfig]:
    """(checkpoint, manifest, weights, the run's configuration), with a check of the tokenizer.

    The configuration's ``data.tokenizer`` is the file of ``--tokenizer`` if given."""
    from genlip_megatron.checkpoint import loading
    from genlip_megatron.config import override
    from genlip_megatron.convert import conversion
    from genlip_megatron.tokenizer import load_tokenizer

    with _bar(None, "checksums") as bar:
        place, saved, source = conversion.open_checkpoint(options.source, to_stderr, bar.update)
    config = loading.read_config(place)
    config = override(config, {"data.tokenizer": str(options.tokenizer or config.data.tokenizer)})
    tokenizer = Path(config.data.tokenizer)
    if with_tokenizer and not tokenizer.is_file():
        raise ValueError(
            f"{tokenizer}: no such file; the run's tokenizer was there. Name its new path with --tokenizer."
        )
    if with_tokenizer and (found := load_tokenizer(tokenizer, source.model.vocab_size).fingerprint) != saved.tokenizer:
        raise ValueError(
            f"{tokenizer}: not the tokenizer of {place}: its fingerprint is {found}, the checkpoint's is "
            f"{saved.tokenizer}. Name the right file with --tokenizer"
        )
    return place, saved, source, config


def _for_use(options: argparse.Namespace, config: RunConfig) -> DataConfig:
    """The run's image settings with ``--for`` and ``--image-size`` applied."""
    from genlip_megatron.config import override

    size = options.image_size
    if not options.use:
        if size is not None:
            raise ValueError(f"--image-size {size}: needs --for, since other exports keep the run's image settings")
        return config.data
    if size is None and config.data.image_mode == "native":
        raise ValueError(
            f"--for {options.use}: needs a fixed size, and the run's images are native. Give the side as --image-size"
        )
    if size is not None and (size < 16 or size % 16):
        raise ValueError(f"--image-size {size}: must be a multiple of 16")
    fixed = {"data.image_mode": "fixed", "data.image_size": size or config.data.image_size}
    return override(config, fixed).data


def to_hf(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder."""
    import torch

    from genlip_megatron.convert import conversion
    from genlip_megatron.convert.hf_folder import foreign, write_side_files
    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.convert.tokenizer import export_tokenizer

    if options.verify:
        need("transformers")
    check_target(options.output, options.overwrite, foreign)
    # An encoder reads no text: its tokenizer file may be gone.
    has_tokenizer = not options.encoder_only or options.tokenizer is not None
    place, saved, source, config = _open_run(options, has_tokenizer)
    data = _for_use(options, config)
    dtype = DTYPES.get(options.dtype)
    tensors = conversion.planned(source, dtype, options.encoder_only)
    total = sum(planned.nbytes for planned in tensors.values())
    dtypes = {planned.dtype for planned in tensors.values()}
    stored = dtypes.pop() if len(dtypes) == 1 else torch.float32
    facts = {"Step": str(saved.iteration)}
    if saved.validation_loss is not None:
        facts["Validation loss"] = f"{saved.validation_loss:.4f}"
    with new_folder(options.output, total, options.overwrite, foreign) as partial:
        with _bar(total, "weights") as bar:
            conversion.export_weights(source, tensors, partial, options.max_shard_size, bar.update)
        end = export_tokenizer(config.data.tokenizer, partial) if has_tokenizer else None
        name = str(stored).removeprefix("torch.")
        llava_next = options.use == "llava-next"
        write_side_files(
            partial, config.model, data, end, name, options.license, facts, options.encoder_only, llava_next
        )
    print(f"wrote {options.output}: {len(tensors)} tensors of {place}, {total / 1e9:.3f} GB")
    if options.verify:
        return _compared(place, config, options.output, encoder_only=options.encoder_only, dtype=dtype)
    return 0


def to_openclip(options: argparse.Namespace) -> int:
    """Write a folder for OpenCLIP."""
    from genlip_megatron.convert import openclip
    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.convert.tokenizer import export_tokenizer
    from genlip_megatron.tokenizer import load_tokenizer

    if options.verify:
        need_open_clip()
    check_target(options.output, options.overwrite, openclip.foreign)
    place, _, source, config = _open_run(options, with_tokenizer=True)
    dtype = DTYPES.get(options.dtype)
    tensors = openclip.planned(source, dtype)
    total = sum(planned.nbytes for planned in tensors.values())
    rows = source.model.vocab_size
    unused = rows - 1 if load_tokenizer(config.data.tokenizer, rows).vocab_size < rows else None
    if unused is None:
        to_stderr("every row of the embedding is a token, so the end token is pad_id: give OpenCLIP text_valid")
    with new_folder(options.output, total, options.overwrite, openclip.foreign) as partial:
        with _bar(total, "weights") as bar:
            openclip.write_weights(source, tensors, partial, bar.update)
        end = export_tokenizer(config.data.tokenizer, partial)
        described = openclip.described_model(source.model, config.data, end, unused)
        openclip.write_side_files(partial, described, config.data)
    print(f"wrote {options.output}: {len(tensors)} tensors of {place}, {total / 1e9:.3f} GB")
    return _compared_openclip(place, config, options.output, None, dtype) if options.verify else 0


def to_megatron(options: argparse.Namespace) -> int:
    """Write a Megatron checkpoint of weights only."""
    from genlip_megatron.convert import conversion, megatron_target, openclip
    from genlip_megatron.convert.hf_folder import hf_config
    from genlip_megatron.convert.source import DTYPES
    from genlip_megatron.convert.staging import check_target, new_folder
    from genlip_megatron.tokenizer import load_tokenizer

    if not options.source.exists():
        raise ValueError(f"{options.source}: no such folder or file")
    is_openclip = openclip.is_openclip(options.source)
    if is_openclip and options.num_attention_heads is not None:
        raise ValueError("--num-attention-heads: OpenCLIP's configuration has the heads. Leave it out.")
    if not is_openclip and options.openclip_config is not None:
        raise ValueError(f"--openclip-config: {options.source} is no checkpoint of OpenCLIP. Leave it out.")
    if options.verify:
        need_open_clip() if is_openclip else need("transformers")
    check_target(options.output, options.overwrite, megatron_target.foreign)
    folder = options.source.parent if options.source.is_file() else options.source
    source: Any
    if is_openclip:
        source = openclip.open_weights(options.source, options.openclip_config, to_stderr)
    else:
        source = conversion.open_released(folder, options.num_attention_heads, "--num-attention-heads")
    dtype = DTYPES.get(options.dtype)
    precision = megatron_target.precision_of(source, dtype)
    tokenizer = options.tokenizer or folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer}: no such file. Name the tokenizer of the weights with --tokenizer")
    fingerprint = load_tokenizer(tokenizer, source.model.vocab_size).fingerprint
    images = source.described.images if is_openclip else None
    config = conversion.recorded_run(folder, source.model, tokenizer, precision, to_stderr, images)
    total = sum(planned.nbytes for planned in conversion.planned(source, dtype, False).values())
    with (
        new_folder(options.output, total + 2**20, options.overwrite, megatron_target.foreign) as partial,
        _bar(total, "weights") as bar,
    ):
        name = megatron_target.write_checkpoint(partial, source, config, dtype, fingerprint, bar.update).name
    print(
        f"wrote {options.output / name}: {len(source.dtypes)} tensors of {options.source}; load with --load --finetune"
    )
    if not options.verify:
        return 0
    if is_openclip:
        return _compared_openclip(options.output / name, config, options.source, options.openclip_config, dtype)
    # The folder's own fields take precedence, so that a misread field shows up in the comparison.
    own = conversion.read_json(options.source / "config.json")
    not_sizes = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
    given = {name: value for name, value in own.items() if value is not None and name not in not_sizes}
    fields = {**hf_config(source.model), **given}
    return _compared(options.output / name, config, options.source, dtype=dtype, fields=fields)


def _compared(*models: Any, **how: Any) -> int:
    """Compare the models by ``compare_models``; 1 if they differ."""
    from genlip_megatron.convert.verify import compare_models

    return _reported(compare_models(*models, **how))


def _compared_openclip(
    checkpoint: Path, config: RunConfig, place: Path, description: Path | None, dtype: torch.dtype | None
) -> int:
    """Compare the models by ``compare_openclip``; 1 if they differ."""
    from genlip_megatron.convert import openclip
    from genlip_megatron.convert.verify import compare_openclip

    described = openclip.read_description(description or openclip.description_file(place))
    return _reported(compare_openclip(checkpoint, config, described, openclip.weights_file(place), dtype))


def _reported(found: list[Difference]) -> int:
    for difference in found:
        print(difference)
    return 0 if all(difference.small for difference in found) else 1


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; user errors exit with status 2 and one line."""
    parser = build_parser()
    options = parser.parse_args(argv)
    return {"to-hf": to_hf, "to-openclip": to_openclip, "to-megatron": to_megatron}[options.command](options)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main())
