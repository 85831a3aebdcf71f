"""The vision encoder as one graph for images of any size, as ``torch.export`` (``.pt2``) or ONNX (``.onnx``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genlip_megatron.hf.shared_genlip import PATCH_SIZE, PATCH_VALUES

if TYPE_CHECKING:
    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

MAX_BATCH, MAX_SIDE = 4096, 512  # images; patches
CHECKED_SIZES = ((2, 3, 64, 96), (1, 3, 224, 224), (3, 3, 32, 160))
# Relative to the largest feature; the graph sums in another order than the model.
TOLERANCE = 1e-4


class _OneSizeAttention:
    """Attention within each of ``batch`` images of equal size."""

    cache = None

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[N, H, C] from query, key and value [N, H, C]."""
        query, key, value = (x.unflatten(0, (self.batch, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)


class OneSizeEncoder(nn.Module):
    """The vision model without data-dependent steps, so that all sizes stay symbolic in the graph."""

    def __init__(self, model: GenLIPVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float [B, patches, D] from [B, 3, height, width]."""
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        # A convolution would silently crop a side that is no multiple of 16; this reshape fails in every graph.
        pixels = pixel_values.reshape(batch, channels, rows, PATCH_SIZE, columns, PATCH_SIZE)
        tokens = self.model.vision_embeddings(pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCH_VALUES))
        row = torch.arange(rows, device=tokens.device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=tokens.device).expand(rows, columns).flatten()
        positions = torch.stack((torch.zeros_like(row), row, column)).repeat(1, batch)
        states = self.model.visual(tokens, positions, _OneSizeAttention(batch))
        return self.model.ln_post(states[-1]).unflatten(0, (batch, -1))


def export_encoder(model: GenLIPVisionModel, output: Path) -> Callable[[Tensor], Tensor]:
    """Write the encoder in float32, load the file again, and return it as a function.

    Args:
        model: on the CPU.
        output: a file ending in ``.onnx`` or ``.pt2``.

    Returns:
        A function from ``pixel_values`` float32 [B, 3, height, width] to ``features`` float32 [B, patches, D].

    Raises:
        ImportError: an ONNX file needs the packages onnx, onnxscript and onnxruntime.
    """
    encoder = OneSizeEncoder(model.float()).eval()
    example = (torch.zeros(CHECKED_SIZES[0]),)
    # torch.export specialises sizes of 0 and 1, so images of a single row or column are left out.
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
            raise ImportError(f"{error}. Run pip install '.[onnx]' in the checkout.") from None

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
    """The largest difference on images of ``CHECKED_SIZES``, relative to the largest feature."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED_SIZES:
        pixels = torch.rand(size, generator=generator) * 2 - 1
        with torch.no_grad():
            expected = model(pixels).last_hidden_state
            worst = max(worst, float((exported(pixels) - expected).abs().max() / expected.abs().max()))
    return worst
