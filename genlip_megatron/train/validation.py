"""Validation: the loss of the validation split, and captions of a few images."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor

from genlip_megatron.batch import to_image
from genlip_megatron.command import UserError
from genlip_megatron.device import current_device
from genlip_megatron.infer.generate import generate
from genlip_megatron.log import log
from genlip_megatron.train.forward_backward import forward_backward
from genlip_megatron.train.state import Run

_MAX_NEW_TOKENS = 64  # of a caption


def validate(run: Run) -> None:
    """Validation loss and captions, to the log and the writers. A collective over all ranks."""
    if run.valid_loader is None:
        return
    run.injector.at("validation", run.iteration)
    loss = evaluate(run)
    run.validated = (run.iteration, loss)
    log(f"iteration {run.iteration} | validation loss {loss:.4f}")
    if run.writer is None:
        return
    run.writer.scalars({"lm loss validation": loss}, run.iteration)
    if run.config.log.caption_samples:
        write_captions(run)
        run.watchdog.beat()


def write_captions(run: Run) -> None:
    """Caption the first validation images and write them next to the true captions. A collective over all ranks."""
    loader, writer = run.valid_loader, run.writer
    assert loader is not None and writer is not None
    requests, truths = loader.samples.requests(range(min(run.config.log.caption_samples, len(loader))))
    tokens = generate(run.model, requests, loader.tokenizer.closing_ids[:1], _MAX_NEW_TOKENS)
    for number, (request, truth, ids) in enumerate(zip(requests, truths, tokens, strict=True)):
        assert request.patches is not None
        image = to_image(request.patches.cpu(), request.rows, request.columns)
        text = f"caption: {loader.tokenizer.decode(ids)}\n\ntruth: {truth}"
        writer.caption(number, image, text, run.iteration)


def evaluate(run: Run) -> float:
    """Mean loss of an answer token over ``log.eval_iters`` batches of the validation split. A collective.

    Raises:
        UserError: the batches hold no answer token.
    """
    assert run.valid_loader is not None
    for chunk in run.model:
        chunk.eval()
    batches = iter(run.valid_loader)
    loss = torch.zeros(2, dtype=torch.float64, device=current_device())
    with torch.no_grad():
        for _ in range(run.config.log.eval_iters):
            loss += forward_backward(run, batches, forward_only=True)
            run.watchdog.beat()
    for chunk in run.model:
        chunk.train()
    total, tokens = sum_over_ranks(loss).tolist()
    if not tokens:
        raise UserError("data.valid_data holds no answer token: name other validation shards")
    return total / tokens


def sum_over_ranks(loss: Tensor) -> Tensor:
    """``loss`` summed over data-parallel ranks; the last pipeline stage shares it with the others."""
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return loss
