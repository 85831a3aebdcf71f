"""tools/attention.py: numbers, pictures, comparisons, and errors before expensive work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from genlip_megatron.evaluate import attention_models
from genlip_megatron.evaluate.attention_models import (
    Settings,
    check_grids,
    generate,
    measure,
    open_subject,
    summarise,
    unify_dtypes,
)
from genlip_megatron.infer.inputs import FileImage
from tests.hf.models import export
from tools.attention import main


@pytest.fixture(scope="module")
def model(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported GenLIP with random weights."""
    folder = tmp_path_factory.mktemp("exported")
    return export(folder, demo_data / "tokenizer.model", image_mode="fixed", image_size=48)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights that has as many patches as the GenLIP, and a class token."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(image_size=48, patch_size=16, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (40 + 20 * number, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "0-broken.png").write_bytes(b"this is no image")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """(exit status, standard output and error)."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.slow
def test_models_are_compared_in_numbers_and_pictures(
    model: Path, clip: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    words = [photos, "--load", model, f"random:{model}", f"hf:{clip}", "--output", target, "--max-new-tokens", 9]
    status, said = run(capsys, *words, "--map-size", 32)
    assert status == 0, said
    found = json.loads((target / "attention.json").read_text())
    pictures = ["allocation.png", "extras.png", "maps-01.png", "maps-02.png", "mass.png"]
    assert found["files"] == pictures and sorted(file.name for file in target.glob("*.png")) == pictures
    for name in pictures:
        assert len(Image.open(target / name).convert("RGB").getcolors(1 << 24) or ()) > 30
    assert found["command"].startswith("tools/attention.py") and found["versions"]["torch"] == torch.__version__
    (broken,) = found["failed"]
    assert broken.endswith("0-broken.png") and f"{broken}: " in said
    genlip, control, other = found["models"]
    assert [one["images"] for one in found["models"]] == [2, 2, 2]
    assert len({one["fingerprint"] for one in found["models"]}) == 3
    assert len(other["mass"]["image"]["first"]) == other["layers"] == 3
    assert genlip["mass"]["generated"] != control["mass"]["generated"]
    assert other["mass"]["generated"]["image"] == [None] * 3 and "an encoder without text" in str(other)
    assert other["chance_mass"]["image"]["first"] == pytest.approx(1 / 10)  # nine patches and the class token
    assert genlip["chance_mass"]["image"]["first"] == pytest.approx(1 / 9)
    for one in (genlip, control):
        tokens, mass, density = one["tokens"], one["mass"]["generated"], one["density"]["generated"]
        assert tokens["image"] == 9 and tokens["sink"] == 2 and tokens["generated"] > 0
        for layer in range(2):
            whole = sum(mass[name][layer] for name in ("image", "prompt", "generated"))
            assert whole == pytest.approx(1, abs=1e-5)
            assert density["image"][layer] == pytest.approx(mass["image"][layer] / 9)
            assert density["sink"][layer] == pytest.approx(mass["sink"][layer] / 2)
    # Again into the same folder only with --overwrite; a folder of others is never replaced.
    assert "the folder is not empty" in run(capsys, *words)[1]
    (target / "notes.txt").write_text("mine")
    status, said = run(capsys, *words, "--overwrite")
    assert status == 2 and "notes.txt" in said and (target / "notes.txt").exists()


def test_means_are_over_images_and_the_pass_is_that_of_the_generation(model: Path, photos: Path) -> None:
    """The teacher-forced pass predicts exactly the tokens that the cache generated."""
    subject = open_subject(str(model), device=torch.device("cpu"), dtype="auto")
    inputs = [FileImage(str(photos / f"{number}.png")) for number in range(2)]
    prepared = [subject.prepare(image) for image in inputs]
    texts = generate(subject, prepared, 9)
    for image, generated in zip(prepared, texts, strict=True):
        ids = torch.tensor([[*subject.prompt_ids, *generated]])
        with torch.no_grad():
            logits = subject.encoder.module(ids, image.pixels[None]).logits[0]
        assert generated and logits[-len(generated) - 1 : -1].argmax(dim=-1).tolist() == generated
    recorders = [recorder for _, recorder in measure(subject, inputs, Settings(max_new_tokens=9), 2) if recorder]
    assert [recorder.generated for recorder in recorders] == [len(generated) for generated in texts]
    found = summarise(subject, recorders)
    masses = torch.stack([recorder.layers[1].mass for recorder in recorders])
    assert found["mass"]["generated"]["first"][1] == pytest.approx(float(masses[:, 2, 0].mean()))
    largest = [recorder.layers[1].largest_image for recorder in recorders]
    assert found["largest_image"][1] == max(largest) and found["cosine"][1] == pytest.approx(
        sum(recorder.layers[1].cosine for recorder in recorders) / 2
    )


def test_other_kinds_of_models_get_what_applies(model: Path, photos: Path, tmp_path: Path) -> None:
    """An exported encoder has attention and gates, but no text; colours have neither."""
    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

    encoder = tmp_path / "encoder"
    GenLIPVisionModel.from_pretrained(model).save_pretrained(encoder)
    whole = open_subject(str(model), device=torch.device("cpu"), dtype="auto")
    inputs = [FileImage(str(photos / "0.png"))]
    found = {}
    for name, images in ((str(encoder), {"image_size": 48}), ("colour", {"image_size": 48})):
        subject = open_subject(name, device=torch.device("cpu"), dtype="fp32", images=images)
        found[name] = summarise(subject, [r for _, r in measure(subject, inputs, Settings(), 1) if r])
    expected = summarise(whole, [r for _, r in measure(whole, inputs, Settings(4), 1) if r])
    small = found[str(encoder)]
    for name in ("mass", "density"):
        assert small[name]["image"]["first"] == pytest.approx(expected[name]["image"]["first"], abs=1e-6)
    assert small["cosine"] == pytest.approx(expected["cosine"], abs=1e-6) and len(small["gate"]) == 2
    assert {"mass", "gate"}.isdisjoint(found["colour"]) and len(found["colour"]["cosine"]) == 1
    assert "attention" in found["colour"]["not_applicable"]


def test_the_papers_layers_are_drawn_as_far_as_they_exist() -> None:
    assert attention_models.map_layers(12) == [2, 3, 12]
    assert attention_models.map_layers(12, [5, 1]) == [1, 5] and attention_models.map_layers(12, []) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--load", "nowhere"], "--load nowhere: no such folder"),
        (["--load", "MODEL", "MODEL"], "a model is named twice"),
        (["--load", "MODEL", "--maps", "3"], "--maps 3: the model has layers 1 to 2"),
        (["--load", "MODEL", "--map-size", "40"], "--map-size 40: must be a multiple of 16"),
        (["--load", "MODEL", "--block-size", "0"], "--block-size 0: must be at least 1"),
        (["--load", "MODEL", "--prompt", ""], "--prompt '': it is empty"),
        (["--load", "MODEL", "hf:CLIP", "--image-size", "50"], "multiples of 16"),
        (["--load", "MODEL", "hf:CLIP", "--image-mode", "native"], "is no GenLIP"),
        (["--load", "MODEL", "efficientnet:lite9"], "efficientnet:lite9: unknown"),
    ],
)
def test_errors_are_one_line_before_any_image_is_measured(
    words: list[str],
    line: str,
    model: Path,
    clip: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_models, "measure", None)
    named = [word.replace("MODEL", str(model)).replace("CLIP", str(clip)) for word in words]
    status, said = run(capsys, photos, *named, "--output", tmp_path / "out")
    assert status == 2 and line in said.splitlines()[-1] and not list(tmp_path.iterdir())


def test_unequal_grids_need_a_flag(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        )
    ).save_pretrained(tmp_path / "clip")
    words = [photos, "--load", model, f"hf:{tmp_path}/clip", "--output", tmp_path / "out"]
    status, said = run(capsys, *words)
    assert status == 2 and "3x3, hf:" in said and "--allow-unequal" in said
    subjects = [open_subject(str(name), device=torch.device("cpu"), dtype="auto") for name in words[2:4]]
    check_grids(subjects, [FileImage(str(photos / "0.png"))], allow_unequal=True)
    assert run(capsys, photos / "0-broken.png", "--load", model, "--output", tmp_path / "none")[0] == 1


def test_the_grids_of_every_image_are_compared(model: Path, photos: Path) -> None:
    """A native and a fixed size agree on the first image only."""
    images = {"image_mode": "native", "min_pixels": 256, "max_pixels": 10**6}
    native = open_subject(str(model), device=torch.device("cpu"), dtype="auto", images=images)
    inputs = [FileImage(str(photos / f"{number}.png")) for number in (0, 1)]
    first = native.grid(native.prepare(inputs[0]))
    other = dataclasses.replace(native, name="other")
    object.__setattr__(other, "grid", lambda image: first)
    check_grids([native, other], inputs[:1], allow_unequal=False)
    with pytest.raises(ValueError, match="unequal grids of patches"):
        check_grids([native, other], inputs, allow_unequal=False)


def test_auto_is_one_dtype_that_holds_all_stored_weights(model: Path, clip: Path, tmp_path: Path) -> None:
    CLIPVisionModel.from_pretrained(clip).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    names = [f"hf:{tmp_path / 'half'}", f"hf:{clip}", str(model)]
    subjects = [open_subject(name, device=torch.device("cpu"), dtype="auto") for name in names]
    assert [one.encoder.dtype for one in subjects[:2]] == [torch.bfloat16, torch.float32]
    unify_dtypes(subjects[:1])
    assert subjects[0].encoder.dtype == torch.bfloat16
    unify_dtypes(subjects)
    assert {one.encoder.dtype for one in subjects} == {torch.float32}


def test_exclude_self_reaches_the_measurement(model: Path, photos: Path) -> None:
    subject = open_subject(str(model), device=torch.device("cpu"), dtype="auto")
    inputs = [FileImage(str(photos / "0.png"))]
    mass = [
        next(r for _, r in measure(subject, inputs, Settings(2, exclude_self), 1)).layers[0].mass
        for exclude_self in (False, True)
    ]
    assert mass[0][0, 0] != mass[1][0, 0] and torch.equal(mass[0][2], mass[1][2])
