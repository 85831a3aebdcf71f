"""Which layers stand on which pipeline stage (pure)."""

from __future__ import annotations

from genlip_megatron.config import ModelConfig

# Share of a stage-1 sample's tokens that are answer rows: 68 of 270.
_ANSWER_SHARE = 0.25


def head_cost_in_layers(model: ModelConfig) -> float:
    """Arithmetic of the LM head, in layers: 2 E V per answer row against 2 (5 D^2 + 3 D F) per token.

    The head's backward pass makes its logits again, which counts as a third more.
    """
    width, inner = model.hidden_size, model.ffn_hidden_size
    layer = 5 * width**2 + 3 * width * inner
    return _ANSWER_SHARE * model.text_hidden_size * model.vocab_size * (4 / 3) / layer


def layers_per_stage(model: ModelConfig, stages: int) -> list[int]:
    """Layers of each stage so that the slowest stage, head included, is as fast as can be.

    Any number of layers works, so ``--pp 4`` splits the 27 layers of so16. Every stage holds at least one layer.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > model.num_layers:
        raise ValueError(
            f"pipeline_model_parallel_size = {stages}: more stages than model.num_layers = {model.num_layers}"
        )
    head = head_cost_in_layers(model)
    best: list[int] = []
    best_cost = (float("inf"), 0.0)
    for last in range(1, model.num_layers - stages + 2):
        others = model.num_layers - last
        if stages == 1:
            return [model.num_layers]
        base, extra = divmod(others, stages - 1)
        # Middle stages take the odd layers: the first also embeds.
        counts = [base + (1 if i >= stages - 1 - extra else 0) for i in range(stages - 1)] + [last]
        slowest = max(*counts[:-1], last + head)
        cost = (slowest, abs(base - last - head))
        if cost < best_cost:
            best, best_cost = counts, cost
    return best


def pipeline_layout(model: ModelConfig, stages: int) -> list[list[str]]:
    """The split as Megatron-Core's pipeline layout: one list of layer types per stage."""
    layout = [["decoder"] * count for count in layers_per_stage(model, stages)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
