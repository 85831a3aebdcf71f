"""PPL1 and PPL2 of a tiny language model on rendered scenes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from genlip_megatron.encoders.others import PixelEncoder
from genlip_megatron.evaluate import dialogues
from genlip_megatron.evaluate import perplexity as library
from genlip_megatron.evaluate.language_model import LanguageModel, open_language_model
from genlip_megatron.evaluate.perplexity import Options, Sample, Score, Stage, VisualFeatures
from genlip_megatron.evaluate.probe_state import ProbeFolder
from genlip_megatron.evaluate.projector import Projector
from tests.evaluate.tiny_llm import write_llm, write_scenes


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


class Setup:
    """Everything that ``measure`` takes."""

    def __init__(self, llm: Path, scenes: Path, output: Path, rates: tuple[float, float], **options: Any) -> None:
        self.encoder = PixelEncoder("pixels", patch=16, size=32)
        self.language = open_language_model(str(llm))
        self.options = Options(
            size=32, batch_size=12, cache=output / "features", **{"micro_batch_size": 12, "max_steps": 4, **options}
        )
        found, _ = dialogues.read_dialogues([str(scenes / "scenes.csv")], "--data")
        self.images = [dialogue.image for dialogue in found]
        samples = [
            Sample(self.language.caption(dialogue.turns), number, dialogue.image.stamp)
            for number, dialogue in enumerate(found)
        ]
        train, held = samples[:60], samples[60:]
        self.stages = [Stage("ppl1", False, rates[0], train, held), Stage("ppl2", True, rates[1], train, held)]
        self.features = VisualFeatures(self.encoder, self.images, self.options)
        self.folders = [
            ProbeFolder(
                output / stage.name,
                library.settings(self.encoder, self.language, self.stages[: number + 1], self.options),
            )
            for number, stage in enumerate(self.stages)
        ]

    def run(self) -> list[dict[str, Any]]:
        return library.measure(self.encoder, self.language, self.features, self.stages, self.options, self.folders)


@pytest.fixture
def setup(llm: Path, scenes: Path, tmp_path: Path) -> Callable[..., Setup]:
    def make(folder: str = "out", rates: tuple[float, float] = (1e-2, 3e-3), **options: Any) -> Setup:
        return Setup(llm, scenes, tmp_path / folder, rates, **options)

    return make


def weights(language: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in language.model.state_dict().items()}


def test_tuning_more_fits_better_and_the_image_matters(setup: Callable[..., Setup]) -> None:
    made = setup(max_steps=40, epochs=20)
    first, second = made.run()
    ppl = {
        (name, kind): result[kind]["perplexity"]
        for name, result in (("1", first), ("2", second))
        for kind in ("image", "shuffled", "without_image")
    }
    assert ppl["2", "image"] < ppl["1", "image"] < ppl["1", "shuffled"]
    assert ppl["2", "image"] < 0.5 * ppl["2", "shuffled"] and ppl["2", "image"] < 1.5
    assert first["steps"] == second["steps"] == 40 and first["tokens"] == second["tokens"]


def test_frozen_parts_stay_equal_to_the_bit(setup: Callable[..., Setup]) -> None:
    made = setup()
    before, encoder = weights(made.language), made.encoder.fingerprint
    projector = Projector(made.encoder.dim, made.language.dim)
    start = [parameter.clone() for parameter in projector.parameters()]
    made.features.fill()
    changed = lambda: [not torch.equal(value, before[name]) for name, value in weights(made.language).items()]  # noqa: E731
    library.train(made.stages[0], projector, made.language, made.features, made.options, made.folders[0])
    assert not any(changed())
    assert not any(map(torch.equal, projector.parameters(), start))
    library.train(made.stages[1], projector, made.language, made.features, made.options, made.folders[1])
    assert all(changed())
    made.language.restore()
    assert not any(changed())
    assert PixelEncoder("pixels", patch=16, size=32).fingerprint == encoder


@pytest.mark.parametrize("cached", [True, False])
def test_perplexity_does_not_depend_on_the_batch(cached: bool, setup: Callable[..., Setup]) -> None:
    made = setup()
    made.features.fill()
    projector = Projector(made.encoder.dim, made.language.dim)
    val = [
        dataclasses.replace(sample, text=made.language.caption([("red " * (i % 4 + 1), True)]))
        for i, sample in enumerate(made.stages[0].val)
    ]
    images = [sample.image for sample in val]
    found = []
    for size in (1, 5, 12):
        options = dataclasses.replace(made.options, micro_batch_size=size, cache=made.options.cache if cached else None)
        features = VisualFeatures(made.encoder, made.images, options)
        found.append(library.score(val, images, projector, made.language, features, options))
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-5)
    assert found[0].perplexity == pytest.approx(found[2].perplexity, rel=1e-5)
    assert len({(score.tokens, score.answer_bytes) for score in found}) == 1


def test_ppl2_starts_from_ppl1_and_leaves_the_language_model_as_it_was(setup: Callable[..., Setup]) -> None:
    made = setup(rates=(1e-2, 1e-12))
    before = weights(made.language)
    first, second = made.run()
    for kind in ("image", "shuffled", "without_image"):
        assert first[kind]["perplexity"] == pytest.approx(second[kind]["perplexity"], rel=1e-4)
    made = setup("other", rates=(1e-2, 1e-2))
    made.run()
    assert all(torch.equal(value, before[name]) for name, value in weights(made.language).items())


def test_an_update_depends_neither_on_the_micro_batch_nor_on_the_cache(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(float(clip(*given))))
    whole, parts = setup("12"), setup("5", micro_batch_size=5)
    parts.features = VisualFeatures(parts.encoder, parts.images, dataclasses.replace(parts.options, cache=None))
    results = [whole.run(), parts.run()]
    for one, other in zip(*results, strict=True):
        assert one["image"]["perplexity"] == pytest.approx(other["image"]["perplexity"], rel=1e-3)
    assert len(norms) == 16 and norms[:8] == pytest.approx(norms[8:], rel=1e-2)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_run_continues_to_the_result_of_the_unbroken_one(
    stage: int, setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = setup("unbroken", save_interval=2).run()
    real, calls = ProbeFolder.save, []

    def killed(self: ProbeFolder, step: int, tensors: Any) -> None:
        real(self, step, tensors)
        calls.append(step)
        if len(calls) == 1 + 2 * stage:  # two saves in each stage
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProbeFolder, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            setup("killed", save_interval=2).run()
    assert calls[-1] == 2
    found = setup("killed", save_interval=2).run()
    for one, other in zip(found, expected, strict=True):
        for result in (one, other):
            result.pop("seconds")
        assert one == other
    made = setup("killed", save_interval=2)
    monkeypatch.setattr(library, "train", None)  # a finished stage is not trained again
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in made.run()] == expected
    assert not list(made.folders[stage].folder.glob("state.pt"))


def test_a_loss_that_is_not_finite_ends_the_run(setup: Callable[..., Setup]) -> None:
    made = setup(rates=(1e30, 1e-5), max_steps=8, epochs=2)
    with pytest.raises(ValueError, match=r"--lr1 1e\+30: the loss of pixels is nan at step .*Choose a lower"):
        made.run()


def test_bits_per_byte_by_hand() -> None:
    """Two answers of 3 and 5 bytes whose tokens, with the end tokens, have probabilities 1/2 (four) and 1/4 (three)."""
    score = Score(nll=4 * math.log(2) + 3 * math.log(4), tokens=7, answer_bytes=8)
    assert score.bits_per_byte == pytest.approx(10 / 8)
    assert score.perplexity == pytest.approx(2 ** (10 / 7))


def test_no_sample_keeps_its_image_and_no_image_is_on_both_sides() -> None:
    images = [number // 3 for number in range(60)]
    assert all(one != other for one, other in zip(images, dialogues.exchanged_images(images, 0), strict=True))
    train, held = dialogues.split_by_image(images, 0.2, 0)
    assert sorted(train + held) == list(range(60)) and len(held) == 12
    assert not {images[number] for number in train} & {images[number] for number in held}
