"""Greedy or sampled captions from a GenLIP model on any layout.

Every step runs the whole packed batch, without a cache: the same code path as training. All ranks call ``generate``
with the same samples; logits come from the last pipeline stage.

Legend: S slots, N samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from genlip_megatron.batch import PATCH_VALUES, PackedBatch, Sample, pack_samples
from genlip_megatron.model.genlip import GenLIP, unwrap


def _pack(samples: Sequence[Sample], multiple: int) -> tuple[PackedBatch, Tensor]:
    """(micro-batch of the samples in one pack, int64 [N]: the slot of each sample's last token)."""
    lengths = [sample.rows * sample.columns + len(sample.token_ids) for sample in samples]
    batch = pack_samples([samples], -(-sum(lengths) // multiple) * multiple)
    if batch.patches is None:
        batch = replace(batch, patches=torch.zeros(1, PATCH_VALUES, dtype=torch.uint8))
    return batch, torch.tensor(lengths).cumsum(0) - 1


def _next_logits(model: list[torch.nn.Module], batch: PackedBatch, rows: Tensor, vocab_size: int) -> Tensor:
    """float32 [N, V] logits of ``rows``, the same on every rank of the model-parallel group."""
    config = unwrap(model[0]).config
    outputs: list[Tensor] = []

    def forward_step(_: object, stage: torch.nn.Module) -> tuple[Tensor, object]:
        genlip: GenLIP = unwrap(stage)
        hidden = genlip.hidden_states(batch)
        if genlip.head is None:
            return hidden, None
        outputs.append(genlip.head.logits(hidden, rows))
        return hidden, lambda out: (out.sum(), torch.ones((), dtype=torch.int), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model),
        model=model,
        # Interleaved stages need at least as many micro-batches as stages, so the same one runs several times.
        num_microbatches=config.pipeline_model_parallel_size if len(model) > 1 else 1,
        seq_length=batch.num_tokens,
        micro_batch_size=1,
        forward_only=True,
    )
    if config.fine_grained_activation_offloading:
        offloading.FineGrainedActivationOffloadingInterface.reset()
    device = rows.device
    logits = outputs[0] if outputs else torch.empty(len(rows), vocab_size, device=device)
    if config.pipeline_model_parallel_size > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(logits, source, group=parallel_state.get_pipeline_model_parallel_group())
    return logits


@torch.no_grad()
def generate(
    model: list[torch.nn.Module],
    requests: Sequence[Sample],
    stop_ids: Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """New tokens of each request, without the stop token.

    Args:
        model: this rank's model chunks, as from ``build_model`` (wrapped or not).
        requests: images with the text to continue, the same on all ranks.
        stop_ids: tokens that end a caption.
        max_new_tokens: limit of each caption.
        temperature: 0 takes the most likely token; above 0 samples with a CPU generator seeded with ``seed``.
    """
    if not requests:
        return []
    genlip = unwrap(model[0])
    device = next(genlip.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    training = model[0].training
    multiple = genlip.config.tensor_model_parallel_size * genlip.config.context_parallel_size
    if genlip.config.fp8:
        multiple *= 16  # alignment of FP8 products
    for chunk in model:
        chunk.eval()
    texts = [list(request.token_ids) for request in requests]
    new: list[list[int]] = [[] for _ in requests]
    active = list(range(len(requests)))
    for _ in range(max_new_tokens):
        extended = [replace(requests[i], token_ids=texts[i]) for i in active]
        batch, ends = _pack(extended, multiple)
        logits = _next_logits(model, batch.to(device), ends.to(device), genlip.model_config.vocab_size).cpu()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator).squeeze(1)
        else:
            chosen = logits.argmax(dim=-1)
        still = []
        for i, token in zip(active, chosen.tolist(), strict=True):
            if token in stop_ids:
                continue
            texts[i].append(token)
            new[i].append(token)
            still.append(i)
        active = still
        if not active:
            break
    for chunk in model:
        chunk.train(training)
    return new
