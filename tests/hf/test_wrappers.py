"""Adapters, offloading, sharding and quantization of other libraries reach every weight of the exported model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from tests.hf.models import hf_model, images, random_weights, tiny
from tests.hf.test_model import SAME, SHAPES, build, prompts

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

MERGED = 2e-5  # outputs after merging an adapter: other roundings (5.5e-6, of values up to 11)
LAYER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "gate_fc", "fc2")
TEXT = ("embeddings", "in_proj", "proj", "lm_head")
KINDS = ("GenLIPVisionModel", "GenLIPForCausalLM")


def output(model: Any, kind: str) -> Tensor:
    if kind == "GenLIPVisionModel":
        return model(images(*SHAPES)).last_hidden_state
    return model(**prompts(), pixel_values=images(*SHAPES)).logits


def adapted(config: Any, kind: str, model: Any = None) -> Any:
    """A model with an adapter whose random weights change the output."""
    torch.manual_seed(3)
    made = peft.get_peft_model(model or build(kind), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def lora(kind: str, **settings: Any) -> Any:
    task = "CAUSAL_LM" if kind == "GenLIPForCausalLM" else None
    return peft.LoraConfig(r=4, task_type=task, **settings)


CONFIGS = [
    *(("GenLIPVisionModel", {"target_modules": [name]}) for name in (*LAYER, "patch_embedding")),
    *(("GenLIPForCausalLM", {"target_modules": [name]}) for name in ("patch_embedding", *TEXT)),
    *((kind, {"target_modules": "all-linear"}) for kind in KINDS),
    *((kind, {"target_modules": [*LAYER, "patch_embedding"], "use_dora": True}) for kind in KINDS),
    *((kind, {"target_modules": ["q_proj"], "modules_to_save": ["ln_post"]}) for kind in KINDS),
]


@pytest.mark.parametrize(("kind", "settings"), CONFIGS, ids=lambda value: str(value)[:60])
def test_an_adapter_changes_the_output_learns_and_survives_saving_and_merging(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    before = output(build(kind), kind)
    untrained = peft.get_peft_model(build(kind), lora(kind, **settings))
    assert (output(untrained, kind) - before).abs().max() < SAME
    model = adapted(lora(kind, **settings), kind)
    after = output(model, kind)
    assert (after - before).abs().max() > 0.05
    after.square().mean().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(weight.grad is not None and weight.grad.any() for weight in trained.values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert torch.equal(output(again, kind), after)
    assert (output(again.merge_and_unload(), kind) - after).abs().max() < MERGED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("hook", [True, False])
def test_checkpointed_adapters_have_the_same_gradients(kind: str, reentrant: bool, hook: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted(lora(kind, target_modules=["q_proj", "fc1"]), kind).train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the method's name in version 5
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if hook:
                model.enable_input_require_grads()
        output(model, kind).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 8
    for name, expected in gradients[0].items():
        assert expected.any() and torch.equal(gradients[1][name], expected), name


def test_the_hook_of_the_input_embeddings_runs() -> None:
    for kind in KINDS:
        model, runs = build(kind), []
        model.get_input_embeddings().register_forward_hook(lambda *_, runs=runs: runs.append(1))
        output(model, kind)
        assert runs == [1], kind


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "no-cache", "beams"])
def test_embedded_text_gives_the_same_output_and_generates_the_same(options: dict[str, Any]) -> None:
    model, batch = build(), prompts()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    same = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"], "pixel_values": images(*SHAPES)}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, pixel_values=images(*SHAPES), labels=labels)
    found = model(**same, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    tokens = model.generate(**batch, pixel_values=images(*SHAPES), **settings)
    assert torch.equal(model.generate(**same, **settings), tokens[:, batch["input_ids"].shape[1] :])


def test_text_is_given_once_and_attention_weights_are_refused() -> None:
    model, ids = build(), torch.tensor([[5, 6]])
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(1, 2, 32)}):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected exactly one"):
            model(**arguments)
    with pytest.raises(ValueError, match=r"inputs_embeds of shape \[1, 32\]: expected \[B, L, E\]"):
        model(inputs_embeds=torch.zeros(1, 32))
    for call in (lambda **o: model(ids, **o), lambda **o: build("GenLIPVisionModel")(torch.zeros(1, 3, 32, 32), **o)):
        call(output_attentions=False)
        with pytest.raises(ValueError, match="output_attentions = True: packed attention has no matrix"):
            call(output_attentions=True)


def test_a_captioner_with_adapters_generates_like_the_merged_model() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    model = adapted(lora("GenLIPForCausalLM", target_modules="all-linear"), "GenLIPForCausalLM")
    batch = {**prompts(), "pixel_values": images(*SHAPES)}
    found = model.generate(**batch, **settings)
    assert torch.equal(found, model.merge_and_unload().generate(**batch, **settings))
    assert not torch.equal(found, build().generate(**batch, **settings))


def test_a_learned_prompt_generates_the_same_with_and_without_a_cache() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12, token_dim=32)  # more than the text
    model = adapted(config, "GenLIPForCausalLM")
    batch = {**prompts(), "pixel_values": images(*SHAPES)}
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(weight.grad.any() for weight in model.parameters() if weight.requires_grad)


def test_adapters_of_a_bfloat16_model_learn() -> None:
    for kind in KINDS:
        model = build(kind).bfloat16()
        targets = [*LAYER, "patch_embedding", *(TEXT if kind == "GenLIPForCausalLM" else ())]
        made = adapted(lora(kind, target_modules=targets), kind, model)
        output(made, kind).float().square().mean().backward()
        assert all(weight.grad.any() for weight in made.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["cpu", "disk", "mixed"])
def test_offloaded_weights_give_the_same_output(kind: str, place: str, tmp_path: Path) -> None:
    expected = output(build(kind), kind)
    if place == "mixed":
        build(kind).save_pretrained(tmp_path / "model")
        parts = {"vision_embeddings": "disk", "visual": "cpu", "ln_post": "disk"}
        if kind == "GenLIPForCausalLM":
            parts |= {"embeddings": "disk", "in_proj": "cpu", "proj": "disk", "lm_head": "disk"}
        model = type(build(kind)).from_pretrained(
            tmp_path / "model", device_map=parts, offload_folder=tmp_path / "weights"
        )
        assert model.vision_embeddings.patch_embedding.weight.device.type == "meta"
    elif place == "disk":
        model = accelerate.disk_offload(build(kind), tmp_path, execution_device="cpu")
    else:
        model = accelerate.cpu_offload(build(kind), execution_device="cpu")
    assert torch.equal(output(model.eval(), kind), expected)
    if kind == "GenLIPForCausalLM":
        batch = {**prompts(), "pixel_values": images(*SHAPES), "max_new_tokens": 3, "pad_token_id": 0}
        assert torch.equal(model.generate(**batch), build().generate(**batch))


def test_parametrized_and_sharded_and_quantized_weights_are_used() -> None:
    kind = "GenLIPForCausalLM"
    expected = output(build(kind), kind)
    linears = [name for name, part in build(kind).named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    for name in linears:
        model = build(kind)
        part = torch.nn.utils.parametrizations.weight_norm(model.get_submodule(name))
        assert (output(model, kind) - expected).abs().max() < SAME, name
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(1.5)
        assert (output(model, kind) - expected).abs().max() > 0.01, name
    # Some quantizers, such as this one, replace only modules whose type is exactly nn.Linear.
    model = build(kind)
    assert sum(type(part) is nn.Linear for part in model.modules()) == len(linears) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(part) is nn.Linear for part in small.modules())
    assert (output(small, kind) - expected).norm() < 0.1 * expected.norm()  # (0.04)


def test_sharded_modules_give_the_same_output() -> None:
    """FSDP 2 gathers a module's weights in its hooks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for kind in KINDS:
        model = build(kind)
        expected = output(model, kind)
        parts = [model.get_input_embeddings(), model.vision_embeddings, *model.visual.layers, model.ln_post, model]
        for part in parts if kind == "GenLIPVisionModel" else [model.lm_head, *parts]:
            fully_shard(part, mesh=mesh)
        found = output(model, kind)
        assert torch.equal(found, expected)
        found.square().mean().backward()
        assert all(weight.grad is not None for weight in model.parameters())


def test_a_frozen_start_does_not_stop_gradients_of_reentrant_checkpoints() -> None:
    """Without adapters, and without the hook that some trainers set."""
    model = hf_model("GenLIPVisionModel", tiny(), random_weights(tiny())).train()
    model.vision_embeddings.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    output(model, "GenLIPVisionModel").square().mean().backward()
    assert all(weight.grad is not None for weight in model.visual.parameters())


def test_a_larger_vocabulary_keeps_the_old_rows() -> None:
    model = build()
    assert isinstance(model, GenLIPForCausalLM)
    expected = output(model, "GenLIPForCausalLM")
    model.resize_token_embeddings(520)
    found = output(model, "GenLIPForCausalLM")
    assert found.shape[-1] == 520 and (found[..., :512] - expected).abs().max() < SAME
