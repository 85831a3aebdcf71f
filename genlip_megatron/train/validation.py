"""Validation: the loss of the validation split, and captions of a few images."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    losses = evaluate_sets(run)
    loss = mean_loss(losses.values())
    run.validated = (run.iteration, loss)
    sets = run.valid_loader.sets
    by_set = {name: mean_loss([total]) for name, total in losses.items()} if len(sets) > 1 else {}
    seen, size = sum(of_set.samples for of_set in sets), sum(of_set.size for of_set in sets)
    parts = [f"iteration {run.iteration}", f"validation loss {loss:.4f}", f"perplexity {perplexity(loss):.4g}"]
    parts += [f"{name} {of_set:.4f}" for name, of_set in by_set.items()]
    parts += [f"{seen:,} of {size:,} samples (--eval-iters 0: all)"] if seen < size else []
    log(" | ".join(parts))
    if run.writer is None:
        return
    values = {"lm loss validation": loss, "lm loss validation ppl": perplexity(loss)}
    values |= {f"lm loss validation/{name}": of_set for name, of_set in by_set.items()}
    run.writer.scalars(values, run.iteration)
    if run.config.log.caption_samples:
        write_captions(run)
        run.watchdog.beat()


def perplexity(loss: float) -> float:
    """Perplexity of an answer token; as in Megatron-LM, losses above 20 count as 20."""
    return math.exp(min(20.0, loss))


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
    """Mean loss of an answer token of the validation split. A collective; see ``evaluate_sets``."""
    return mean_loss(evaluate_sets(run).values())


def evaluate_sets(run: Run) -> dict[str, tuple[float, float]]:
    """{name: (sum of losses, answer tokens)} of each validation set. A collective.

    Each sample of a set counts once. ``log.eval_iters`` limits this to its number of global batches of each set.
    """
    assert run.valid_loader is not None
    for chunk in run.model:
        chunk.eval()
    batches, losses = iter(run.valid_loader), {}
    with torch.no_grad():
        for of_set in run.valid_loader.sets:
            loss = torch.zeros(2, dtype=torch.float64, device=current_device())
            for _ in range(of_set.steps):
                loss += forward_backward(run, batches, forward_only=True)
                run.watchdog.beat()
            total, tokens = sum_over_ranks(loss).tolist()
            losses[of_set.name] = (total, tokens)
    for chunk in run.model:
        chunk.train()
    return losses


def mean_loss(losses: Iterable[tuple[float, float]]) -> float:
    """Mean loss of an answer token, from sums of losses with their numbers of answer tokens.

    Raises:
        UserError: there is no answer token.
    """
    total, tokens = map(sum, zip(*losses, strict=True))
    if not tokens:
        raise UserError("data.valid_data holds no answer token: name other validation shards")
    return total / tokens


def sum_over_ranks(loss: Tensor) -> Tensor:
    """``loss`` summed over data-parallel ranks; the last pipeline stage shares it with the others."""
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return loss
