"""A run means the same on every layout, and continues from a checkpoint as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config import RunConfig, from_dict, override
from tests.distributed import run_distributed

STEPS = 6


def tiny_config(data: Path, **flags: Any) -> RunConfig:
    """A model of four layers on the demo's scenes, with DropPath and projections."""
    tree = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "text_hidden_size": 24,
            "vocab_size": 511,
            "rope_sections": [2, 1, 1],
            "drop_path_rate": 0.2,
        },
        "data": {
            "train_data": [f"{data}/train-*.tar"],
            "valid_data": [f"{data}/val-*.tar"],
            "tokenizer": str(data / "tokenizer.model"),
            "image_mode": "native",
            "max_pixels": 16384,
            "seq_length": 512,
            "pack_buffer": 32,
        },
        "train": {"global_batch_size": 4, "train_iters": STEPS, "lr_warmup_iters": 2, "precision": "fp32"},
        "log": {"eval_iters": 2, "caption_samples": 0},
    }
    return override(from_dict(tree, "test"), {name.replace("__", "."): value for name, value in flags.items()})


def run_steps(config: RunConfig, steps: int) -> dict[str, Any]:
    """Train on every rank: losses, gradient norms, sample keys of this rank, final weights of this stage."""
    from megatron.core import parallel_state

    from genlip_megatron.model.genlip import unwrap
    from genlip_megatron.parallel.initial import gather_canonical
    from genlip_megatron.train.loop import save, set_up, train_step
    from genlip_megatron.train.step import evaluate, sum_over_run

    run = set_up(config)
    assert run.train_loader is not None and run.valid_loader is not None
    losses, norms, keys = [], [], []

    taken = iter(run.train_loader)

    def watched() -> Any:
        for batch in taken:
            keys.append(batch.keys)
            yield batch

    batches = watched()
    while run.iteration < steps:
        total, norm, updated = train_step(run, batches)
        assert updated
        run.iteration += 1
        total, count = sum_over_run(total).tolist()
        losses.append(total / count)
        norms.append(norm)
    validation = evaluate(run.stepper, run.valid_loader)
    save(run)
    run.train_loader.close()
    model = unwrap(run.model[0])
    return {
        "losses": losses,
        "norms": norms,
        "validation": validation,
        "keys": keys,
        "data_parallel": parallel_state.get_data_parallel_rank(),
        "weights": gather_canonical(model, dict(model.named_parameters())),
    }


def weights(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: tensor for result in results for name, tensor in result["weights"].items()}


@pytest.fixture(scope="module")
def reference(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run on one process, without an interruption."""
    folder = tmp_path_factory.mktemp("reference")
    return run_distributed(1, run_steps, tiny_config(demo_data, checkpoint__save=str(folder)), STEPS)[0]


LAYOUTS = {
    "DP2": (2, {}),
    "TP2": (2, {"parallel__tensor_model_parallel_size": 2}),
    "TP2 without sequence parallelism": (
        2,
        {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": False},
    ),
    "PP2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "TP2xPP2": (4, {"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}),
    "TP2xDP2": (4, {"parallel__tensor_model_parallel_size": 2}),
    "PP2xDP2": (4, {"parallel__pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_run_on_every_layout(layout: str, reference: dict[str, Any], demo_data: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    results = run_distributed(world_size, run_steps, tiny_config(demo_data, **flags), STEPS)
    for result in results:
        # Sums run in another order: 1e-6 relative in the loss was the most seen.
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert result["validation"] == pytest.approx(reference["validation"], rel=1e-5)
    for name, weight in weights(results).items():
        # Adam divides by the gradient's size: a rounding difference in a tiny gradient moves a weight by up to lr.
        torch.testing.assert_close(weight, reference["weights"][name], atol=1e-3, rtol=1e-3, msg=name)
    by_rank = {result["data_parallel"]: result["keys"] for result in results}
    per_step = len(reference["keys"]) // STEPS
    for step in range(STEPS):
        share = per_step // len(by_rank)
        stream = [keys for rank in sorted(by_rank) for keys in by_rank[rank][step * share : (step + 1) * share]]
        assert stream == reference["keys"][step * per_step : (step + 1) * per_step]


def test_loss_falls(reference: dict[str, Any]) -> None:
    assert reference["losses"][-1] < reference["losses"][0] - 0.01


@pytest.mark.parametrize("layout", ["TP2", "TP2xPP2"])
def test_resume_is_bit_for_bit_on_the_same_layout(layout: str, demo_data: Path, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    whole = run_distributed(world_size, run_steps, tiny_config(demo_data, **flags), STEPS)
    folder = str(tmp_path / "run")
    config = tiny_config(demo_data, **flags, checkpoint__save=folder, checkpoint__load=folder)
    first = run_distributed(world_size, run_steps, config, STEPS // 2)
    second = run_distributed(world_size, run_steps, config, STEPS)
    assert first[0]["losses"] + second[0]["losses"] == whole[0]["losses"]
    assert first[0]["keys"] + second[0]["keys"] == whole[0]["keys"]
    expected = weights(whole)
    for name, weight in weights(second).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_resume_on_another_layout_continues_the_curve(
    layout: str, reference: dict[str, Any], demo_data: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    world_size, flags = LAYOUTS["TP2"]
    config = tiny_config(demo_data, **flags, checkpoint__save=folder)
    run_distributed(world_size, run_steps, config, STEPS // 2)
    world_size, flags = LAYOUTS[layout]
    config = tiny_config(demo_data, **flags, checkpoint__load=folder)
    results = run_distributed(world_size, run_steps, config, STEPS)
    assert results[0]["losses"] == pytest.approx(reference["losses"][STEPS // 2 :], rel=1e-5)


def failing_set_up(config: RunConfig) -> str:
    from genlip_megatron.train.loop import set_up

    try:
        set_up(config)
    except ValueError as error:
        return str(error)
    return "no error"


def test_checkpoint_of_another_model_is_refused(demo_data: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run_distributed(1, run_steps, tiny_config(demo_data, checkpoint__save=folder), 1)
    config = tiny_config(demo_data, checkpoint__load=folder, model__num_layers=3, model__ffn_hidden_size=32)
    message = run_distributed(1, failing_set_up, config)[0]
    assert "model.num_layers: 4 in the checkpoint, 3 here" in message
    assert "model.ffn_hidden_size: 48 in the checkpoint, 32 here" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data__train_data": "/nowhere/*.tar"}, "data.train_data: '/nowhere/*.tar' matches no .tar file"),
        ({"data__tokenizer": "/nowhere.model"}, "no such file; give a tokenizer.json or a SentencePiece .model"),
        ({"model__vocab_size": 64}, "do not fit model.vocab_size = 64"),
        ({"data__seq_length": 40}, "data.seq_length = 40: an image of"),
        ({"data__prompt": "Describe."}, "was made with another prompt than data.prompt = 'Describe.'"),
        ({"checkpoint__load": "/nowhere"}, "checkpoint.load = /nowhere: no checkpoint there"),
        ({"train__global_batch_size": 3, "train__micro_batch_size": 2}, "nearest allowed: 4"),
        ({"parallel__tensor_model_parallel_size": 2}, "world size 1 is not a multiple of tp * pp * cp = 2"),
    ],
)
def test_bad_input_gets_one_clear_error(flags: dict[str, Any], message: str, demo_data: Path) -> None:
    assert message in run_distributed(1, failing_set_up, tiny_config(demo_data, **flags))[0]
