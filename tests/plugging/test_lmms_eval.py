"""GenLIP as a model of lmms-eval: answers and likelihoods equal the exported model's, in the order of the requests.

With lmms-eval installed, the tests run against the library and its evaluator. Otherwise they run against stand-ins for
the classes that a model needs.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from tests.plugging.conftest import IMAGE_SIZE

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
NAMES = ("red", "green", "blue", "grey")


class Lmms(abc.ABC):
    """The interface of lmms_eval.api.model.lmms."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any:
        """Costs and whether they are greedy."""

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any:
        """Texts."""

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any:
        """Texts."""

    @classmethod
    def create_from_arg_string(cls, text: str, additional: dict[str, Any] | None = None) -> Any:
        """A model from ``name=value,name=value``."""
        arguments = dict(part.split("=") for part in text.split(",") if part)
        return cls(**arguments, **{k: v for k, v in (additional or {}).items() if v is not None})


def copied_modules() -> dict[str, ModuleType]:
    """Modules of lmms-eval and accelerate with what the adapter imports."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": dataclasses.make_dataclass("GenerationResult", ["text"])},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.registry": {"register_model": lambda *names: lambda cls: cls},
        "accelerate": {"Accelerator": lambda: SimpleNamespace(process_index=0, num_processes=1)},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return modules


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """The adapter's module, on the library or on the copy."""
    name = "genlip_megatron.integrations.lmms_eval"
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for key, module in copied_modules().items():
                patch.setitem(sys.modules, key, module)
        yield importlib.import_module(name)
    if not INSTALLED:
        del sys.modules[name]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Five photographs of noise."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (50, 40 + i, 3), dtype=np.uint8)) for i in range(5)]


@pytest.fixture()
def model(adapter: ModuleType, exported: Path, pictures: list[Image.Image]) -> Any:
    """The adapter on the exported folder, with a task "noise" over the five pictures."""
    loaded = adapter.GenLIP.create_from_arg_string(f"pretrained={exported},device=cpu", {"batch_size": 2})
    loaded.task_dict = {"noise": {"test": [{"image": picture, "name": "a b"} for picture in pictures]}}
    return loaded


def request(document: int, context: str, second: Any, visuals: Any = None) -> Any:
    """Like lmms_eval.api.instance.Instance for a simple model."""
    arguments = (context, second, visuals or (lambda doc: [doc["image"]]), document, "noise", "test")
    return SimpleNamespace(args=arguments)


def one_sample(folder: Path, picture: Image.Image, prompt: str, answer: str) -> torch.Tensor:
    """Log-probabilities [answer, V] that predict each token of the answer, computed for one sample."""
    model = GenLIPForCausalLM.from_pretrained(folder).eval()
    tokens = model_tokens(folder, prompt) + model_tokens(folder, answer)
    with torch.no_grad():
        pixels = GenLIPImageProcessor(size=IMAGE_SIZE)([picture])["pixel_values"]
        logits = model(torch.tensor([tokens]), pixels).logits[0]
    return logits.log_softmax(-1)[-len(model_tokens(folder, answer)) - 1 : -1]


def model_tokens(folder: Path, text: str) -> list[int]:
    """Ids of a text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def test_loglikelihood_is_the_cost_of_only_the_answer(model: Any, exported: Path, pictures: list[Image.Image]) -> None:
    cases = [(3, "What is it?", " a cat"), (0, "<image>\nColour?", "blue"), (1, "", lambda doc: doc["name"])]
    results = [result.text for result in model.loglikelihood([request(*case) for case in cases])]
    words = [("What is it?", "a cat"), ("Colour?", "blue"), (model.processor.prompt, "a b")]
    for (cost, greedy), (document, *_), (prompt, answer) in zip(results, cases, words, strict=True):
        predicted = one_sample(exported, pictures[document], prompt, answer)
        ids = torch.tensor(model_tokens(exported, answer))
        assert cost == pytest.approx(-float(predicted.gather(1, ids[:, None]).sum()), abs=1e-3)
        assert greedy == bool((predicted.argmax(-1) == ids).all())


def test_answer_that_greedy_decoding_gives_is_greedy(model: Any) -> None:
    vocabulary = model.processor.tokenizer
    first = model.generate_until([request(0, "What?", {"max_new_tokens": 1})])[0]
    if len(vocabulary(first)["input_ids"]) == 1:
        assert model.loglikelihood([request(0, "What?", first)])[0].text[1]
    costs = [model.loglikelihood([request(0, "What?", letter)])[0].text for letter in "abcdefghij"]
    assert sum(greedy for _, greedy in costs) <= 1


def test_answers_keep_their_order_and_end_at_stop_texts(
    model: Any, exported: Path, pictures: list[Image.Image]
) -> None:
    kinds: list[dict[str, Any]] = [{"max_new_tokens": 12}, {"max_new_tokens": 6, "temperature": 0}]
    requests = [request(i, f"Say {i}." + " more" * i, kinds[i % 2]) for i in range(5)]
    answers = model.generate_until(requests)
    processor = model.processor
    for answer, (i, one) in zip(answers, enumerate(requests), strict=True):
        inputs = processor(images=[pictures[i]], text=one.args[0])
        tokens = model.model.generate(**inputs, max_new_tokens=kinds[i % 2]["max_new_tokens"], do_sample=False)
        assert answer == processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])[0].strip()
    whole = max(answers, key=len)
    index, stop = answers.index(whole), whole[2]
    cut = model.generate_until([request(index, requests[index].args[0], kinds[index % 2] | {"until": [stop, "\n\n"]})])
    assert len(whole) > 3 and cut == [whole.split(stop)[0].strip()]


def test_own_prompt_replaces_the_tasks_text(adapter: ModuleType, exported: Path, model: Any) -> None:
    own = adapter.GenLIP(pretrained=str(exported), device="cpu", own_prompt=True)
    own.task_dict = model.task_dict
    arguments = {"max_new_tokens": 8}
    assert own.generate_until([request(2, "Anything else", arguments)]) == model.generate_until(
        [request(2, model.processor.prompt, arguments)]
    )


@pytest.mark.parametrize("visuals", [lambda doc: [], lambda doc: [doc["image"]] * 2, lambda doc: ["film.mp4"]])
def test_request_without_exactly_one_image_names_its_document(model: Any, visuals: Any) -> None:
    with pytest.raises(ValueError, match="task noise, document 4 of test: .*exactly one PIL image"):
        model.generate_until([request(4, "What?", {}, visuals)])


@pytest.mark.parametrize("batch_size", ["auto", 0])
def test_a_batch_size_that_is_not_a_number_is_refused(adapter: ModuleType, exported: Path, batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        adapter.GenLIP(pretrained=str(exported), batch_size=batch_size)


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
def test_evaluator_of_lmms_eval_runs_both_kinds_of_task(exported: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    manifest = importlib.import_module("genlip_megatron.integrations.lmms_eval").manifest()
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    rows = {"image": [Image.new("RGB", (40, 40), c) for c in colours], "answer": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    common = f"""
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {tmp_path}/rows.parquet}}
test_split: test
doc_to_text: "Which colour?"
doc_to_visual: !function visuals.images
"""
    (tmp_path / "visuals.py").write_text(
        "def images(doc):\n    return [doc['image'].convert('RGB')]\n"
        "def name(doc):\n    return ['red', 'green', 'blue', 'grey'][doc['answer']]\n"
    )
    (tmp_path / "colour_choice.yaml").write_text(
        f"task: colour_choice\noutput_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: {list(NAMES)}\n"
        f"metric_list:\n  - metric: acc\n{common}"
    )
    (tmp_path / "colour_said.yaml").write_text(
        "task: colour_said\noutput_type: generate_until\ndoc_to_target: !function visuals.name\n"
        "generation_kwargs: {max_new_tokens: 4, until: ['.']}\n"
        f"metric_list:\n  - metric: exact_match\n{common}"
    )
    results = simple_evaluate(
        model="genlip",
        model_args=f"pretrained={exported}",
        tasks=["colour_choice", "colour_said"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    model = GenLIPForCausalLM.from_pretrained(exported).eval()
    assert model.config.vocab_size == 257
    right = 0
    for image, answer in zip(rows["image"], rows["answer"], strict=True):
        costs = []
        for word in NAMES:
            predicted = one_sample(exported, image, "Which colour?", word)
            ids = torch.tensor(model_tokens(exported, word))
            costs.append(-float(predicted.gather(1, ids[:, None]).sum()))
        right += int(np.argmin(costs)) == answer
    assert results["results"]["colour_choice"]["acc,none"] == pytest.approx(right / 3)
    assert "exact_match,none" in results["results"]["colour_said"]
