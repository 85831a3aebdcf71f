"""GenLIP as a model of lmms-eval, without an LLM: the answers of the pretrained model itself.

    lmms-eval --model genlip --model_args pretrained=FOLDER --tasks TASK --batch_size 8

lmms-eval finds the model by the entry point of this package in the group ``lmms_eval.models``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

MAX_NEW_TOKENS = 256
_GENERATION = ("max_new_tokens", "min_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k")
_SAMPLING = ("temperature", "top_p", "top_k")


def manifest() -> Any:
    """This model's entry in lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="genlip", simple_class_path=f"{__name__}.GenLIP")


@register_model("genlip")
class GenLIP(lmms):
    """An exported folder; one image and one prompt per request, in as many processes as ``accelerate launch`` starts.

    Args:
        pretrained: the folder, or its name on the Hub; its Python files are executed.
        device: "cuda", "cpu" and so on; with several processes each uses its own GPU.
        dtype: dtype of the weights; "auto": as stored.
        batch_size: requests per batch.
        own_prompt: use the prompt of the training instead of the task's text.
        max_batch_size: ignored; lmms-eval passes it to every model.

    Raises:
        ValueError: the batch size is not a whole number of at least 1.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        own_prompt: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size!r}: must be a whole number of at least 1")
        self.batch_size, self.own_prompt = int(batch_size), own_prompt
        # lmms-eval distributes documents over ranks and gathers their answers through the accelerator.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = self.accelerator.device if self._world_size > 1 else torch.device(device or default)
        model: Any = AutoModelForCausalLM.from_pretrained(pretrained, trust_remote_code=True, dtype=dtype)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, each cut before the first stop text of its request, and stripped.

        Args:
            requests: their ``args`` are (context, generation arguments, document to images, document, task, split).
                By default generation is greedy with at most 256 tokens.

        Raises:
            ValueError: a request does not have exactly one image; names its task and document.
        """
        return self._in_batches(requests, lambda request: repr(sorted(request.args[1].items())), self._answers)

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(negative log-likelihood of the continuation, whether greedy decoding gives it), as ``text`` of a result.

        lmms-eval 0.7 turns a plain pair into a string that its metrics cannot read. The sign is that of lmms-eval's own
        models: the evaluator picks the choice with the smallest value.

        Args:
            requests: their ``args`` are (context, continuation or document to continuation, document to images,
                document, task, split).

        Raises:
            ValueError: a request does not have exactly one image, or its continuation is empty; names its task and
                document.
        """
        return self._in_batches(requests, lambda request: None, self._costs)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "GenLIP answers one prompt about one image; it was not trained on multi-round conversations"
        )

    def _in_batches(
        self, requests: Sequence[Any], key: Callable[[Any], Hashable], compute: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Results in the order of ``requests``; only requests with equal keys share a batch."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[key(request)].append(index)
        results: list[Any] = [None] * len(requests)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                with torch.inference_mode():
                    computed = compute([requests[index] for index in batch])
                for index, result in zip(batch, computed, strict=True):
                    results[index] = result
        return results

    def _answers(self, batch: list[Any]) -> list[str]:
        arguments = batch[0].args[1]
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        options |= {name: arguments[name] for name in _GENERATION if arguments.get(name) is not None}
        if not options["do_sample"] or options.get("temperature") == 0:
            options = {name: value for name, value in options.items() if name not in _SAMPLING} | {"do_sample": False}
        inputs = self._tokens([self._ids(self._prompt(request)) for request in batch], "left") | self._images(batch)
        tokens = self.model.generate(**inputs, **options)
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
        stops = arguments.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            texts = [text.split(stop, 1)[0] for text in texts] if stop else texts
        return [text.strip() for text in texts]

    def _costs(self, batch: list[Any]) -> list[GenerationResult]:
        prompts = [self._ids(self._prompt(request)) for request in batch]
        answers = [self._ids(self._continuation(request)) for request in batch]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = self._tokens(rows, "right") | self._images(batch)
        logits = self.model(**inputs).logits  # [B, L, V]
        results = []
        for row, prompt, answer in zip(logits, prompts, answers, strict=True):
            # [answer, V]: each answer token is predicted from the one before it.
            predicted = row[len(prompt) - 1 : len(prompt) - 1 + len(answer)].float().log_softmax(-1)
            target = torch.tensor(answer, device=row.device)
            cost = -predicted.gather(1, target[:, None]).sum()
            pair: Any = (float(cost), bool((predicted.argmax(-1) == target).all()))
            results.append(GenerationResult(pair))
        return results

    def _document(self, request: Any) -> Any:
        _, _, _, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _prompt(self, request: Any) -> str:
        """The task's text without image markers, or the model's own prompt if there is none."""
        text = "" if self.own_prompt else request.args[0].replace("<image>", "").strip()
        return text or self.processor.prompt

    def _continuation(self, request: Any) -> str:
        target = request.args[1]
        text = str(target(self._document(request)) if callable(target) else target).strip()
        if not text:
            raise ValueError(f"{_name(request)}: the continuation is empty, so it has no likelihood")
        return text

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tokens(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` int64 [B, L]."""
        data = self.processor.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return {name: data[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _images(self, batch: list[Any]) -> dict[str, Tensor]:
        """The model's image arguments, one image per request."""
        images = []
        for request in batch:
            visuals = request.args[2](self._document(request)) or []
            if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
                kinds = [type(visual).__name__ for visual in visuals]
                raise ValueError(f"{_name(request)}: visuals {kinds}; GenLIP takes exactly one PIL image per request")
            images.append(visuals[0])
        data = self.processor.image_processor(images, return_tensors="pt")
        return {
            name: x.to(self.device, self.model.dtype if x.is_floating_point() else x.dtype) for name, x in data.items()
        }


def _name(request: Any) -> str:
    return f"task {request.args[4]}, document {request.args[3]} of {request.args[5]}"
