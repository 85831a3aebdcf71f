"""Caption images with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genlip_megatron.data.text import encode_prompt
from genlip_megatron.infer.load import Loaded
from genlip_megatron.infer.prepare import Prepared, packed

GREEDY_TEMPERATURE = 1e-6  # the paper's; equivalent to greedy decoding


@dataclass(frozen=True)
class Decoding:
    """Decoding settings; the defaults are the paper's.

    Attributes:
        max_new_tokens: longest caption.
        temperature: up to 1e-6 decoding is greedy, above it tokens are sampled.
        top_p: sample among the likeliest tokens whose probabilities add up to this.
        top_k: sample among the K likeliest tokens; 0: among all.
        num_beams: number of beams.
        seed: seed of the sampling.

    Raises:
        ValueError: a value is out of range or has no effect; names the flag.
    """

    max_new_tokens: int = 256
    temperature: float = GREEDY_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("num_beams", 1), ("seed", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}")
        if self.seed >= 2**64:
            raise ValueError(f"--seed {self.seed}: must be from 0 to 2**64 - 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not self.samples and (self.top_p < 1 or self.top_k):
            name, value = ("top-p", self.top_p) if self.top_p < 1 else ("top-k", self.top_k)
            raise ValueError(
                f"--{name} {value}: no effect on greedy decoding. Set --temperature above {GREEDY_TEMPERATURE}, for "
                "example 1.0."
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > GREEDY_TEMPERATURE

    def arguments(self) -> dict[str, Any]:
        """Arguments for transformers' ``generate``."""
        drawing = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.samples else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.samples,
            **drawing,
        }


class Captioner:
    """Captions batches of images.

    Args:
        loaded: a model with its text parts.
        prompt: text before each caption.
        decoding: decoding settings.

    Raises:
        ValueError: the prompt is empty.
    """

    def __init__(self, loaded: Loaded, prompt: str, decoding: Decoding) -> None:
        assert loaded.tokenizer is not None
        self._loaded, self._tokenizer = loaded, loaded.tokenizer
        self._arguments = decoding.arguments()
        self._prompt = torch.tensor([prompt_ids(loaded.tokenizer, prompt)], device=loaded.model.device)
        torch.manual_seed(decoding.seed)

    @torch.inference_mode()
    def tokens(self, images: Sequence[Prepared]) -> list[list[int]]:
        """New tokens of each good image, without the end token."""
        patches, grid = packed(images, self._loaded.model.device)
        ids = self._prompt.expand(len(images), -1)
        end = self._tokenizer.closing_ids[0]
        found = self._loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches,
            image_grid_hw=grid,
            eos_token_id=end,
            pad_token_id=end,
            **self._arguments,
        )
        new = found[:, ids.shape[1] :].tolist()
        return [row[: row.index(end)] if end in row else row for row in new]

    def text(self, ids: Sequence[int]) -> str:
        """The caption of token ids."""
        return self._tokenizer.decode(ids).strip()

    def close(self) -> None:
        """Nothing to close."""


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, cleaned as in training.

    Raises:
        ValueError: it is empty, contains a control token, or characters that the tokenizer cannot write.
    """
    ids = encode_prompt(prompt, tokenizer, "--prompt")
    if not ids:
        raise ValueError(f"--prompt {prompt!r}: it is empty. The model needs a prompt to continue.")
    return ids
