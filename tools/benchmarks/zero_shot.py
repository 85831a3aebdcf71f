#!/usr/bin/env python3
"""Zero-shot scores of 100 classes: images per second, and the ratio to recomputing the image for every caption.

    python tools/benchmarks/zero_shot.py                 (24 layers; several minutes on a CPU)
    python tools/benchmarks/zero_shot.py --layers 6      (fewer layers, as the output says)
    python tools/benchmarks/zero_shot.py --device cuda --dtype bf16 --images 64 --baseline-images 4

Both score "a photo of a NAME." for 100 names of one to three random tokens, after an image of 224 x 224 pixels and a
prompt of six tokens, with random weights of L/16 and a vocabulary of 151,936. Their scores are compared, too.

* ours: ``LikelihoodScorer``; image and prompt once for each image, and the texts as a tree of tokens.
* baseline: every caption is a row of a batch that repeats the image, as in OpenCLIP's genlip_zeroshot.py. Unlike there,
  logits are computed only where they predict a caption, which helps the baseline.

Ours is timed before and after the baseline, because the load of a machine changes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.command import command
from genlip_megatron.config import from_dict, load_yaml
from genlip_megatron.config.command_line import StrictParser, check_least
from genlip_megatron.convert.hf_folder import hf_config
from genlip_megatron.convert.source import DTYPES
from genlip_megatron.evaluate.likelihood import LikelihoodScorer
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from genlip_megatron.infer.prepare import Prepared, packed

CLASSES, SIDE, RECIPE = 100, 14, "l16_stage1"
TOLERANCE = {"fp32": 1e-2, "bf16": 2.0, "fp16": 0.5}  # of sums of about eight log-probabilities near -12 each


def build_model(layers: int, device: torch.device, dtype: str) -> Any:
    """L/16 with random weights and ``layers`` layers (0: all of them)."""
    sizes = from_dict(load_yaml(RECIPE), RECIPE).model
    sizes = replace(sizes, num_layers=layers or sizes.num_layers)
    fields = hf_config(sizes)
    torch.manual_seed(0)
    with device:
        model = GenLIPForCausalLM(GenLIPConfig(**{name: value for name, value in fields.items() if name != "dtype"}))
    return model.requires_grad_(False).eval().to(DTYPES[dtype])


def captions(vocabulary: int) -> list[list[int]]:
    """Four shared tokens, a name of one to three tokens, and a full stop."""
    generator = torch.Generator().manual_seed(0)
    names = [torch.randint(100, vocabulary, (1 + i % 3,), generator=generator).tolist() for i in range(CLASSES)]
    return [[1, 2, 3, 4, *name, 5] for name in names]


@torch.inference_mode()
def recomputed(
    model: Any, images: Sequence[Prepared], prompt: Sequence[int], texts: Sequence[Sequence[int]], batch: int
) -> Tensor:
    """float32 [images, texts]: each batch of captions runs the image again in every row."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    valid = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], valid[row, : len(text)] = torch.tensor(text), True
    ids, valid = ids.to(model.device), valid.to(model.device)
    scores = []
    for image in images:
        patches, grid = packed([image], model.device)
        for start in range(0, len(texts), batch):
            chunk, mask = ids[start : start + batch], valid[start : start + batch]
            rows = len(chunk)
            prefix = torch.tensor(prompt, device=model.device).expand(rows, -1)
            logits = model(
                torch.cat((prefix, chunk), dim=1),
                attention_mask=torch.cat((torch.ones_like(prefix), mask.long()), dim=1),
                pixel_values=patches.repeat(rows, 1),
                image_grid_hw=grid.expand(rows, -1),
                logits_to_keep=longest + 1,
            ).logits[:, :-1]
            found = logits.float().log_softmax(dim=-1).gather(2, chunk[:, :, None])[:, :, 0]
            scores.append((found * mask).sum(dim=1).cpu())
    return torch.cat(scores).view(len(images), -1)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """(seconds, scores, which are on the CPU, so a GPU has finished)."""
    start = time.perf_counter()
    scores = run()
    return time.perf_counter() - start, scores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = StrictParser(prog="zero_shot.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--layers", type=int, default=0, help="default: 24, those of L/16")
    parser.add_argument("--images", type=int, default=4, help="of ours, in one batch (default: 4)")
    parser.add_argument("--baseline-images", type=int, default=1, help="one after the other (default: 1)")
    parser.add_argument("--caption-batch", type=int, default=CLASSES, help="rows of the baseline (default: 100)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: cpu)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: torch's)")
    options = parser.parse_args(argv)
    check_least(options, layers=0, images=1, baseline_images=1, caption_batch=1, threads=0)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build_model(options.layers, torch.device(options.device), options.dtype)
    config = model.config
    texts, prompt = captions(config.vocab_size), list(range(10, 16))
    count = max(options.images, options.baseline_images)
    images = [Prepared(i, {}, torch.rand(SIDE * SIDE, 768) * 2 - 1, SIDE, SIDE) for i in range(count)]
    ours, few = images[: options.images], images[: options.baseline_images]
    scorer = LikelihoodScorer(model, prompt, texts)
    timed(lambda: scorer(ours[:1]))  # the first call allocates and starts threads
    before, scores = timed(lambda: scorer(ours))
    slow, expected = timed(lambda: recomputed(model, few, prompt, texts, options.caption_batch))
    after, _ = timed(lambda: scorer(ours))
    same = min(len(ours), len(few))
    worst = (scores[:same] - expected[:same]).abs().max().item()
    if not worst < TOLERANCE[options.dtype]:
        raise RuntimeError(f"the scores differ by {worst}")
    rate, baseline = 2 * len(ours) / (before + after), len(few) / slow
    where = options.device if options.device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    print(
        f"size | {config.num_hidden_layers} layers of L/16 (hidden size {config.hidden_size}) | vocabulary "
        f"{config.vocab_size} | {SIDE * SIDE} image tokens | {CLASSES} classes | {options.dtype} | {where}"
    )
    print(f"largest difference of scores {worst:.1e}, of scores near {expected.mean().item():.0f}")
    print(f"ours {rate:.3g} images/s ({len(ours)} images in {before:.1f} s and {after:.1f} s)")
    print(f"image recomputed for every caption {baseline:.3g} images/s ({len(few)} images in {slow:.1f} s)")
    print(f"ratio {rate / baseline:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
