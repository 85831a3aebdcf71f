"""The example of an encoder with an LLM trains the right parts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel

FILE = Path(__file__).parent.parent.parent / "examples" / "vlm_connector.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("vlm_connector", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def encoder(exported: Path) -> Any:
    return AutoModel.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32).eval()


def test_random_encoder_suffices_for_colours(example: ModuleType) -> None:
    assert example.main([]) == 1.0


def test_an_encoder_of_native_images_is_refused_in_one_line(
    example: ModuleType, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = tmp_path / "native"
    shutil.copytree(exported, native)
    file = native / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mode": "native"}))
    with pytest.raises(SystemExit):
        example.main(["--encoder", str(native)])
    assert "(image_mode = native), but this example needs images of one size" in capsys.readouterr().err


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_encoder_learns_only_with_train_encoder(example: ModuleType, encoder: Any, train_encoder: bool) -> None:
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    model = example.VisionLanguageModel(encoder, example.small_llm(), train_encoder)
    assert [weight.requires_grad for weight in encoder.parameters()] == [train_encoder] * len(before)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    labels = torch.tensor([[-100, 3, 4], [-100, 5, -100]])
    model(pixels, labels.clamp(min=0), labels).backward()
    projected = model.projector[0].weight.grad
    assert projected is not None and bool(projected.abs().sum() > 0)
    for name, weight in encoder.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == train_encoder, name
    optimizer.step()
    moved = [name for name, weight in encoder.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(moved) == (len(before) if train_encoder else 0)


def test_frozen_encoder_draws_no_drop_path_while_the_rest_trains(example: ModuleType, encoder: Any) -> None:
    model = example.VisionLanguageModel(encoder, example.small_llm()).train()
    pixels, ids = torch.rand(2, 3, 32, 48) * 2 - 1, torch.tensor([[7], [8]])
    assert torch.equal(model.embed(pixels, ids), model.embed(pixels, ids))


def test_every_patch_in_row_order_goes_before_the_text(example: ModuleType, encoder: Any) -> None:
    model = example.VisionLanguageModel(encoder, example.small_llm()).eval()
    pixels, ids = torch.rand(1, 3, 32, 48) * 2 - 1, torch.tensor([[7, 8]])
    with torch.no_grad():
        embeds = model.embed(pixels, ids)
        assert embeds.shape == (1, 2 * 3 + 2, 64)
        torch.testing.assert_close(embeds[:, :6], model.projector(encoder(pixels).last_hidden_state))
        torch.testing.assert_close(embeds[:, 6:], model.llm.get_input_embeddings()(ids))
        # The loss covers only the text; each token is predicted from the one before.
        logits = model.llm(inputs_embeds=embeds).logits[0]
        loss = model(pixels, ids, torch.tensor([[-100, 8]]))
    torch.testing.assert_close(loss, -logits[6].log_softmax(-1)[8])


def test_generated_tokens_are_those_of_greedy_steps(example: ModuleType, encoder: Any) -> None:
    torch.manual_seed(1)
    model = example.VisionLanguageModel(encoder, example.small_llm()).eval()
    pixels, ids = torch.rand(2, 3, 48, 48) * 2 - 1, torch.tensor([[257], [257]])
    got = model.generate(pixels, ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for _ in range(4):
        with torch.no_grad():
            logits = model.llm(inputs_embeds=model.embed(pixels, ids)).logits[:, -1]
        logits[:, example.END] = -torch.inf  # forbidden by min_new_tokens
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, ids[:, 1:])
