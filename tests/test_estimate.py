"""The estimate agrees with measured peaks of small runs and with formulas worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from genlip_megatron import estimate as es
from genlip_megatron.config import LINEAR_INPUTS, ParallelConfig, RunConfig, from_dict, override
from genlip_megatron.config.checks import check
from genlip_megatron.config.recipes import load_yaml, recipe_names
from genlip_megatron.estimate.sample import data_parallel_size
from genlip_megatron.model.pipeline import imbalance
from genlip_megatron.model.state_dict import canonical_shapes, parameter_count
from genlip_megatron.testing.distributed import run_distributed
from tools import estimate as tool

GIB = es.GIB


def recipe(name: str, **parallel: Any) -> RunConfig:
    config = from_dict(load_yaml(name), name)
    return replace(config, parallel=replace(config.parallel, **parallel))


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return override(config, {"train.micro_batch_size": size})


_NO_SP = {"sequence_parallel": False}
_TP2_CPU, _PP2_CPU = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
_CP2_CPU = {"context_parallel_size": 2}


def one_module(modules: str, precision: str, ranks: int) -> Any:
    # Without sequence parallelism: gloo's threads free their buffers at random times.
    parallel = {"tensor_model_parallel_size": ranks, "recompute_modules": modules.split(","), **_NO_SP}
    return "recompute inputs", precision, ranks, 1, parallel, 0.01


# The promise is 10%. These estimates were within 3%, so a limit of 4% also finds a small missing part; of 1% where one
# recomputed module saves only a few percent.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision", "ranks", "packs", "parallel", "tolerance"),
    [
        ("activations", "fp32", 1, 1, {}, 0.04),
        ("activations", "bf16", 1, 1, {}, 0.04),
        ("weights", "fp32", 1, 1, {}, 0.04),
        ("weights", "bf16", 1, 1, {}, 0.04),
        ("head", "fp32", 1, 1, {}, 0.04),
        ("head", "bf16", 1, 1, {}, 0.04),
        ("recompute full", "bf16", 1, 1, {}, 0.04),
        ("recompute mlp", "fp32", 1, 1, {}, 0.04),
        ("activations", "fp32", 2, 1, _TP2_CPU, 0.04),
        ("activations", "bf16", 2, 1, {**_TP2_CPU, **_NO_SP}, 0.04),
        ("activations", "fp32", 2, 4, _PP2_CPU, 0.04),
        ("recompute full", "bf16", 2, 1, _TP2_CPU, 0.04),
        ("head", "bf16", 2, 4, _PP2_CPU, 0.04),
        ("activations", "fp32", 2, 1, _CP2_CPU, 0.04),
        ("activations", "bf16", 2, 1, {**_CP2_CPU, "cp_comm_type": "all_gather"}, 0.04),
        ("activations", "bf16", 2, 4, {**_PP2_CPU, "virtual_pipeline_model_parallel_size": 2}, 0.04),
        ("weights", "bf16", 2, 2, {}, 0.04),
        ("activations", "fp32", 2, 2, {"fsdp": True}, 0.04),
        *(
            one_module(modules, precision, ranks)
            for modules in ("layernorm", "mlp_act", "output_gate", "layernorm,mlp,output_gate")
            for precision, ranks in (("fp32", 1), ("bf16", 2))
        ),
    ],
)
def test_estimated_peak_of_the_fullest_rank(
    case: str, precision: str, ranks: int, packs: int, parallel: dict[str, Any], tolerance: float
) -> None:
    config = tool.small_run(case, precision, parallel, packs)
    measured = max(run_distributed(ranks, tool.measured_peak, config))
    assert es.memory(config, ranks, "cpu").total == pytest.approx(measured, rel=tolerance)


_NO_OVERLAP = {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False}
_OVERLAP = dict.fromkeys(_NO_OVERLAP, True)
_TE = {"train.transformer_impl": "transformer_engine"}
_FP8 = {**_TE, "train.fp8": "hybrid"}
_FP8_WEIGHTS = {**_FP8, "train.fp8_primary_weights": True}
_TP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
_CP2, _PP2 = {"parallel.context_parallel_size": 2}, {"parallel.pipeline_model_parallel_size": 2}
_RECOMPUTE = {"parallel.recompute": "selective", "parallel.recompute_modules": ["core_attn", "mlp"]}
_INPUTS = {**_RECOMPUTE, "parallel.recompute_modules": list(LINEAR_INPUTS)}
_WITH_ATTENTION = {**_RECOMPUTE, "parallel.recompute_modules": ["core_attn", *LINEAR_INPUTS]}


@pytest.mark.parametrize(
    ("name", "packs", "ranks", "flags", "measured"),
    [
        ("so16_stage1", 1, 1, {}, 37.84),
        ("so16_stage1", 2, 1, {}, 61.29),
        ("so16_stage1", 4, 1, {}, 108.20),
        ("l16_stage1", 4, 1, {}, 86.46),
        ("g16_stage1", 1, 1, {}, 75.36),
        ("g16_stage1", 4, 1, {"parallel.recompute": "full"}, 41.90),
        ("so16_stage1", 4, 1, _RECOMPUTE, 61.77),
        ("so16_stage1", 4, 1, {"parallel.recompute": "full"}, 22.02),
        ("so16_stage1", 4, 1, _INPUTS, 87.00),
        ("so16_stage1", 4, 1, _WITH_ATTENTION, 69.60),
        ("l16_stage1", 4, 1, _INPUTS, 69.45),
        ("l16_stage1", 4, 1, _WITH_ATTENTION, 55.69),
        ("l16_stage1", 8, 1, _WITH_ATTENTION, 100.49),
        ("g16_stage1", 1, 1, _WITH_ATTENTION, 56.14),
        ("g16_stage1", 2, 1, _WITH_ATTENTION, 83.16),
        ("so16_stage2", 4, 1, _WITH_ATTENTION, 69.50),
        ("so16_stage1", 1, 1, {"parallel.offload_modules": ["core_attn"]}, 30.97),
        ("so16_stage1", 2, 1, _TE, 63.25),
        ("so16_stage1", 2, 1, _FP8, 58.75),
        ("so16_stage1", 2, 1, {**_FP8, "train.fp8_recipe": "current"}, 59.69),
        ("so16_stage1", 2, 1, _FP8_WEIGHTS, 57.88),
        ("so16_stage1", 2, 1, {**_TE, **_WITH_ATTENTION}, 41.90),
        ("so16_stage1", 2, 1, {**_FP8, "train.fp8_recipe": "current", **_WITH_ATTENTION}, 42.76),
        ("so16_stage1", 2, 1, {**_NO_OVERLAP, "parallel.fsdp": True}, 61.08),
        ("so16_stage1", 2, 1, {"train.attention_backend": "flex"}, 58.34),
        ("so16_stage1", 2, 1, {**_NO_OVERLAP, "train.cuda_graph": True}, 66.13),
        ("so16_stage2", 2, 1, {}, 59.90),
        ("so16_stage1", 2, 2, _TP2, 31.07),
        ("so16_stage1", 2, 2, {**_TP2, "parallel.sequence_parallel": False}, 36.79),
        ("so16_stage1", 2, 2, {**_TP2, **_RECOMPUTE}, 19.16),
        ("so16_stage1", 2, 2, {**_TP2, **_WITH_ATTENTION}, 21.34),
        ("g16_stage1", 2, 2, _TP2, 61.26),
        ("g16_stage1", 4, 2, {**_TP2, **_WITH_ATTENTION}, 69.38),
        ("so16_stage1", 2, 2, _CP2, 34.20),
        ("so16_stage1", 2, 2, {**_CP2, "parallel.cp_comm_type": "all_gather"}, 34.19),
        ("so16_stage1", 2, 2, {**_CP2, **_WITH_ATTENTION}, 23.53),
        ("so16_stage2", 2, 2, _CP2, 33.49),
        ("so16_stage1", 2, 2, _PP2, 59.99),
        ("so16_stage1", 2, 2, {**_PP2, "parallel.virtual_pipeline_model_parallel_size": 3}, 69.50),
        ("so16_stage1", 2, 2, {**_PP2, **_WITH_ATTENTION}, 38.56),
        ("so16_stage1", 2, 2, _OVERLAP, 56.72),
        ("so16_stage1", 2, 2, {**_NO_OVERLAP, "parallel.fsdp": True}, 55.31),
        ("so16_stage1", 2, 2, {**_NO_OVERLAP, "parallel.fsdp": True, **_WITH_ATTENTION}, 35.87),
        ("so16_stage1", 2, 2, {**_TP2, **_TE}, 31.99),
        ("so16_stage1", 2, 2, {**_TP2, **_FP8}, 29.74),
        ("so16_stage1", 2, 2, {**_OVERLAP, **_FP8_WEIGHTS}, 53.31),
        ("so16_stage1", 2, 4, {**_TP2, **_PP2}, 30.24),
        ("g16_stage1", 1, 4, {"parallel.pipeline_model_parallel_size": 4}, 56.00),
    ],
)
def test_estimated_peak_on_a_gpu(name: str, packs: int, ranks: int, flags: dict[str, Any], measured: float) -> None:
    """``measured``: peak GiB of torch's allocator in a step of a recipe on the fullest GPU, from
    ``tests/null_gpu/memory.py`` with rendered scenes in the packs."""
    config = override(from_dict(load_yaml(name), name), {**flags, "train.micro_batch_size": packs})
    micro_batches = 2 * config.parallel.pipeline_model_parallel_size
    batch = micro_batches * packs * data_parallel_size(config, ranks)
    found = es.memory(override(config, {"train.global_batch_size": batch}), ranks)
    assert (found.total - found.overhead) / GIB == pytest.approx(measured, rel=0.025)


def test_stages_hold_every_parameter_once() -> None:
    model = recipe("so16_stage1").model
    total = sum(math.prod(shape) for shape in canonical_shapes(model).values())
    assert parameter_count(model) == total
    for stages, chunks in ((1, 1), (4, 1), (4, 2)):
        parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
        assert sum(trained for trained, _ in es.stage_parameters(model, parallel)) == total
    frozen = es.stage_parameters(replace(model, freeze_embeddings=True), ParallelConfig())[0]
    assert frozen == (total - model.vocab_size * model.text_hidden_size, model.vocab_size * model.text_hidden_size)


def test_tensor_parallel_ranks_share_matrices_and_padded_vocabulary() -> None:
    model = replace(recipe("demo").model, vocab_size=511)
    width, inner, layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    # Every rank holds all row-parallel biases, norms, LayerScale, the patch embedding and ln_post.
    replicated = layers * 8 * width + width * (768 + 1) + 2 * width
    shared = layers * (5 * width**2 + 3 * inner * width + 4 * width + 2 * inner) + 2 * 512 * width
    found = es.stage_parameters(model, ParallelConfig(tensor_model_parallel_size=2))
    assert found == [(replicated + shared // 2, 0)]


def test_micro_batches_in_flight() -> None:
    four = ParallelConfig(pipeline_model_parallel_size=4)
    assert [es.in_flight(four, stage, 8, [1.0]) for stage in range(4)] == [4, 3, 2, 1]
    assert es.in_flight(four, 0, 2, [1.0]) == 2
    # Two chunks on two stages: stage 0 runs 2 + 2 chunk passes ahead and holds one more, stage 1 runs 2 ahead.
    two = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert [es.in_flight(two, stage, 8, [1.0, 1.0]) for stage in range(2)] == [5, 3]
    # Micro-batches 0 and 1 are ahead, in both chunks; 2 and 3 enter chunk 0 while the first leaves chunk 1.
    assert es.in_flight(two, 0, 8, [10.0, 1.0]) == 41


def test_time_of_the_run() -> None:
    config = recipe("so16_stage1", overlap_grad_reduce=True, overlap_param_gather=True)
    found = es.estimate(config, 64, es.MACHINES["h100"], 0.45)
    # 8.0 billion samples of 0.8475 TFLOP on 64 GPUs at 45% of 989.5 TFLOP/s: 66 hours.
    assert found.days * 24 == pytest.approx(66.1, abs=0.1)
    assert found.mfu == pytest.approx(0.45)
    slower = es.estimate(recipe("so16_stage1", recompute="full"), 64, es.MACHINES["h100"], 0.45)
    # Blocks and attention of the forward pass, a third of the arithmetic, are recomputed.
    assert slower.recomputed == pytest.approx((0.89 + 0.024) / 3, abs=0.01)
    assert slower.step_seconds / found.step_seconds == pytest.approx(1 + slower.recomputed, rel=0.02)


def test_bubble_and_imbalance() -> None:
    config = with_micro_batch(recipe("so16_stage1", pipeline_model_parallel_size=4), 4)
    assert es.micro_batches(config, 64) == 8
    assert es.bubble_fraction(config, 64) == pytest.approx(3 / 11)
    assert es.bubble_fraction(replace(config, parallel=ParallelConfig()), 64) == 0
    assert 0 < imbalance(config.model, config.parallel) < 0.1


def test_traffic_of_a_step() -> None:
    config = with_micro_batch(recipe("so16_stage1"), 2)
    parameters = es.stage_parameters(config.model, config.parallel)[0][0]
    moved = es.traffic(config, 64)
    assert moved.data_parallel == pytest.approx(parameters * 6 * 63 / 64)
    assert (moved.tensor_parallel, moved.context_parallel, moved.pipeline) == (0, 0, 0)

    hidden = 2 * 16384 * 1152 * 2
    pipeline = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=4))
    # A middle stage sends hidden states forward and their gradients back, for each of 16 micro-batches.
    assert es.traffic(pipeline, 64).pipeline == 16 * 2 * hidden
    context = replace(config, parallel=ParallelConfig(context_parallel_size=2))
    # Query, key, value and output, half of each, forward and backward, in 27 layers and 8 micro-batches.
    assert es.traffic(context, 64).context_parallel == 8 * 27 * 8 * (hidden / 2) / 2
    tensor = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=2))
    # Ten gathers and scatters a layer, one of the embedding and two of the head.
    assert es.traffic(tensor, 64).tensor_parallel == 8 * (10 * 27 + 3) * hidden / 2


def test_time_of_recomputed_linear_inputs() -> None:
    config = override(recipe("so16_stage1"), {**_INPUTS, "train.micro_batch_size": 2, "train.global_batch_size": 64})
    found = es.estimate(config, 8, es.MACHINES["h100"], 0.45)
    # For each of 8 packs of a GPU, in 27 layers: two norms read, write and copy [S, D], the gate reads two such
    # tensors, SwiGLU reads [S, 2F]; two bytes per value.
    tensors = 2 * 4 * 1152 + 5 * 1152 + 5 * 3072
    assert found.recompute_seconds == pytest.approx(8 * 27 * 16384 * 2 * tensors / 3.35e12)
    assert found.recomputed == 0
    with_mlp = override(config, {"parallel.recompute_modules": ["layernorm", "mlp"]})
    mlp = es.estimate(with_mlp, 8, es.MACHINES["h100"], 0.45)
    assert mlp.recompute_seconds == pytest.approx(8 * 27 * 16384 * 2 * 4 * 1152 / 3.35e12)
    none = es.estimate(override(config, {"parallel.recompute": "none"}), 8, es.MACHINES["h100"], 0.45)
    assert found.step_seconds - none.step_seconds == pytest.approx(found.recompute_seconds)


def test_sets_of_modules_trade_memory_for_time_in_order() -> None:
    config = recipe("so16_stage1")
    sets = es.recompute_sets(config)
    trees = [{"parallel.recompute": "selective", "parallel.recompute_modules": modules} for modules in sets]
    for tree in trees:
        check(override(config, tree), 64)
    found = [es.estimate(override(config, tree), 64, es.MACHINES["h100"], 0.45) for tree in trees]
    memories, seconds = ([each.memory.total for each in found], [each.step_seconds for each in found])
    assert memories == sorted(memories, reverse=True) and seconds == sorted(seconds)
    gateless = es.recompute_sets(override(config, {"model.attention_output_gate": "none"}))
    assert len(gateless) == len(sets) and not any("output_gate" in modules for modules in gateless)


def test_sharding_and_recomputation_save_memory() -> None:
    base = es.memory(recipe("g16_stage1"), 64)
    for change in (
        {"tensor_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"recompute": "selective", "recompute_modules": ("mlp",)},
        {"recompute": "full", "recompute_num_layers": 10},
    ):
        assert es.memory(recipe("g16_stage1", **change), 64).activations < 0.85 * base.activations, change
    full = es.memory(recipe("g16_stage1", recompute="full"), 64)
    assert full.total < es.memory(recipe("g16_stage1", recompute="full", recompute_num_layers=10), 64).total
    assert es.memory(recipe("g16_stage1"), 8).optimizer == pytest.approx(8 * base.optimizer)
    sharded = es.memory(recipe("g16_stage1", fsdp=True), 64)
    assert sharded.weights + sharded.gradients == pytest.approx((base.weights * 2 + base.gradients) / 64)
    # One rank needs 16 bytes for a parameter in float32, 18 in bfloat16 with master weights.
    for precision, size in (("fp32", 16), ("bf16", 18)):
        one_rank = es.memory(override(recipe("g16_stage1"), {"train.precision": precision}), 1)
        assert (
            one_rank.weights + one_rank.gradients + one_rank.optimizer
            == size * es.stage_parameters(recipe("g16_stage1").model, ParallelConfig())[0][0]
        )


@pytest.mark.slow
def test_a_layout_that_cannot_fit_is_refused_with_the_nearest_that_does() -> None:
    config = with_micro_batch(recipe("g16_stage1"), 2)
    capacity = 79.1 * GIB
    need = es.memory(config, 64).total
    es.check_fits(config, 64, need, "cuda")
    with pytest.raises(ValueError, match=rf"needs an estimated {need / GIB:.2f} GiB of 79\.10 GiB") as error:
        es.check_fits(config, 64, capacity, "cuda")
    message = str(error.value)
    assert "activations" in message and "the nearest layout that fits: --tp 1 --pp 1 --micro-batch-size 1" in message
    nearest = es.nearest_fit(config, 64, capacity)
    changes = [es.changes(config, layout) for layout in nearest]
    assert changes[0] == 1 and changes == sorted(changes)
    for layout in nearest:
        check(layout, 64)
        assert es.memory(layout, 64).total <= capacity


@pytest.mark.slow
def test_the_proposed_flags_give_the_proposed_layout() -> None:
    stages = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    config = recipe("so16_stage1", context_parallel_size=2, recompute="full", recompute_num_layers=1, **stages)
    for layout in es.nearest_fit(config, 64, 20 * GIB)[:200]:
        flags = es.layout_flags(layout, config)
        words, values = flags.split(), {}
        for name, flag in es.LAYOUT_FLAGS.items():
            if flag in words:
                values[name] = True if flag == "--fsdp" else words[words.index(flag) + 1]
        assert es.memory(override(config, values), 64).total == es.memory(layout, 64).total, flags


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "demo"])
def test_every_recipe_fits_an_h100(name: str) -> None:
    es.check_fits(recipe(name), 64, es.MACHINES["h100"].memory, "cuda")


@pytest.mark.slow
def test_best_layouts_are_sorted_by_speed_and_fit() -> None:
    machine = es.MACHINES["h100"]
    given = recipe("so16_stage1")
    found = es.best_layouts(given, 64, machine, 0.45)
    seconds = [round(e.step_seconds, 6) for e in found]
    assert seconds == sorted(seconds)
    assert all(e.memory.total <= machine.memory for e in found)
    assert es.layout_flags(found[0].config, given) == "--tp 1 --pp 1 --micro-batch-size 2 --recompute none"
