"""The Hugging Face model equals the authors', and generates the same with and without a cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, pack_images
from genlip_megatron.model.state_dict import canonical_shapes
from tests.hf.models import golden_inputs, golden_model, hf_model, images, random_weights, tiny

# Absolute, float32 on CPU; the worst difference measured is in brackets.
OUTPUTS = 2e-5  # logits (6.5e-6), features (2.9e-6), hidden states (5.5e-6), loss (4.8e-7)
GRADIENT = 3e-5  # norm of the difference relative to the tensor's norm (5.5e-6)
SAME = 2e-5  # the same sums in another order (2.9e-6, of logits up to 11)

SHAPES = [(2, 3), (1, 1), (4, 2), (2, 3)]


def build(kind: str = "GenLIPForCausalLM", **changes: Any) -> Any:
    model = tiny(**changes)
    return hf_model(kind, model, random_weights(model))


def prompts(lengths: tuple[int, ...] = (3, 5, 1, 3), side: str = "left") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 512, (length,), generator=generator) for length in lengths]
    return {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        for name, rows in (("input_ids", ids), ("attention_mask", [torch.ones_like(row) for row in ids]))
    }


def row_of(batch: dict[str, Tensor], row: int) -> Tensor:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_and_gradients_equal_the_authors(golden_file: Path, side: str) -> None:
    model, golden = golden_model(golden_file)
    inputs, is_text = golden_inputs(golden, side)
    output = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].bool()
    expected = golden["outputs/logits"][is_text]
    assert (output.logits[mask] - expected).abs().max() < OUTPUTS and expected.abs().max() > 0.1
    assert not output.logits[~mask].any()
    for layer, hidden in enumerate(output.hidden_states[1:]):
        assert (hidden - golden[f"outputs/layers.{layer}"][golden["inputs/valid"]]).abs().max() < OUTPUTS
    assert abs(output.loss - golden["outputs/loss"]) < OUTPUTS
    output.loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = golden[f"grads/{name}"]
        assert (parameter.grad - expected).norm() < GRADIENT * expected.norm(), name
        compared += 1
    assert compared == sum(name.startswith("grads/") for name in golden)


def test_features_and_patch_readout_equal_the_authors(golden_file: Path) -> None:
    model, golden = golden_model(golden_file, "GenLIPVisionModel")
    whole, _ = golden_model(golden_file)
    patches, grid = golden["vision/pixel_values"].flatten(1), golden["vision/grid"][:, 1:]
    with torch.no_grad():
        features = model(patches, grid).last_hidden_state
        assert (features - golden["vision/ln_post"]).abs().max() < OUTPUTS
        assert (whole.read_out(features) - golden["vision/patch_logits"]).abs().max() < OUTPUTS


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_the_authors(golden_file: Path, use_cache: bool) -> None:
    model, golden = golden_model(golden_file)
    grid = golden["generation/grid"][:, 1:]
    prompt = golden["generation/prompt_ids"][:, int(grid.prod()) :]
    output = model.generate(
        input_ids=prompt,
        pixel_values=golden["generation/pixel_values"].flatten(1),
        image_grid_hw=grid,
        max_new_tokens=len(golden["generation/tokens"]),
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[0, prompt.shape[1] :], golden["generation/tokens"])
    assert (torch.cat(output.logits) - golden["generation/step_logits"]).abs().max() < OUTPUTS


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(side: str) -> None:
    model, batch = build(), prompts(side=side)
    pictures = images(*SHAPES)
    with torch.no_grad():
        together = model(**batch, pixel_values=pictures).logits
        last = model(**batch, pixel_values=pictures, logits_to_keep=2).logits
        assert last.shape[1] == 2 and (last - together[:, -2:]).abs().max() < SAME
        column = model(**batch, pixel_values=pictures, logits_to_keep=torch.tensor([1])).logits
        assert (column[:, 0] - together[:, 1]).abs().max() < SAME
        for row in range(4):
            single = model(row_of(batch, row), pixel_values=[pictures[row]]).logits[0]
            assert (together[row][batch["attention_mask"][row].bool()] - single).abs().max() < SAME
            assert single.abs().max() > 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams-returned", "top-p", "top-k"],
)
def test_generation_is_the_same_with_and_without_a_cache(options: dict[str, Any]) -> None:
    model, batch = build(), prompts()
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            model.generate(
                **batch,
                pixel_values=images(*SHAPES),
                max_new_tokens=8,
                use_cache=use_cache,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        )
    results = [output.sequences for output in outputs]
    assert torch.equal(*results)
    for ours, expected in zip(*(output.logits for output in outputs), strict=True):
        assert (ours - expected).abs().max() < SAME
    new = results[0][:, batch["input_ids"].shape[1] :]
    assert new.unique().numel() > 8, "too few different tokens to compare"
    if not options.get("do_sample"):
        count = options.get("num_return_sequences", 1)
        for row in range(4):
            prompt = row_of(batch, row)
            single = model.generate(
                input_ids=prompt, pixel_values=[images(*SHAPES)[row]], max_new_tokens=8, pad_token_id=0, **options
            )
            assert torch.equal(single[:, prompt.shape[1] :], new[row * count : (row + 1) * count])


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        ("right", {}, "Pad on the left"),
        ("right", {"use_cache": False}, "Pad on the left"),
        ("right", {"num_beams": 2}, "Pad on the left"),
        ("left", {"output_attentions": True}, "output_attentions = True: packed attention has no matrix"),
        ("left", {"cache_implementation": "static"}, "images need a DynamicCache"),
    ],
)
def test_unsupported_generation_is_refused(side: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().generate(
            **prompts(side=side), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True, **options
        )


def test_every_form_of_images_generates_the_same() -> None:
    model, batch = build(), prompts()
    same_size = images((2, 3), (2, 3), (2, 3), (2, 3))
    patches, grid = pack_images(same_size)
    results = [
        model.generate(**batch, **pictures, max_new_tokens=4, num_beams=2, pad_token_id=0)
        for pictures in (
            {"pixel_values": same_size},
            {"pixel_values": torch.stack(same_size)},
            {"pixel_values": patches, "image_grid_hw": grid},
        )
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_stop_token_ends_only_its_row() -> None:
    model, batch = build(), prompts()
    free = model.generate(**batch, pixel_values=images(*SHAPES), max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = free[:, batch["input_ids"].shape[1] :]
    stop = int(new[1, 3])
    ended = model.generate(
        **batch, pixel_values=images(*SHAPES), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[stop]
    )[:, batch["input_ids"].shape[1] :]
    for row in range(4):
        hits = (new[row] == stop).nonzero()
        end = int(hits[0]) + 1 if len(hits) else new.shape[1]
        assert torch.equal(ended[row, :end], new[row, :end]) and not ended[row, end:].any()


def test_a_cache_continues_with_several_tokens_and_with_text_only() -> None:
    model = build()
    ids = prompts((6, 6))["input_ids"]
    for pictures in (images((2, 3), (3, 1)), None):
        grid = None if pictures is None else torch.tensor([[2, 3], [3, 1]])
        with torch.no_grad():
            whole = model(ids, pixel_values=pictures).logits
            first = model(ids[:, :2], pixel_values=pictures, use_cache=True)
            cache = first["cache" if "cache" in first else "past_key_values"]
            rest = model(ids[:, 2:], image_grid_hw=grid, past_key_values=cache)
        assert (torch.cat((first.logits, rest.logits), dim=1) - whole).abs().max() < SAME


def test_a_cache_that_lacks_tokens_is_refused() -> None:
    """For example a cache cropped to the length of the text."""
    model, ids, grid = build(), prompts((6, 6))["input_ids"], torch.tensor([[2, 3], [3, 1]])
    first = model(ids[:, :5], pixel_values=images((2, 3), (3, 1)), use_cache=True)
    cache = first["cache" if "cache" in first else "past_key_values"]
    message = "a cache of {} tokens and 1 new ones.*Remove prompt_lookup_num_tokens"
    for arguments in ({"attention_mask": torch.ones(2, 6)}, {"image_grid_hw": 2 * grid}):
        with pytest.raises(ValueError, match=message.format(11)):
            model(ids[:, 5:], past_key_values=cache, **{"attention_mask": torch.ones(2, 6), **arguments})
    cache.crop(-6)
    with pytest.raises(ValueError, match=message.format(5)):
        model(ids[:, 5:], image_grid_hw=grid, past_key_values=cache, attention_mask=torch.ones(2, 6))


@pytest.mark.parametrize("shape", [(4, 6), (1, 1)])
def test_assisted_generation_is_greedy_or_refused(shape: tuple[int, int]) -> None:
    """Versions of transformers before 5 crop the cache to the text's length."""
    model, ids = build(), torch.tensor([[319, 337, 330, 298, 324, 383, 319, 337]])
    words: dict[str, Any] = {"pixel_values": images(shape), "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": 0}
    expected = model.generate(ids, **words)
    try:
        found = model.generate(ids, prompt_lookup_num_tokens=2, **words)
    except ValueError as error:
        assert "Remove prompt_lookup_num_tokens" in str(error)
    else:
        assert torch.equal(found, expected)


def test_a_first_answer_token_is_predicted_from_the_image() -> None:
    model, ids = build(), prompts((3,))["input_ids"]
    with torch.no_grad():
        output = model(ids, pixel_values=images((2, 3)), labels=ids, output_hidden_states=True)
        logits = model.read_out(model.ln_post(output.hidden_states[-1]))
        assert len(logits) == 6 + 3
        assert (output.loss - F.cross_entropy(logits[5:-1], ids[0])).abs() < SAME
        without = model(ids, labels=ids)
        assert (without.loss - F.cross_entropy(without.logits[0, :-1], ids[0, 1:])).abs() < SAME


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_output_gate": "none"},
        {"attention_output_gate": "headwise"},
        {"positions": "1d"},
        {"positions": "chunked"},
        {"layer_scale_init": 0.0},
        {"text_hidden_size": 48},
        {"rope_sections": (2, 1, 2)},
    ],
    ids=["full", "no-gate", "headwise", "1d", "chunked", "no-layer-scale", "one-width", "sections"],
)
def test_every_variant_has_the_released_names_and_learns(changes: dict[str, Any]) -> None:
    made = build(**changes)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes == canonical_shapes(tiny(**changes))
    batch = prompts()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    made(**batch, pixel_values=images(*SHAPES), labels=labels).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())


def test_every_form_of_images_gives_the_same_features() -> None:
    model = build("GenLIPVisionModel")
    pictures = images(*SHAPES)
    patches, grid = pack_images(pictures)
    assert torch.equal(patches[7 + 3].unflatten(0, (3, 16, 16)), pictures[2][:, 16:32, 16:32])  # row 1, column 1
    with torch.no_grad():
        output = model(pictures, output_hidden_states=True)
        packed = model(patches, grid).last_hidden_state
        parts = model.split_images(output.last_hidden_state, grid)
        assert torch.equal(packed, output.last_hidden_state)
        for picture, part, pooled in zip(pictures, parts, output.pooler_output, strict=True):
            single = model(pixel_values=picture[None])
            assert single.last_hidden_state.shape == (1, part.shape[0], 48)
            assert (single.last_hidden_state[0] - part).abs().max() < SAME
            assert (pooled - part.mean(dim=0)).abs().max() < SAME
        both = model(torch.stack((pictures[0], pictures[3])), output_hidden_states=True)
        assert (both.last_hidden_state.flatten(0, 1) - torch.cat((parts[0], parts[3]))).abs().max() < SAME
        assert len(both.hidden_states) == 3 and both.hidden_states[0].shape == (2, 6, 48)
        assert (model.ln_post(both.hidden_states[-1]) - both.last_hidden_state).abs().max() < SAME
        assert isinstance(model(pictures, return_dict=False), tuple)


def test_drop_path_drops_whole_samples() -> None:
    made = build("GenLIPVisionModel", drop_path_rate=0.5, num_layers=1)
    pictures = torch.stack(images((2, 2)) * 64)
    with torch.no_grad():
        calm = made(pictures, output_hidden_states=True).hidden_states
        assert torch.equal(calm[1][0], calm[1][63])
        made.train()
        torch.manual_seed(0)
        before, after = made(pictures, output_hidden_states=True).hidden_states
    moved = (after != before).flatten(1).any(dim=1)
    still = (after == before).flatten(1).all(dim=1)
    assert torch.equal(moved, ~still), "a sample was dropped in part"
    assert 6 <= int(still.sum()) <= 28  # both branches dropped: a quarter of 64
    assert len({row.sum().item() for row in after}) == 4  # both, either or none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    model, batch = build(), prompts()
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        exact = model(**batch, pixel_values=images(*SHAPES), labels=batch["input_ids"])
        near = half(**batch, pixel_values=images(*SHAPES), labels=batch["input_ids"])
    assert near.logits.dtype == dtype and near.loss.dtype == torch.float32
    assert (near.logits.float() - exact.logits).norm() < 0.03 * exact.logits.norm()  # (6.0e-3 in bf16, 8.1e-4 in fp16)
    assert half.generate(**batch, pixel_values=images(*SHAPES), max_new_tokens=3, pad_token_id=0).shape == (4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, pixel_values=images(*SHAPES), labels=batch["input_ids"]).loss.backward()


def test_checkpointed_layers_have_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        made = build(drop_path_rate=0.3).train()
        if again:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = []
        made.visual.layers[0].mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(2)
        made(prompts()["input_ids"], pixel_values=images(*SHAPES), labels=prompts()["input_ids"]).loss.backward()
        assert len(runs) == 1 + again
        gradients.append({name: parameter.grad for name, parameter in made.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_initial_weights_follow_the_authors() -> None:
    torch.manual_seed(0)
    made = GenLIPForCausalLM(
        GenLIPConfig(
            hidden_size=96, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, text_embed_dim=64
        )
    )
    state = made.state_dict()
    layer = "visual.layers.0."
    bound = (6 / (96 + 192)) ** 0.5
    assert 0.98 * bound < state[f"{layer}self_attn.q_proj.weight"].abs().max() <= bound
    for name in ("embeddings", "lm_head", "proj", "in_proj", "vision_embeddings.patch_embedding", f"{layer}mlp.fc2"):
        assert abs(state[f"{name}.weight"].std() - 0.02) < 0.001, name
    assert (state[f"{layer}layer_scale1.lambda1"] == 0.1).all() and (state["ln_post.weight"] == 1).all()
    assert not any(state[name].any() for name in state if name.endswith("bias"))


ONE = torch.zeros(1, 3, 32, 32)
IDS = torch.tensor([[5, 6]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 30, 32)}, r"shape \[1, 3, 30, 32\].*multiples of 16"),
        ({"pixel_values": ONE.byte()}, "torch.uint8: expected normalised floats"),
        ({"pixel_values": ["image.jpg"]}, "pixel_values of str"),
        ({"pixel_values": []}, "empty list"),
        ({"pixel_values": torch.zeros(4, 768)}, "packed pixel_values need it"),
        ({"pixel_values": torch.zeros(4, 768), "image_grid_hw": torch.tensor([[2, 3]])}, r"needs \[6, 768\]"),
        ({"pixel_values": torch.zeros(4, 768), "image_grid_hw": torch.tensor([2, 2])}, r"whole numbers \[images, 2\]"),
        (
            {"pixel_values": ONE, "image_grid_hw": torch.tensor([[1, 4]])},
            r"the images of pixel_values have \[\[2, 2\]\]",
        ),
        ({"pixel_values": torch.cat((ONE, ONE))}, "2 images for 1 rows"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"shape \[3, 32, 32\]"),
        ({"image_grid_hw": torch.tensor([[2, 2]])}, "without pixel_values"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask of shape \[1, 3\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
    ],
)
def test_invalid_inputs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(**{"input_ids": IDS, **arguments})
