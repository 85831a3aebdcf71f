"""A causal language model of transformers with its tokenizer, and the tokens of captions and conversations."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from genlip_megatron.data.text import Turns
from genlip_megatron.evaluate.projector import Text
from genlip_megatron.optional import need

_CHATML = ("<|im_start|>", "<|im_end|>")
_SYSTEM = "You are a helpful assistant."


class LanguageModel:
    """The language model under an encoder.

    Args:
        name: folder, or name on the hub.
        model: with float32 weights on its device, in evaluation mode: dropout stays off.
        tokenizer: its tokenizer.

    Attributes:
        fingerprint: hexadecimal digest of the weights as they were opened.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        digest = hashlib.blake2b(digest_size=16)
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.fingerprint = digest.hexdigest()

    @property
    def dim(self) -> int:
        """E, width of its embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence, if its configuration limits them."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def restore(self) -> None:
        """Load the weights again, after training has changed them."""
        fresh, _ = _load(self.name)
        self.model.load_state_dict(fresh.state_dict())

    def _ids(self, text: str) -> list[int]:
        """Ids of a text. Control tokens that it spells are ordinary text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _start(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def caption(self, turns: Turns) -> Text:
        """LLaVA's ``plain``: start token, image, the answers, end token. Questions are left out.

        Without a start token in the tokenizer the end token stands in for it, so that the first token of an answer is
        predicted also without an image.
        """
        answers = " ".join(text for text, is_answer in turns if is_answer)
        ids = self._ids(answers)
        end = int(self.tokenizer.eos_token_id)
        loss = [False, *[True] * len(ids), True]
        return Text([self._start(), *ids, end], loss, 1, len(answers.encode()))

    def conversation(self, turns: Turns) -> Text:
        """The turns as ChatML if the tokenizer has its control tokens, else as in LLaVA-1.5: ``USER:``, ``ASSISTANT:``.

        The image stands first in the first question, where LLaVA moves ``<image>`` too. Answers and the end token
        after each carry loss.
        """
        vocabulary = self.tokenizer.get_vocab()
        chatml = all(token in vocabulary for token in _CHATML)
        if chatml:
            user, assistant, newline = "user\n", "assistant\n", self._ids("\n")
            begin, end = ([vocabulary[token]] for token in _CHATML)
            start = [*begin, *self._ids(f"system\n{_SYSTEM}"), *end, *newline]
        else:
            user, assistant, newline = "USER: ", "ASSISTANT: ", []
            begin, end, start = [], [int(self.tokenizer.eos_token_id)], [self._start()]
        parts, image_at = [(start, False)], 0  # (ids, whether they are an answer)
        for text, is_answer in turns if not turns[0][1] else [("", False), *turns]:
            parts.append(([*begin, *self._ids(assistant if is_answer else user)], False))
            if is_answer:
                parts += [([*self._ids(text), *end], True), (newline, False)]
                continue
            if not image_at:
                image_at = sum(len(ids) for ids, _ in parts)
                text = f"\n{text}" if text else ""
            parts.append(([*self._ids(text), *end, *newline] if chatml else self._ids(f"{text} "), False))
        return Text(
            [token for ids, _ in parts for token in ids],
            [answer for ids, answer in parts for _ in ids],
            image_at,
            sum(len(text.encode()) for text, is_answer in turns if is_answer),
        )


def open_language_model(name: str, device: torch.device | str = "cpu") -> LanguageModel:
    """Open a causal language model and its tokenizer.

    Args:
        name: a folder that transformers wrote, or a name on the hub.
        device: where its weights go.

    Raises:
        ValueError: not to be found, no causal language model that takes ``inputs_embeds``, or no tokenizer.
    """
    need("transformers")
    tokenizer = _tokenizer(name)
    model, report = _load(name)
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(
            f"--llm {name}: not a causal language model, or its weights are incomplete: they lack {missing[0]} "
            f"({len(missing)} in all). Name a text model, or download it again."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"--llm {name}: its tokenizer has {len(tokenizer)} tokens, and its embedding {rows}. Copy the model's own "
            "tokenizer files into the folder."
        )
    model.requires_grad_(False).eval().to(device)
    _check_causal(model, name)
    return LanguageModel(name, model, tokenizer)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _hint(name: str) -> str:
    if Path(name).is_dir():
        return " Download the folder again."
    return " Without a network, name a folder that holds config.json and the weights."


def _tokenizer(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--llm {name}: cannot be opened ({_first_line(error)}).{_hint(name)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"--llm {name}: model_type {config.model_type!r} is not a causal language model. Name a text model such as "
            "Qwen2.5, Llama or SmolLM2."
        )
    missing = f"--llm {name}: no tokenizer. Copy the tokenizer files of the model into the folder."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:  # each tokenizer class fails in its own way
        raise ValueError(missing) from None
    # Without files, transformers makes a tokenizer without vocabulary.
    ids = tokenizer("A picture of a cat.", add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ValueError(missing)
    if tokenizer.eos_token_id is None:
        raise ValueError(f'--llm {name}: its tokenizer has no end token. Set "eos_token" in tokenizer_config.json.')
    return tokenizer


def _load(name: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--llm {name}: its weights cannot be loaded ({_first_line(error)}).{_hint(name)}") from None
    return tuple(loaded)  # (model, report)


@torch.no_grad()
def _check_causal(model: Any, name: str) -> None:
    """Raise ValueError if a token changes the logits before it, as in a masked language model."""
    embedding = model.get_input_embeddings()
    pairs = torch.tensor([[0, 1], [0, 2]], device=embedding.weight.device)
    try:
        first, second = model(inputs_embeds=embedding(pairs)).logits[:, 0].float()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--llm {name}: does not take inputs_embeds ({_first_line(error)}). Name another.") from None
    if not torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max())):
        raise ValueError(f"--llm {name}: not a causal language model: a token sees those after it. Name another.")
