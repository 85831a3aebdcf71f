"""What tools that run a GenLIP on images share: flags, model, images, progress bar.

Imports of torch and transformers wait until a tool needs them, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.log import to_stderr
from genlip_megatron.optional import need

if TYPE_CHECKING:
    from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
    from genlip_megatron.infer.inputs import Inputs
    from genlip_megatron.infer.load import Loaded


def build_parser(prog: str, doc: str, output: str = "", load: str = "") -> StrictParser:
    """The shared flags.

    Args:
        prog: name of the tool.
        doc: its module docstring.
        output: what the output folder holds, which adds ``--overwrite``; "" for a tool that writes one JSON Lines
            file.
        load: help of ``--load`` of a tool that compares several models; "": it takes one.
    """
    summary, _, rest = doc.partition("\n")
    parser = StrictParser(
        prog=prog,
        description=summary,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, indexed .tar shards, folders, or globs")
    text = load or "folder of a run, of one checkpoint, or an exported folder"
    parser.add_argument("--load", required=True, nargs="+" if load else None, help=text)
    parser.add_argument("--limit", type=int, default=0, help="use only the first N images (default: 0, all)")
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, a GPU if there is one)")
    text = "dtype to compute in: fp32, bf16, fp16, or auto (default: the dtype of the stored weights)"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    add_image_flags(parser)
    if not output:
        parser.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
        return parser
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {output} that an earlier call wrote")
    return parser


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of image sizes, which ``image_flags`` reads."""
    parser.add_argument("--image-mode", choices=("fixed", "native"), help="default: as the model was trained")
    parser.add_argument("--image-size", type=int, help="fixed mode: side in pixels, a multiple of 16")
    parser.add_argument("--min-pixels", type=int, help="native mode: smallest area in pixels")
    parser.add_argument("--max-pixels", type=int, help="native mode: largest area in pixels")


def image_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of image sizes for ``override_images``; a tool without them has none."""
    names = ("image_mode", "image_size", "min_pixels", "max_pixels")
    return {name: getattr(options, name, None) for name in names}


def add_tokenizer(parser: StrictParser) -> None:
    """``--tokenizer``, for tools that write or read text."""
    text = "the model's tokenizer file, if it was moved after the training"
    parser.add_argument("--tokenizer", default="", help=text)


def open_images(options: argparse.Namespace) -> Inputs:
    """The images of the command line.

    Raises:
        ValueError: transformers is not installed, or an input names no image.
    """
    need("transformers")
    from genlip_megatron.infer.inputs import Inputs

    return Inputs(options.inputs, options.limit)


def load_model(options: argparse.Namespace, encoder_only: bool = False) -> tuple[Loaded, GenLIPImageProcessor]:
    """(the model of ``--load``, its image processor with the flags of image sizes applied).

    Raises:
        ValueError: the model cannot be loaded, or a flag does not fit it.
    """
    from genlip_megatron.infer.load import load, override_images, pick_device

    loaded = load(
        options.load,
        to_stderr,
        encoder_only=encoder_only,
        device=pick_device(options.device),
        dtype=options.dtype,
        tokenizer=getattr(options, "tokenizer", ""),
    )
    return loaded, override_images(loaded.image_processor, image_flags(options))


def progress_bar(images: Sized, what: str) -> Any:
    """A progress bar over images, on standard error."""
    from tqdm import tqdm

    return tqdm(total=len(images), desc=what, unit="image", file=sys.stderr)
