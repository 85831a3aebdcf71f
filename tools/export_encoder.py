#!/usr/bin/env python3
"""Export the vision encoder of a Hugging Face folder as one graph for images of any size.

    python tools/export_encoder.py FOLDER encoder.onnx    # needs: pip install 'genlip-megatron[onnx]'
    python tools/export_encoder.py FOLDER encoder.pt2     # torch.export; torch.export.load("encoder.pt2").module()

The graph takes ``pixel_values`` float32 [B, 3, height, width], images of one size, normalised as the folder's image
processor does it, with sides that are multiples of 16 and at least 32; others are an error. It gives ``features``
float32 [B, patches, D], row by row, after ``ln_post``. What was written is loaded again and compared with the model on
several sizes before it gets its name: a failure leaves nothing. Weights of an ONNX file lie beside it in FILE.data:
move the two together.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genlip_megatron.config.command_line import StrictParser

if TYPE_CHECKING:
    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

PATCH_SIZE = 16
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE
MAX_BATCH, MAX_SIDE = 4096, 512  # images; patches
CHECKED_SIZES = ((2, 3, 64, 96), (1, 3, 224, 224), (3, 3, 32, 160))
# Of the largest feature; the orders of summation differ.
TOLERANCE = 1e-4


class _OneSizeAttention:
    """Attention within each of ``batch`` images of one size."""

    cache = None

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[N, H, C] from query, key and value [N, H, C]."""
        query, key, value = (x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)


class OneSizeEncoder(nn.Module):
    """The vision model without the steps that depend on values: a graph whose sizes are symbols."""

    def __init__(self, model: GenLIPVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float [B, patches, D] from [B, 3, height, width]."""
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        # A convolution would leave out what is over of a side that is no multiple; this is an error then, in any graph.
        pixels = pixel_values.reshape(batch, channels, rows, PATCH_SIZE, columns, PATCH_SIZE)
        tokens = self.model.vision_embeddings(pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCH_VALUES))
        row = torch.arange(rows, device=tokens.device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=tokens.device).expand(rows, columns).flatten()
        positions = torch.stack((torch.zeros_like(row), row, column)).repeat(1, batch)
        states = self.model.visual(tokens, positions, _OneSizeAttention(batch))
        return self.model.ln_post(states[-1]).unflatten(0, (batch, -1))


class DiffersError(Exception):
    """What was written does not compute what the model does."""


def check_ending(output: Path) -> None:
    """Raise ValueError unless the file's ending is that of a format."""
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{output}: the file's ending says the format; allowed are .onnx and .pt2")


def export_encoder(model: GenLIPVisionModel, output: Path) -> Callable[[Tensor], Tensor]:
    """Write the encoder in float32 and return what was written, loaded again.

    Args:
        model: on the CPU.
        output: a file ending in ``.onnx`` or ``.pt2``.

    Returns:
        A function from ``pixel_values`` float32 [B, 3, height, width] to ``features`` float32 [B, patches, D].

    Raises:
        ValueError: another ending.
        ImportError: an ONNX file without the packages onnx, onnxscript and onnxruntime.
    """
    check_ending(output)
    encoder = OneSizeEncoder(model.float()).eval()
    example = (torch.zeros(CHECKED_SIZES[0]),)
    # An image of one row or column would be traced as a case of its own.
    height, width = (PATCH_SIZE * torch.export.Dim(name, min=2, max=MAX_SIDE) for name in ("rows", "columns"))
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH), 2: height, 3: width}}
    with torch.no_grad():
        if output.suffix == ".pt2":
            torch.export.save(torch.export.export(encoder, example, dynamic_shapes=sizes), output)
            return torch.export.load(output).module()
        try:
            import onnxruntime
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'genlip-megatron[onnx]'") from None

        torch.onnx.export(
            encoder,
            example,
            output,
            input_names=["pixel_values"],
            output_names=["features"],
            dynamic_shapes=sizes,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def worst_difference(model: GenLIPVisionModel, exported: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of any feature on ``CHECKED_SIZES``, relative to the largest feature."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED_SIZES:
        pixels = torch.rand(size, generator=generator) * 2 - 1
        with torch.no_grad():
            expected = model(pixels).last_hidden_state
            worst = max(worst, float((exported(pixels) - expected).abs().max() / expected.abs().max()))
    return worst


def is_own(file: Path, output: Path) -> bool:
    """Whether a file is an export of this tool, or the weights that the export ``output`` names.

    Both formats hold the names of the model's parameters as they are.
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
    """Export a folder's encoder, compare what was written with the model, and put it in its place.

    Everything is written to a hidden folder beside the output first, which is gone afterwards; what a killed process
    left of its own is removed by the next.

    Returns:
        ``worst_difference`` of what was written.

    Raises:
        ValueError: a user's mistake, or an export that failed.
        DiffersError: the graph does not compute what the model does.
    """
    from safetensors import SafetensorError

    from genlip_megatron.convert.staging import hidden_folder
    from genlip_megatron.optional import need_transformers

    check_ending(output)
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise ValueError(f"{output}: it is a folder; name a file")
    data = output.with_name(f"{output.name}.data")
    there = [file for file in (output, data) if os.path.lexists(file)]
    if there and not overwrite:
        names = " and ".join(map(str, there))
        raise ValueError(f"{names}: already there; name another file, or replace it with --overwrite")
    if other := next((file for file in there if not is_own(file, output)), None):
        raise ValueError(f"{other}: --overwrite replaces only what this tool has written; name another file")
    need_transformers()
    from transformers import logging as transformers_logging

    from genlip_megatron.convert.safetensors_file import contents
    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

    transformers_logging.set_verbosity_error()
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there; expected an exported Hugging Face folder")
    contents(Path(folder))  # names a file that is damaged or missing
    try:
        model = GenLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    except (ValueError, OSError, TypeError, SafetensorError) as error:
        name = "" if str(folder) in str(error) else f"{folder}: "
        raise ValueError(name + _first_line(error)) from error
    try:
        with hidden_folder(output) as partial:
            # Of the same name there: an ONNX file names its weights' file.
            written = partial / output.name
            try:
                exported = export_encoder(model, written)
                worst = worst_difference(model, exported)
            except Exception as error:  # exporters have errors of many classes
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
    """Its message up to the first line's end; of an empty one its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if the graph does not compute what the model does, 2 and one line for other errors."""
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
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(arguments)
    try:
        worst = write_encoder(options.folder, options.output, options.overwrite)
    except DiffersError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    sizes = ", ".join("x".join(map(str, size)) for size in CHECKED_SIZES)
    print(f"{options.output}: largest difference {worst:.1e} of the largest feature, images of {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
