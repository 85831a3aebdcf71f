#!/usr/bin/env python3
"""Export the vision encoder of a Hugging Face folder as one graph for images of any size.

    python tools/export_encoder.py FOLDER encoder.onnx    # needs: pip install onnx onnxscript onnxruntime
    python tools/export_encoder.py FOLDER encoder.pt2     # torch.export; torch.export.load("encoder.pt2").module()

The graph takes ``pixel_values`` float32 [B, 3, height, width], images of one size, normalised as the folder's image
processor does it, with sides that are multiples of 16 and at least 32. It gives ``features`` float32 [B, patches, D],
row by row, after ``ln_post``. What was written is loaded again and compared with the model on several sizes before the
tool ends. Weights of an ONNX file lie beside it in FILE.data: move the two together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import logging as transformers_logging

from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

PATCH_SIZE = 16
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
        tokens = self.model.vision_embeddings.patch_embedding(pixel_values)  # [B, D, rows, columns]
        batch, _, rows, columns = tokens.shape
        row = torch.arange(rows, device=tokens.device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=tokens.device).expand(rows, columns).flatten()
        positions = torch.stack((torch.zeros_like(row), row, column)).repeat(1, batch)
        tokens = tokens.flatten(2).transpose(1, 2).flatten(0, 1)
        states = self.model.visual(tokens, positions, _OneSizeAttention(batch))
        return self.model.ln_post(states[-1]).unflatten(0, (batch, -1))


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
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{output}: the file's ending says the format; allowed are .onnx and .pt2")
    encoder = OneSizeEncoder(model.float()).eval()
    example = (torch.zeros(CHECKED_SIZES[0]),)
    # An image of one row or column would be traced as a case of its own.
    height, width = (PATCH_SIZE * torch.export.Dim(name, min=2, max=MAX_SIDE) for name in ("rows", "columns"))
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH), 2: height, 3: width}}
    with torch.no_grad():
        if output.suffix == ".pt2":
            torch.export.save(torch.export.export(encoder, example, dynamic_shapes=sizes), output)
            return torch.export.load(output).module()
        import onnxruntime

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 1 if the graph does not compute what the model does."""
    heading, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=heading, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="an exported Hugging Face folder")
    parser.add_argument("output", type=Path, help="FILE.onnx or FILE.pt2")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    try:
        model = GenLIPVisionModel.from_pretrained(options.folder, dtype=torch.float32).eval()
        exported = export_encoder(model, options.output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    worst = worst_difference(model, exported)
    sizes = ", ".join("x".join(map(str, size)) for size in CHECKED_SIZES)
    print(f"{options.output}: largest difference {worst:.1e} of the largest feature, images of {sizes}")
    if not worst <= TOLERANCE:
        sys.exit(f"{options.output}: more than {TOLERANCE:.0e}; do not use this file")


if __name__ == "__main__":
    main()
