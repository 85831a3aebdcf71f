"""The exported encoder inside others' heads: feature maps, a classifier, and the view that code for timm expects."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.hf_folder import SOURCES, hf_config
from genlip_megatron.hf import heads_genlip
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.heads_genlip import GenLIPBackbone
from tests.hf.models import export, images, random_weights, tiny
from tests.hf.test_model import SAME, build

PAGE = Path(__file__).parents[2] / "docs" / "plugging-in.md"
FILES = Path(heads_genlip.__file__).parent
PIXELS = torch.stack(images((4, 6), (4, 6)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    return export(tmp_path_factory.mktemp("heads"), demo_data / "tokenizer.model")


def backbone(**changes: Any) -> Any:
    made = GenLIPBackbone(GenLIPConfig(**hf_config(tiny(), "float32"), **changes))
    weights = random_weights(tiny())
    made.load_state_dict({name: weights[name] for name in made.state_dict()})
    return made.eval()


def as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def test_feature_maps_are_the_normalised_layers() -> None:
    vision = build("GenLIPVisionModel")
    expected = vision(PIXELS, output_hidden_states=True)
    made = backbone(out_features=["stem", "stage1", "stage2"])
    output = made(PIXELS, output_hidden_states=True)
    assert made.channels == [48, 48, 48] and made.out_indices == [0, 1, 2]
    for feature_map, state in zip(output.feature_maps, expected.hidden_states, strict=True):
        assert feature_map.shape == (2, 48, 4, 6) and feature_map.is_contiguous()
        assert (as_tokens(feature_map) - vision.ln_post(state)).abs().max() < SAME
    assert torch.equal(as_tokens(output.feature_maps[-1]), expected.last_hidden_state)
    assert [state.shape for state in output.hidden_states] == [(2, 24, 48)] * 3
    assert isinstance(made(PIXELS, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("settings", "names", "indices"),
    [
        ({}, ["stage2"], [2]),
        ({"out_features": ["stem", "stage1"]}, ["stem", "stage1"], [0, 1]),
        ({"out_indices": [0, 2]}, ["stem", "stage2"], [0, 2]),
        ({"out_features": ["stage1"], "out_indices": [1]}, ["stage1"], [1]),
    ],
)
def test_stages_are_chosen_by_name_or_index_and_saved(
    settings: dict[str, Any], names: list[str], indices: list[int], tmp_path: Path
) -> None:
    made = backbone(**settings)
    assert (made.out_features, list(made.out_indices)) == (names, indices)
    layers: list[int] = []
    for index, layer in enumerate(made.visual.layers):
        layer.register_forward_hook(lambda *_, index=index: layers.append(index))
    assert len(made(PIXELS).feature_maps) == len(names)
    assert layers == list(range(indices[-1])), "a layer ran that no feature map needs"
    made.save_pretrained(tmp_path)
    again = GenLIPBackbone.from_pretrained(tmp_path)
    assert (again.out_features, list(again.out_indices)) == (names, indices)
    other = GenLIPBackbone.from_pretrained(tmp_path, out_features=["stage1"])
    assert list(other.out_indices) == [1] and len(other(PIXELS).feature_maps) == 1


def test_wrong_stages_and_images_are_refused() -> None:
    for settings, message in (
        ({"out_features": ["stage3"]}, "out_features must be a subset of stage_names"),
        ({"out_features": ["stage1"], "out_indices": [2]}, r"out_features = \['stage1'\]: out_indices = \[2\] are"),
    ):
        with pytest.raises(ValueError, match=message):
            GenLIPConfig(num_hidden_layers=2, **settings)
    with pytest.raises(ValueError, match=r"feature maps need images of one size, \[B, 3, height, width\]"):
        backbone()(list(PIXELS))
    with pytest.raises(ValueError, match="output_attentions = True"):
        backbone().forward_with_filtered_kwargs(PIXELS, output_attentions=True)


def detection(config: Any) -> tuple[Any, dict[str, Any]]:
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")}
    made = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=config,
        d_model=16,
        num_queries=4,
        num_labels=3,
        **sizes,
        **widths,
    )
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return transformers.DetrForObjectDetection(made), {"labels": [box] * 2}


def segmentation(config: Any) -> tuple[Any, dict[str, Any]]:
    made = transformers.UperNetConfig(
        backbone_config=config,
        hidden_size=16,
        pool_scales=[1, 2],
        num_labels=5,
        auxiliary_in_channels=48,
        auxiliary_channels=8,
    )
    return transformers.UperNetForSemanticSegmentation(made), {"labels": torch.ones(2, 64, 96).long()}


def masks(config: Any) -> tuple[Any, dict[str, Any]]:
    made = transformers.Mask2FormerConfig(
        backbone_config=config,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=4,
        num_labels=3,
    )
    labels = {"mask_labels": [torch.ones(1, 64, 96)] * 2, "class_labels": [torch.tensor([1])] * 2}
    return transformers.Mask2FormerForUniversalSegmentation(made), labels


@pytest.mark.parametrize("head", [segmentation, detection, masks])
def test_heads_of_transformers_train_with_the_backbone(head: Any) -> None:
    transformers.AutoBackbone.register(GenLIPConfig, GenLIPBackbone, exist_ok=True)
    config = GenLIPConfig(**hf_config(tiny(), "float32"), out_features=["stem", "stage1", "stage2"])
    if head is masks:
        pytest.importorskip("scipy")
        config = GenLIPConfig(**hf_config(tiny(num_layers=3), "float32"), out_indices=[0, 1, 2, 3])
    model, labels = head(config)
    model.train()(PIXELS, **labels).loss.backward()
    found = [part for part in model.modules() if isinstance(part, GenLIPBackbone)]
    assert len(found) == 1
    assert all(weight.grad is not None and weight.grad.any() for weight in found[0].visual.parameters())


def test_a_classifier_starts_at_random_and_comes_back(exported: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(
        exported, trust_remote_code=True, num_labels=3
    ).eval()
    vision = build("GenLIPVisionModel")
    output = model(PIXELS, labels=torch.tensor([0, 2]))
    assert (output.logits - model.classifier(vision(PIXELS).pooler_output)).abs().max() < SAME
    assert (output.loss - torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))).abs() < SAME
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    different = model(images((4, 6), (1, 2)))
    assert different.logits.shape == (2, 3) and (different.logits[0] - output.logits[0]).abs().max() < SAME
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again(PIXELS).logits, output.logits)
    features = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)(PIXELS).last_hidden_state
    assert torch.equal(features, vision(PIXELS).last_hidden_state)
    with pytest.raises(ValueError, match=r"no embeddings.weight, in_proj.bias, .*which GenLIPForCausalLM needs"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("mode", ["fixed", "native"])
def test_the_pipeline_classifies_each_image_of_a_batch(mode: str, tmp_path: Path, demo_data: Path) -> None:
    folder = export(tmp_path, demo_data / "tokenizer.model", image_mode=mode)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in ((70, 130), (90, 64), (128, 128))
    ]
    single = [{entry["label"]: entry["score"] for entry in classify(picture)} for picture in pictures]
    assert len({tuple(scores.values()) for scores in single}) == 3
    for size in (1, 2, 3) if mode == "fixed" else (1,):
        for found, expected in zip(classify(pictures, batch_size=size), single, strict=True):
            assert all(abs(entry["score"] - expected[entry["label"]]) < SAME for entry in found)
    if mode == "native":  # the pipeline stacks images, which must have one size
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            classify(pictures, batch_size=2)


def test_code_for_timm_finds_features_layers_and_their_sizes() -> None:
    model = build("GenLIPVisionModel")
    expected = model(PIXELS, output_hidden_states=True)
    assert (model.num_features, model.embed_dim, model.num_prefix_tokens) == (48, 48, 0)
    features = model.forward_features(PIXELS)
    assert torch.equal(features, expected.last_hidden_state)
    assert torch.equal(model.forward_head(features, pre_logits=True), expected.pooler_output)
    with pytest.raises(ValueError, match="images of one size"):
        model.forward_head(features[0])
    with pytest.raises(ValueError, match="images of one size"):
        model.forward_intermediates(list(PIXELS), output_fmt="NLC")
    last, layers = model.forward_intermediates(PIXELS)
    assert torch.equal(last, features) and [layer.shape for layer in layers] == [(2, 48, 4, 6)] * 2
    assert all(torch.equal(as_tokens(a), b) for a, b in zip(layers, expected.hidden_states[1:], strict=True))
    for indices in (1, [-1], [1]):
        (only,) = model.forward_intermediates(
            PIXELS, indices, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        assert torch.equal(only, features)
    ran: list[int] = []
    model.visual.layers[1].register_forward_hook(lambda *_: ran.append(1))
    found = model.forward_intermediates(PIXELS, [0], stop_early=True, output_dict=True)
    assert not ran and torch.equal(found["image_intermediates"][0], layers[0])
    assert torch.equal(found["image_features"], model.ln_post(expected.hidden_states[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": [2]}, r"indices = \[2\]: the model has 2 layers"),
        ({"indices": 3}, "indices = 3: the model has 2 layers"),
        ({"indices": []}, r"indices = \[\]: the model has 2 layers"),
        ({"output_fmt": "NHWC"}, "output_fmt = 'NHWC': allowed are 'NCHW' and 'NLC'"),
    ],
)
def test_wrong_layers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("GenLIPVisionModel").forward_intermediates(PIXELS, **arguments)


def test_a_file_imports_every_file_that_its_imports_need() -> None:
    """Version 4 of transformers copies a local folder's direct imports, not theirs."""
    needs = {}
    for name in SOURCES:
        nodes = ast.walk(ast.parse((FILES / name).read_text()))
        needs[name] = {f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    entries = {reference.split(".")[0] + ".py" for reference in hf_config(ModelConfig())["auto_map"].values()}
    assert "heads_genlip.py" in entries
    for name in entries:
        for imported in needs[name]:
            assert needs[imported] <= needs[name], f"{name} imports {imported}, which needs {needs[imported]}"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["Adapters", "Segmentation and detection heads", "Classification", "Code for timm"])
def test_the_pages_code_runs_on_an_exported_folder(section: str, exported: Path, tmp_path: Path) -> None:
    if section == "Adapters":
        pytest.importorskip("peft")
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line.strip())
    code = re.sub(r'"FOLDER"', repr(str(exported)), code)
    code = re.sub(r"stages = .*", 'stages = ["stem", "stage1", "stage2"]', code)
    start = "import torch\npixels = torch.zeros(2, 3, 64, 96)\nlabels = torch.zeros(2, dtype=torch.int64)\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", start + code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and code.count("\n") > 4, done.stderr
