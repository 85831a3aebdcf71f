#!/usr/bin/env python3
"""Export the vision encoder of a Hugging Face folder as one graph for images of any size.

    python tools/export_encoder.py FOLDER encoder.onnx    # needs: pip install '.[onnx]' in the checkout
    python tools/export_encoder.py FOLDER encoder.pt2     # torch.export; torch.export.load("encoder.pt2").module()

Input: ``pixel_values`` float32 [B, 3, height, width], images of equal size, normalised by the folder's image processor;
sides are multiples of 16 and at least 32. Output: ``features`` float32 [B, patches, D], row by row, after ``ln_post``.
Before the file gets its name, it is loaded again and compared with the model on several sizes; a failure leaves
nothing. The weights of an ONNX file are in FILE.data beside it: move both together.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.integrations.encoder_graph import CHECKED_SIZES, TOLERANCE, export_encoder, worst_difference
from genlip_megatron.log import to_stderr


class DiffersError(Exception):
    """The written graph does not compute what the model computes."""


def is_own(file: Path, output: Path) -> bool:
    """Whether ``file`` is an export of this tool, or the weights file that the export ``output`` names.

    Both formats contain the names of the model's parameters in plain bytes.
    """
    if not output.is_file() or not file.is_file():
        return False
    with open(output, "rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            return False
        names = [b"vision_embeddings", b"pixel_values"] + ([file.name.encode()] if file != output else [])
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(name) >= 0 for name in names)


def write_encoder(folder: str, output: Path, overwrite: bool) -> float:
    """Export a folder's encoder to a hidden folder, compare it with the model, and move it into place.

    Returns:
        ``worst_difference`` of the written graph.

    Raises:
        ValueError: a setting or file is wrong, or the export failed.
        DiffersError: the graph does not compute what the model computes.
    """
    from safetensors import SafetensorError

    from genlip_megatron.convert.staging import hidden_folder
    from genlip_megatron.optional import need

    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{output}: the ending selects the format. Allowed are .onnx and .pt2.")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: no folder {output.parent}. Create it first.")
    if output.is_dir():
        raise ValueError(f"{output}: it is a folder. Name a file.")
    data = output.with_name(f"{output.name}.data")
    there = [file for file in (output, data) if os.path.lexists(file)]
    if there and not overwrite:
        names = " and ".join(map(str, there))
        raise ValueError(f"{names}: already exists. Name another file, or replace it with --overwrite.")
    if other := next((file for file in there if not is_own(file, output)), None):
        raise ValueError(f"{other}: --overwrite replaces only files that this tool wrote. Name another file.")
    need("transformers")
    from transformers import logging as transformers_logging

    from genlip_megatron.convert.safetensors_file import contents
    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

    transformers_logging.set_verbosity_error()
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json. Name an exported Hugging Face folder.")
    contents(Path(folder))  # raises for a damaged or missing file, and names it
    try:
        model = GenLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    except (ValueError, OSError, TypeError, SafetensorError) as error:
        name = "" if str(folder) in str(error) else f"{folder}: "
        raise ValueError(name + _first_line(error)) from error
    try:
        with hidden_folder(output) as partial:
            # Under its final name, because an ONNX file contains the name of its weights file.
            written = partial / output.name
            try:
                exported = export_encoder(model, written)
                worst = worst_difference(model, exported)
            except Exception as error:  # exporters raise errors of many classes
                raise ValueError(f"{output}: the export failed: {_first_line(error)}") from error
            if not worst <= TOLERANCE:
                raise DiffersError(
                    f"{output}: differs from the model by {worst:.1e} of the largest feature, more than "
                    f"{TOLERANCE:.0e}; nothing was written"
                )
            for file, target in ((written.with_name(data.name), data), (written, output)):
                if file.exists():
                    os.replace(file, target)
                else:
                    target.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{output}: could not be written: {_first_line(error)}") from error
    return worst


def _first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns 1 if the graph differs from the model, 2 after any other user error."""
    heading, _, rest = (__doc__ or "").partition("\n")
    parser = StrictParser(
        prog="export_encoder.py",
        description=heading,
        epilog=rest,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="an exported Hugging Face folder")
    parser.add_argument("output", type=Path, help="FILE.onnx or FILE.pt2")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    options = parser.parse_args(arguments)
    try:
        worst = write_encoder(options.folder, options.output, options.overwrite)
    except DiffersError as error:
        to_stderr(f"{parser.prog}: error: {error}")
        return 1
    sizes = ", ".join("x".join(map(str, size)) for size in CHECKED_SIZES)
    print(f"{options.output}: largest difference {worst:.1e} of the largest feature, images of {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
