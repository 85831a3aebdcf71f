"""Segmentation: the score, the sliding window, and nearest patches."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor

from genlip_megatron.evaluate import segment
from genlip_megatron.evaluate.miou import IoU


def test_miou_is_sklearns_jaccard_score_of_all_pixels() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, 3000), rng.integers(0, 5, 3000)
    ignored = rng.random(3000) < 0.1
    iou = IoU(7)  # classes 5 and 6 do not occur, and do not count
    for part in np.array_split(np.arange(3000), 7):
        labels = np.where(ignored, 255, truth)[part]
        iou.add(torch.from_numpy(predicted[part]), torch.from_numpy(labels))
    expected = jaccard_score(truth[~ignored], predicted[~ignored], average="macro")
    assert abs(iou.mean() - expected) < 1e-12


def test_a_constant_map_scores_only_its_class() -> None:
    truth = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    iou = IoU(3)
    iou.add(torch.full((8,), 2), truth)
    assert iou.per_class().tolist() == [0.0, 0.0, 0.5] and iou.mean() == 0.5 / 3


def _pixelwise(images: list[Tensor]) -> Tensor:
    x = torch.stack(list(images))
    return torch.cat([x, x.square()], dim=1)  # 6 classes


def test_one_window_is_the_whole_image_and_windows_of_a_pixelwise_model_agree() -> None:
    pixels = torch.randn(3, 45, 83)
    whole = _pixelwise([pixels])[0]
    assert torch.equal(segment.sliding_logits(_pixelwise, pixels[:, :, :45], 45, 30, 6), whole[:, :, :45])
    torch.testing.assert_close(segment.sliding_logits(_pixelwise, pixels, 32, 21, 6), whole)


def test_logits_are_averaged_where_windows_overlap() -> None:
    calls = iter(range(10))

    def numbered(images: list[Tensor]) -> Tensor:
        return torch.stack([torch.full((1, 4, 4), float(next(calls))) for _ in images])

    assert segment.sliding_logits(numbered, torch.zeros(3, 4, 6), 4, 3, 1)[0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_majority_of_the_nearest_patches_is_brute_force() -> None:
    torch.manual_seed(0)
    keys, labels, queries = torch.randn(50, 4), torch.randint(3, (50,)), torch.randn(6, 4)
    found = segment._majority(keys, labels, queries, 3, chunk=7)
    order = (queries @ keys.T).argsort(dim=1, descending=True)
    for k, votes in zip(segment.NEIGHBOURS, found, strict=True):
        assert votes.tolist() == [int(torch.bincount(labels[row[:k]], minlength=3).argmax()) for row in order]
