"""The command line: from a run to a Hugging Face folder and back; bad input is a one-line error."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor

from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.manifest import WEIGHTS_ONLY
from genlip_megatron.checkpoint.reshard import reshard
from genlip_megatron.convert.hf_folder import hf_config
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import build_run, tiny_config
from tests.convert.weights import differing, random_weights, read_released
from tools.checkpoints import main as checkpoints
from tools.convert_checkpoint import main, size

Convert = Callable[..., str]


@pytest.fixture(scope="module")
def weights(demo_data: Path) -> dict[str, Tensor]:
    return random_weights(tiny_config(demo_data).model)


@pytest.fixture
def released(weights: dict[str, Tensor], demo_data: Path, tmp_path: Path) -> Path:
    """A folder as the authors release them: configuration and weights."""
    place = tmp_path / "released"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(hf_config(tiny_config(demo_data).model, "float32")))
    save_file(weights, place / "model.safetensors")
    return place


@pytest.fixture
def convert(tool: Callable[..., str]) -> Convert:
    return partial(tool, main)


@pytest.fixture
def started(released: Path, convert: Convert, demo_data: Path, tmp_path: Path) -> Path:
    """A checkpoint of weights only."""
    convert("to-megatron", released, "--output", tmp_path / "start", "--tokenizer", demo_data / "tokenizer.model")
    return tmp_path / "start" / "iter_0000000"


def test_both_directions_with_verify(
    released: Path, weights: dict[str, Tensor], convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    start, back = tmp_path / "start", tmp_path / "back"
    said = convert("to-megatron", released, "--output", start, "--tokenizer", demo_data / "tokenizer.model", "--verify")
    assert "hidden states: largest difference" in said and "logits: largest difference" in said
    said = convert("to-hf", start, "--output", back, "--dtype", "bf16", "--max-shard-size", "100KB", "--verify")
    assert said.count("within the tolerance") == 2
    assert differing(read_released(back), {name: tensor.bfloat16() for name, tensor in weights.items()}) == []
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert (back / "model.safetensors.index.json").is_file() and (back / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_verify_ends_with_status_1_when_the_models_differ(
    released: Path, weights: dict[str, Tensor], started: Path, demo_data: Path
) -> None:
    from genlip_megatron.checkpoint import loading
    from genlip_megatron.convert.verify import compare_models

    config = loading.read_config(started)
    assert all(difference.small for difference in compare_models(started, config, released))
    swapped = {**weights, "lm_head.weight": weights["embeddings.weight"]}
    save_file({name: tensor.clone() for name, tensor in swapped.items()}, released / "model.safetensors")
    hidden, logits = compare_models(started, config, released)
    assert hidden.small and not logits.small and "ABOVE the tolerance" in str(logits)


def test_verify_reads_the_configuration_as_transformers_does(
    released: Path, convert: Convert, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genlip_megatron.convert import hf_folder

    monkeypatch.setattr(hf_folder, "rope_settings", lambda fields: {"mrope_section": [4, 0, 0]})
    words = ("--tokenizer", demo_data / "tokenizer.model", "--verify")
    said = convert("to-megatron", released, "--output", tmp_path / "start", *words, status=1)
    assert "ABOVE the tolerance" in said


def test_export_of_the_encoder_only(
    started: Path, weights: dict[str, Tensor], convert: Convert, tmp_path: Path
) -> None:
    said = convert("to-hf", started, "--output", tmp_path / "encoder", "--encoder-only", "--verify")
    assert "hidden states" in said and "logits" not in said and "within" in said
    text = ("embeddings.", "in_proj.", "proj.", "lm_head.")
    expected = {name: tensor for name, tensor in weights.items() if not name.startswith(text)}
    assert differing(read_released(tmp_path / "encoder"), expected) == [] and len(expected) < len(weights)
    line = convert("to-megatron", tmp_path / "encoder", "--output", tmp_path / "no", status=2)
    assert "embeddings.weight" in line


def test_export_of_the_encoder_needs_no_tokenizer(
    released: Path, convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    tokenizer = shutil.copy(demo_data / "tokenizer.model", tmp_path / "tokenizer.model")
    convert("to-megatron", released, "--output", tmp_path / "start", "--tokenizer", tokenizer)
    Path(tokenizer).unlink()
    words = ("to-hf", tmp_path / "start", "--output", tmp_path / "encoder")
    assert "no such file" in convert(*words, status=2)
    convert(*words, "--encoder-only")
    assert not list((tmp_path / "encoder").glob("tokenizer*"))
    # No text processor either, only the image processor.
    assert not list((tmp_path / "encoder").glob("process*"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder", trust_remote_code=True)
    assert type(processor).__name__ == "GenLIPImageProcessor"
    shutil.copy(demo_data / "tokenizer.model", tokenizer)
    convert(*words, "--encoder-only", "--overwrite", "--tokenizer", tokenizer)
    assert len(list((tmp_path / "encoder").glob("process*"))) == 2


def test_verify_without_transformers_writes_nothing(
    released: Path, started: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for words in (("to-hf", started), ("to-megatron", released)):
        line = convert(*words, "--output", tmp_path / "no", "--verify", status=2)
        assert "pip install '.[hf]' in the checkout" in line


def begun(config: Any) -> Any:
    from genlip_megatron.testing.runs import full_weights
    from genlip_megatron.train.setup import set_up

    try:
        run = set_up(config)
    except ValueError as error:
        return str(error)
    return run.iteration, full_weights(run)


@pytest.mark.slow
def test_a_run_starts_from_weights_only_with_finetune(
    started: Path, weights: dict[str, Tensor], demo_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(demo_data, checkpoint__load=str(started.parent), checkpoint__finetune=True)
    iteration, found = run_distributed(1, begun, config)[0]
    assert iteration == 0 and differing(found, weights) == []
    for name in ("load", "save"):
        error = run_distributed(1, begun, tiny_config(demo_data, **{f"checkpoint__{name}": str(started.parent)}))[0]
        assert "holds weights only" in error and f"--load {started.parent} --finetune" in error
    evaluated = tiny_config(demo_data, checkpoint__load=str(started.parent), log__eval_only=True)
    assert differing(run_distributed(1, begun, evaluated)[0][1], weights) == []


def test_tools_read_a_checkpoint_of_weights_only(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert manifest.read(started).kind == WEIGHTS_ONLY and paths.pointed(started.parent) == 0
    for command in ("list", "verify", "info"):
        assert checkpoints([command, str(started.parent)]) == 0
    said = capsys.readouterr().out
    assert "weights" in said and "good: " in said and "optimizer_state: weights" in said
    with pytest.raises(ValueError, match="holds weights only, which any layout reads"):
        reshard(started, "fully_reshardable", started.parent, build_run)


def test_the_target_is_replaced_only_with_overwrite(
    released: Path, started: Path, convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    tokenizer = ("--tokenizer", demo_data / "tokenizer.model")
    line = convert("to-megatron", released, "--output", started.parent, *tokenizer, status=2)
    assert f"{started.parent}: the folder is not empty" in line and "--overwrite" in line
    convert("to-megatron", released, "--output", started.parent, *tokenizer, "--overwrite", "--dtype", "bf16")
    assert manifest.read(started).layout["precision"] == "bf16"
    exported = tmp_path / "exported"
    convert("to-hf", started, "--output", exported)
    assert "not empty" in convert("to-hf", started, "--output", exported, status=2)
    convert("to-hf", started, "--output", exported, "--overwrite", "--dtype", "fp32")
    assert read_released(exported)["ln_post.bias"].dtype == torch.float32
    # Neither direction replaces the other's output, or files that it has not written.
    for words in (("to-hf", started, "--output", started.parent), ("to-megatron", exported, "--output", exported)):
        assert "holds something else" in convert(*words, "--overwrite", status=2)
    (exported / "mine").mkdir()
    assert "something else (mine)" in convert("to-hf", started, "--output", exported, "--overwrite", status=2)
    (exported / "mine").rmdir()
    for place, words in ((exported, ("to-hf", started)), (started, ("to-megatron", exported))):
        (place / "events.out.tfevents").write_text("mine")
        line = convert(*words, "--output", exported if place == exported else place.parent, "--overwrite", status=2)
        assert "something else (events.out.tfevents)" in line
        (place / "events.out.tfevents").unlink()


def rewrite(place: Path, **changes: Tensor | None) -> None:
    """Change tensors of a folder; None removes one."""
    changed = {name: tensor for name, tensor in {**read_released(place), **changes}.items() if tensor is not None}
    save_file(changed, place / "model.safetensors")


def set_field(name: str, value: Any, place: Path) -> None:
    fields = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**fields, name: value}))


def set_tensor(name: str, place: Path) -> None:
    rewrite(place, **{name: torch.zeros(3)})


def split(fault: str, place: Path) -> None:
    """Two weight files with an index that has a fault."""
    tensors = read_released(place)
    (place / "model.safetensors").unlink()
    placed = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(tensors)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in tensors.items() if placed[name] == file}, place / file)
    if fault == "missing":
        (place / "b.safetensors").unlink()
    elif fault == "wrong":
        placed["ln_post.bias"] = "b.safetensors" if placed["ln_post.bias"][0] == "a" else "a.safetensors"
    elif fault == "more":
        shutil.copy(place / "b.safetensors", place / "model-00003.safetensors")
    else:
        placed["ln_post.bias"] = "../a.safetensors"
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def cut(at: int | None, place: Path) -> None:
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:at])


@pytest.mark.parametrize(
    ("harm", "parts"),
    [
        (partial(cut, -1), ["model.safetensors: damaged or cut off"]),
        (partial(cut, 5), ["model.safetensors: damaged or cut off"]),
        (lambda place: (place / "model.safetensors").write_bytes(b"\xff" * 100), ["damaged or cut off"]),
        (lambda place: (place / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
        (
            lambda place: (place / "model.safetensors").rename(place / "pytorch_model.bin"),
            ["its weights are pickles (pytorch_model.bin), which can run code", "Save them as safetensors"],
        ),
        (lambda place: (place / "config.json").write_text("{"), ["config.json: not readable as JSON"]),
        (partial(set_field, "num_attention_heads", None), ["num_attention_heads", "--num-attention-heads"]),
        (partial(set_field, "num_attention_heads", 4), ["tokenizer.json: no such file", "--tokenizer"]),
        (partial(split, "missing"), ["index.json: files are missing: b.safetensors"]),
        (partial(split, "wrong"), ["index.json: disagrees with the files on ln_post.bias"]),
        (partial(split, "outside"), ["index.json: damaged. Expected JSON with a weight_map"]),
        (
            lambda place: (place / "model.safetensors.index.json").write_text("{}"),
            ["both model.safetensors and model.safetensors.index.json exist", "Keep one of them"],
        ),
        (
            lambda place: shutil.copy(place / "model.safetensors", place / "model-00001-of-00002.safetensors"),
            ["model-00001-of-00002.safetensors would be ignored beside model.safetensors"],
        ),
        (partial(split, "more"), ["model-00003.safetensors would be ignored beside a.safe", "b.safe"]),
        (shutil.rmtree, ["no such folder"]),
        *(
            (partial(set_field, name, value), [f"config.json: {name} = {value!r}: {text}"])
            for name, value, text in (
                ("num_attention_heads", -4, "must be at least 1"),
                ("num_attention_heads", 0, "must be"),
                ("num_attention_heads", "4", "must be"),
                ("rope_theta", "big", "must be a number"),
                ("rope_scaling", "x", "expected an object"),
                ("drop_path_rate", 1.0, "must be at least 0 and below 1"),
            )
        ),
        (partial(set_field, "num_attention_heads", 5), ["num_attention_heads = 5: each head", "--num-attention-heads"]),
        (partial(set_tensor, "embeddings.weight"), ["embeddings.weight is [3]; expected a matrix"]),
        (partial(set_tensor, "visual.layers.0.self_attn.k_proj.weight"), ["k_proj.weight is [3]; expected a matrix"]),
        (partial(set_tensor, "visual.layers.x.foo"), ["unexpected: visual.layers.x.foo"]),
        (partial(set_tensor, "visual.layers."), ["unexpected: visual.layers."]),
        (
            lambda place: rewrite(
                place,
                **{"ln_post.bias": None, "proj.bias": torch.zeros(25)},
                **{f"extra.{i}": torch.zeros(1) for i in range(23)},
            ),
            ["missing: ln_post.bias; unexpected: extra.0, ", "and 3 more", "proj.bias is [25], expected [24]"],
        ),
        (
            lambda place: rewrite(place, **{"ln_post.bias": torch.zeros(32, dtype=torch.int32)}),
            ["ln_post.bias is I32: expected F32, BF16, F16"],
        ),
    ],
)
def test_bad_folders_are_refused_in_one_line(
    harm: Callable[[Path], Any], parts: list[str], released: Path, convert: Convert, tmp_path: Path
) -> None:
    harm(released)
    line = convert("to-megatron", released, "--output", tmp_path / "no", status=2)
    assert str(released) in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize("size", [{"height": "x", "width": 224}, {"height": 224}, [224], 225])
def test_a_bad_image_size_gets_one_line(
    size: Any, released: Path, convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    images = released / "preprocessor_config.json"
    words = (released, "--output", tmp_path / "start", "--tokenizer", demo_data / "tokenizer.model")
    images.write_text(json.dumps({"image_mode": "fixed", "size": size}))
    line = convert("to-megatron", *words, status=2)
    assert str(images) in line and f"size = { ({'height': 225, 'width': 225} if size == 225 else size)!r}" in line


@pytest.mark.parametrize("fields", [{"size": 64}, {"size": {"height": 64, "width": 64}}, {}])
def test_image_sizes_that_are_accepted(fields: Any, released: Path, demo_data: Path) -> None:
    from genlip_megatron.convert.conversion import recorded_run

    (released / "preprocessor_config.json").write_text(json.dumps({"image_mode": "fixed", **fields}))
    data = recorded_run(released, tiny_config(demo_data).model, demo_data / "tokenizer.model", "fp32", print).data
    assert data.image_size == (64 if fields else 224)


def test_the_number_of_heads_can_be_given(released: Path, convert: Convert, demo_data: Path, tmp_path: Path) -> None:
    set_field("num_attention_heads", None, released)
    words = ("--tokenizer", demo_data / "tokenizer.model", "--num-attention-heads", "4", "--verify")
    assert "within" in convert("to-megatron", released, "--output", tmp_path / "start", *words)
    for count, why in (("-4", "at least 1"), ("5", "must be a multiple of twice the heads")):
        line = convert("to-megatron", released, "--output", tmp_path / "no", "--num-attention-heads", count, status=2)
        assert why in line and "(--num-attention-heads)" in line and "config.json" not in line


def test_bad_checkpoints_are_refused_in_one_line(started: Path, convert: Convert, tmp_path: Path) -> None:
    target = ("--output", tmp_path / "no")
    assert "no checkpoint found" in convert("to-hf", tmp_path / "released", *target, status=2)
    line = convert("to-hf", started, *target, "--dtype", "int8", status=2)
    assert "--dtype" in line and "'keep'" in line and "int8" in line
    assert "expected a size such as 5GB" in convert("to-hf", started, *target, "--max-shard-size", "big", status=2)
    other = tmp_path / "tokenizer.json"
    shutil.copy(Path(manifest.__file__), other)
    assert "cannot be read as a tokenizer" in convert("to-hf", started, *target, "--tokenizer", other, status=2)
    content = bytearray((started / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (started / "__0_0.distcp").write_bytes(content)
    line = convert("to-hf", started, *target, status=2)
    assert f"{started}/__0_0.distcp: damaged, its SHA-256 does not match" in line


def test_a_value_that_overflows_fp16_is_refused(
    released: Path, weights: dict[str, Tensor], convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    large = weights["lm_head.weight"].clone()
    large[1, 2] = 7e4
    rewrite(released, **{"lm_head.weight": large})
    convert("to-megatron", released, "--output", tmp_path / "start", "--tokenizer", demo_data / "tokenizer.model")
    line = convert("to-hf", tmp_path / "start", "--output", tmp_path / "no", "--dtype", "fp16", status=2)
    assert "lm_head.weight: a value of 7e+04 overflows float16" in line


def test_weights_in_a_dtype_without_training_need_a_dtype(
    released: Path, weights: dict[str, Tensor], convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    words = ("--output", tmp_path / "start", "--tokenizer", demo_data / "tokenizer.model")
    save_file({name: tensor.half() for name, tensor in weights.items()}, released / "model.safetensors")
    assert "the weights are torch.float16, and training supports fp32 and bf16" in convert(
        "to-megatron", released, *words, status=2
    )
    name = "visual.layers.0.self_attn.k_proj.weight"
    rewrite(released, **{**weights, name: weights[name].bfloat16()})
    assert f"{name}, " in convert("to-megatron", released, *words, status=2)
    convert("to-megatron", released, *words, "--dtype", "fp32")


def test_sizes() -> None:
    assert [size("5GB"), size("512 MiB"), size("1000"), size("1.5kb")] == [5 * 10**9, 2**29, 1000, 1500]


def test_heads_that_contradict_the_rotary_sections_are_refused_unless_given_twice(
    released: Path, convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    set_field("num_attention_heads", 2, released)
    words = (released, "--output", tmp_path / "start", "--tokenizer", demo_data / "tokenizer.model")
    line = convert("to-megatron", *words, status=2)
    assert "num_attention_heads = 2: half a head has 8 channels" in line and "[2, 1, 1], are 4" in line
    convert("to-megatron", *words, "--num-attention-heads", "2")


def test_export_for_llava_next(started: Path, convert: Convert, tmp_path: Path) -> None:
    words = ("to-hf", started, "--output", tmp_path / "tower")
    for flags, message in (
        (("--image-size", "64"), "--image-size 64: needs --for"),
        (("--for", "llava-next", "--image-size", "72"), "--image-size 72: must be a multiple of 16"),
        (("--for", "llava-next", "--image-size", "0"), "--image-size 0: must be a multiple of 16"),
        (("--for", "llava"), "invalid choice: 'llava'"),
    ):
        assert message in convert(*words, *flags, status=2) and not (tmp_path / "tower").exists()
    convert(*words, "--for", "llava-next", "--image-size", "64")
    assert json.loads((tmp_path / "tower" / "config.json").read_text())["image_size"] == 64
    stock = AutoImageProcessor.from_pretrained(tmp_path / "tower")
    assert type(stock).__name__.startswith("CLIPImageProcessor") and stock.crop_size["height"] == 64


def test_export_for_llava_next_of_native_sizes_needs_a_size(
    released: Path, convert: Convert, demo_data: Path, tmp_path: Path
) -> None:
    images = {"image_mode": "native", "min_pixels": 1024, "max_pixels": 16384}
    (released / "preprocessor_config.json").write_text(json.dumps(images))
    convert("to-megatron", released, "--output", tmp_path / "run", "--tokenizer", demo_data / "tokenizer.model")
    words = ("to-hf", tmp_path / "run", "--output", tmp_path / "tower", "--for", "llava-next")
    assert "the run's images are native. Give the side as --image-size" in convert(*words, status=2)
    convert(*words, "--image-size", "64")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tower", trust_remote_code=True)
    assert (processor.image_mode, processor.size) == ("fixed", {"height": 64, "width": 64})
