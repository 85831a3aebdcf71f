"""Generated captions of a few validation images, for TensorBoard."""

from __future__ import annotations

from typing import Any

from genlip_megatron.batch import to_image
from genlip_megatron.config import RunConfig
from genlip_megatron.data.loader import Loader
from genlip_megatron.infer.generate import generate

_MAX_NEW_TOKENS = 64


def write_caption_samples(config: RunConfig, model: list[Any], loader: Loader, writer: Any, step: int) -> None:
    """Caption the first validation images and write them next to the true captions. A collective over all ranks."""
    requests, truths = loader.samples.requests(range(min(config.log.caption_samples, len(loader))))
    tokens = generate(model, requests, loader.tokenizer.closing_ids[:1], _MAX_NEW_TOKENS)
    for number, (request, truth, ids) in enumerate(zip(requests, truths, tokens, strict=True)):
        assert request.patches is not None
        image = to_image(request.patches.cpu(), request.rows, request.columns)
        writer.caption(number, image, f"caption: {loader.tokenizer.decode(ids)}\n\ntruth: {truth}", step)
