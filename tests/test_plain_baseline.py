"""The plain model, baseline of the speed figures, equals the authors' class on the golden tensors.

Float32 on CPU; tolerances are several times the worst measured difference, which is rounding.
"""

from __future__ import annotations

from pathlib import Path

import plain
import pytest
import torch
from torch import Tensor

from genlip_megatron.testing.golden import load_golden

ATOL_LOGITS = 4e-5


def padded(golden: dict[str, Tensor]) -> tuple[object, list[tuple[int, int, int]]]:
    """(PaddedBatch, [(row, start, end)]): the separate samples of the golden rows."""
    patches, tokens, labels, grids, places = [], [], [], [], []
    pixels, image_grids = golden["inputs/pixel_values"], golden["inputs/image_grid_thw"].tolist()
    for row, ids in enumerate(golden["inputs/sample_ids"]):
        valid = golden["inputs/valid"][row]
        for sample in ids[valid].unique_consecutive():
            slots = ((ids == sample) & valid).nonzero().squeeze(1)
            start, end = int(slots[0]), int(slots[-1]) + 1
            assert end - start == len(slots)
            images = int(golden["inputs/image_mask"][row, start:end].sum())
            height, width = 0, 0
            if images:
                _, height, width = image_grids.pop(0)
            assert height * width == images
            patches.append(pixels[:images])
            pixels = pixels[images:]
            tokens.append(golden["inputs/input_ids"][row, start + images : end])
            labels.append(torch.cat((golden["inputs/labels"][row, start + 1 : end], torch.tensor([plain.IGNORE]))))
            grids.append((height, width))
            places.append((row, start, end))
    assert len(pixels) == 0 and not image_grids
    return plain.collate(patches, tokens, labels, grids), places


@pytest.mark.parametrize("head", ["all", "answer"])
def test_plain_model_equals_the_authors(golden_file: Path, head: str) -> None:
    config, golden = load_golden(golden_file)
    model = plain.PlainGenLIP(config)
    model.load_state_dict({name[8:]: value for name, value in golden.items() if name.startswith("weights/")})
    batch, places = padded(golden)
    for sample, (row, start, end) in enumerate(places):
        positions = batch.position_ids[:, sample, : end - start]
        assert torch.equal(positions, golden["inputs/position_ids"][row, :, start:end])
    logits = model.logits(model.features(batch))
    for sample, (row, start, end) in enumerate(places):
        expected = golden["outputs/logits"][row, start:end]
        torch.testing.assert_close(logits[sample, : end - start], expected, rtol=0, atol=ATOL_LOGITS)

    loss = model(batch, head=head)
    assert loss.item() == pytest.approx(golden["outputs/loss"].item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grads/{name}"]
        error = ((parameter.grad - expected).norm() / expected.norm()).item()
        assert error < 3e-5, (name, error)
