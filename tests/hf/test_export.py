"""An exported folder is complete: it works without this package, and imports as the same model."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from genlip_megatron import tokenizer
from genlip_megatron.config import DataConfig, ModelConfig, from_dict, load_yaml, recipe_names
from genlip_megatron.convert.hf_folder import hf_config, model_card, model_config, preprocessor_config
from genlip_megatron.convert.tokenizer import END_OF_TURN, export_tokenizer
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, GenLIPVisionModel
from genlip_megatron.model.state_dict import canonical_shapes
from tests.hf.models import export, tiny

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer" / "tokenizer.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    return export(tmp_path_factory.mktemp("fixed"), demo_data / "tokenizer.model")


def test_both_models_load_without_warnings_about_tensors(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        vision = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True)
        causal = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "lm_head" in r.getMessage()]
    weights = load_file(exported / "model.safetensors")
    for model, count in ((vision, 44), (causal, 50)):
        state = model.state_dict()
        assert len(state) == count and all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    assert type(vision).__name__ == "GenLIPVisionModel" and type(causal).__name__ == "GenLIPForCausalLM"
    settings = causal.generation_config
    assert not settings.do_sample and settings.max_new_tokens == 256 and settings.eos_token_id == settings.pad_token_id


def test_a_missing_tensor_is_an_error(tmp_path: Path, demo_data: Path) -> None:
    folder = export(tmp_path, demo_data / "tokenizer.model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"no lm_head.weight, which GenLIPForCausalLM needs"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_a_saved_copy_is_the_same(exported: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert processor.image_processor.image_mode == "fixed" and processor.prompt == "Describe the image in detail."
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["rope_scaling"]["mrope_section"] == [2, 2, 2] and fields["rope_theta"] == 10000.0
    assert model_config(fields, canonical_shapes(tiny())) == tiny()


def test_a_stock_processor_gives_the_same_pixels_without_the_folders_code(exported: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        for size in ((100, 220), (300, 200), (224, 224))
    ]
    pictures.append(Image.linear_gradient("L").resize((500, 90)))
    ours = transformers.AutoImageProcessor.from_pretrained(exported, trust_remote_code=True)
    stock = transformers.AutoImageProcessor.from_pretrained(exported, use_fast=False)
    assert type(ours).__name__ == "GenLIPImageProcessor" and type(stock).__module__.startswith(
        "transformers.models.vit"
    )
    difference = stock(pictures, return_tensors="pt")["pixel_values"] - ours(pictures)["pixel_values"]
    assert difference.abs().max() <= 2**-22  # one more operation rounds (1.2e-7); an 8-bit level is 7.8e-3


@pytest.mark.parametrize("settings", [{"image_mode": "native"}, {"fixed_resize": "resize-center-crop"}])
def test_no_stock_processor_is_named_if_it_would_differ(
    tmp_path: Path, demo_data: Path, settings: dict[str, Any]
) -> None:
    folder = export(tmp_path, demo_data / "tokenizer.model", **settings)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def test_written_fields_equal_those_of_the_classes() -> None:
    fields = hf_config(tiny(drop_path_rate=0.2, rope_theta=5000.0), "float32")
    written = GenLIPConfig(**fields).to_dict()
    assert {name: written[name] for name in fields} == fields
    for data in (
        DataConfig(),
        DataConfig(fixed_resize="resize-center-crop"),
        DataConfig(image_mode="native", min_pixels=1024, max_pixels=16384),
    ):
        fields = preprocessor_config(data)
        written = json.loads(GenLIPImageProcessor(**fields).to_json_string())
        assert {name: written[name] for name in fields} == fields


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("stage1")])
def test_every_recipe_survives_export_and_import(name: str) -> None:
    model = from_dict(load_yaml(name), name).model
    shapes = canonical_shapes(model)
    fields = hf_config(model)
    assert model_config(fields, shapes) == model
    published = {key: value for key, value in fields.items() if key != "text_embed_dim"}
    assert model_config(published, shapes) == model
    if "release" in name:
        assert model_config({}, shapes) == model
    else:
        with pytest.raises(ValueError, match="Give num_attention_heads|mrope_section"):
            model_config({}, shapes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_output_gate": "none"},
        {"attention_output_gate": "headwise"},
        {"layer_scale_init": 0.0},
        {"text_hidden_size": 48},
    ],
)
def test_sizes_are_read_from_the_weights(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    bare = {"num_attention_heads": 4, "rope_scaling": {"mrope_section": [2, 2, 2]}}
    assert model_config(bare, canonical_shapes(model)) == model
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 2, 2]}}
    assert model_config(newer, canonical_shapes(model), num_attention_heads=4) == replace(model, rope_theta=500.0)
    both = {**bare, "rope_parameters": {"rope_theta": 500.0}}
    assert model_config(both, canonical_shapes(model)) == replace(model, rope_theta=500.0)


SECTIONS = {"num_attention_heads": 4, "rope_scaling": {"mrope_section": [2, 2, 2]}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 96}, "hidden_size = 96: the weights have 48"),
        ({"gated_attention": False}, "gated_attention = False: the weights have True"),
        ({**SECTIONS, "positions": "2d"}, "positions = '2d': expected one of mrope, 1d, chunked"),
        ({"ls_init_value": None}, "ls_init_value = 0.0: the weights have 0.1"),
        ({}, "Give num_attention_heads"),
        ({"num_attention_heads": 4}, "mrope_section"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(fields, canonical_shapes(tiny()))
    with pytest.raises(ValueError, match="no embeddings.weight"):
        model_config({}, {"ln_post.weight": (48,)})
    with pytest.raises(ValueError, match="num_attention_heads = 3: config.json has 4"):
        model_config(hf_config(tiny()), canonical_shapes(tiny()), num_attention_heads=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is supported"),
        ({"mrope_interleaved": False}, "mrope_interleaved = False"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type = 'yarn': only 'default'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor = 2.0: this setting is not supported"),
        ({"rope_scaling": {"mrope_interleaved": False}}, "rope_scaling.mrope_interleaved = False: only True is"),
        ({"rope_scaling": {"mrope_section": [12, 12]}}, r"mrope_section = \[12, 12\]: must be three whole numbers"),
        ({"rope_scaling": {"mrope_section": ["a", 1, 2]}}, r"mrope_section = \['a', 1, 2\]: must be"),
        (
            {"rope_scaling": {"mrope_section": [12, 12, 12]}, "rope_parameters": {"mrope_section": [8, 8, 20]}},
            r"rope_scaling.mrope_section = \[12, 12, 12\]: rope_parameters.mrope_section = \[8, 8, 20\] is another",
        ),
    ],
)
def test_a_configuration_of_another_model_is_refused_by_model_and_conversion(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GenLIPConfig(**fields)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        model_config(fields, canonical_shapes(tiny()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size = 1152 with num_attention_heads = 5"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate = 1.0"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenLIPConfig(**fields)


def test_an_assigned_rope_theta_is_not_ignored() -> None:
    config = GenLIPConfig()
    with pytest.raises(ValueError, match=r"rope_scaling.rope_theta = 500.0: set rope_theta instead"):
        config.rope_scaling = {"rope_type": "default", "rope_theta": 500.0}


def test_rotary_sections_survive_every_spelling(tmp_path: Path) -> None:
    newer = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [8, 12, 12]}
    for config in (
        GenLIPConfig(rope_scaling={"type": "default", "mrope_section": [8, 12, 12]}, rope_theta=500.0),
        GenLIPConfig(rope_parameters=newer),
        GenLIPConfig(rope_parameters=newer, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}),
        GenLIPConfig(rope_parameters={"rope_theta": 500.0}, rope_scaling={"mrope_section": [8, 12, 12]}),
    ):
        config.save_pretrained(tmp_path)
        again = GenLIPConfig.from_pretrained(tmp_path)
        assert (again.mrope_section, again.rope_theta) == ([8, 12, 12], 500.0)


def test_the_card_holds_the_given_facts() -> None:
    card = model_card(tiny(), DataConfig(), "cc-by-4.0", {"Step": "17", "Training data": "rendered scenes"})
    assert card.startswith("---\nlicense: cc-by-4.0\n") and "| Step | 17 |" in card and "| Hidden size | 48 |" in card


def test_a_sentencepiece_model_is_exported_token_for_token(exported: Path, demo_data: Path) -> None:
    ours = tokenizer.load_tokenizer(demo_data / "tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert END_OF_TURN == tokenizer.END_OF_TURN
    assert theirs.eos_token_id == theirs.pad_token_id == ours.closing_ids[0] and theirs.padding_side == "left"
    generator = random.Random(0)
    parts = [
        *"abcdefghij  \n\n.,<|>\u00c4\u00df\u732b\U0001f600\t\u2581\u00a0",
        "  ",
        "Describe",
        "red circle",
        END_OF_TURN,
    ]
    texts = ["".join(generator.choices(parts, k=generator.randint(1, 30))) for _ in range(300)]
    texts += ["Two red crosses at the top left.", "Describe the image in detail.", "\n", " a ", "\u732b" * 40]
    for words in texts:
        ids = ours.encode(words)
        assert theirs(words, add_special_tokens=False)["input_ids"] == ids, words
        assert (
            theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids) == words.replace("\u2581", " ")
        )


@pytest.mark.skipif(not QWEN.is_file(), reason="the Qwen3 tokenizer is not beside the project")
def test_a_hugging_face_tokenizer_is_exported_token_for_token(tmp_path: Path) -> None:
    assert export_tokenizer(QWEN, tmp_path) == 151645
    ours, theirs = tokenizer.load_tokenizer(QWEN), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for words in ("Describe the image in detail.", "Ein K\u00e4se\n\n auf  dem Tisch \u732b", "a<|im_end|>b"):
        ids = ours.encode(words)
        assert theirs(words, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)


def test_a_tokenizer_without_an_equivalent_is_refused(tmp_path: Path, demo_data: Path) -> None:
    import sentencepiece

    captions = iter(["One red circle.", "Two blue squares at the top."] * 20)
    with (tmp_path / "other.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=captions, model_writer=file, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    with pytest.raises(ValueError, match="normalization_rule_name = 'nmt_nfkc'.*Train the tokenizer with 'identity'"):
        export_tokenizer(tmp_path / "other.model", tmp_path)
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        export_tokenizer(tmp_path / "no.json", tmp_path)
    with pytest.raises(ValueError, match="expected an existing Hugging Face .json"):
        export_tokenizer(tmp_path / "missing.json", tmp_path)
    whole = json.loads((export(tmp_path / "folder", demo_data / "tokenizer.model") / "tokenizer.json").read_text())
    whole["added_tokens"] = []
    whole["model"]["vocab"] = [pair for pair in whole["model"]["vocab"] if pair[0] != END_OF_TURN]
    (tmp_path / "no_end.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"has no token '<\|im_end\|>'"):
        export_tokenizer(tmp_path / "no_end.json", tmp_path)


def test_models_of_paper_size_have_the_papers_parameter_counts() -> None:
    for name, vision, whole in (
        ("l16_release_stage1", 388_866_432, 702_392_832),
        ("so16_release_stage1", 467_240_832, 780_767_232),
        ("g16_release_stage1", 1_229_083_136, 1_543_396_352),
    ):
        model: ModelConfig = from_dict(load_yaml(name), name).model
        config = GenLIPConfig(**hf_config(model))
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in kind(config).parameters()) for kind in (GenLIPVisionModel, GenLIPForCausalLM)
            ]
        assert counts == [vision, whole]
