"""Turn images and prompts into the model's input, and generated tokens into text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin

_IMAGE_MARKER = re.compile("<image>", re.IGNORECASE)
_MARKUP = re.compile(r"<\|.+\|>", re.DOTALL)


class GenLIPProcessor(ProcessorMixin):
    """A ``GenLIPImageProcessor`` and a tokenizer.

    Args:
        image_processor: of the model's images.
        tokenizer: its end token closes captions.
        prompt: of captions, used if no text is given.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):
        # Before version 5 of transformers; version 5 reads the arguments of __init__ instead.
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        prompt: str = "Describe the image in detail.",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.prompt = prompt

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """The arguments of ``GenLIPForCausalLM``'s ``forward`` and ``generate``.

        Args:
            images: one image or a list, as for ``GenLIPImageProcessor``; None: only text.
            text: one prompt for all images, or one for each; None: the model's prompt. An ``<image>`` marker is
                removed, since the image always comes first. No special token is added.
            return_tensors: "pt" or "np".

        Returns:
            ``input_ids`` and ``attention_mask`` int64 [B, L], padded on the left, and with images ``pixel_values`` and,
            for native sizes, ``image_grid_hw``.

        Raises:
            ValueError: an invalid image, an empty prompt, a prompt with several image markers or a control token, or a
                number of texts that does not match the images.
        """
        if images is None and text is None:
            raise ValueError("images = None, text = None: give at least one of them")
        data: dict[str, Any] = {}
        count = None
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors)
            count = len(data["image_grid_hw"] if "image_grid_hw" in data else data["pixel_values"])
        texts = self.prompt if text is None else text
        texts = [texts] * (count or 1) if isinstance(texts, str) else list(texts)
        if count is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} texts for {count} images: expected one for all, or one for each")
        if not texts:
            raise ValueError("text is empty: expected at least one")
        texts = [self._clean(one) for one in texts]
        if "" in texts:
            raise ValueError(f"text {texts.index('')} of {len(texts)} is empty: the model needs a prompt")
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors=return_tensors
        )
        data |= {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return BatchFeature(data)

    def _clean(self, text: str) -> str:
        """A prompt as training cleans it."""
        if (markers := len(_IMAGE_MARKER.findall(text))) > 1:
            raise ValueError(f"text has {markers} <image> markers: the model reads one image")
        for token in self.tokenizer.added_tokens_decoder.values():
            if (token.special or _MARKUP.fullmatch(token.content)) and token.content in text:
                raise ValueError(f"text contains the control token {token.content!r}. Remove it")
        return _IMAGE_MARKER.sub("", text).strip()

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Texts of generated tokens, each up to its first end token.

        Args:
            sequences: token ids [B, T]. ``generate`` returns the prompt too; remove it with
                ``sequences[:, input_ids.shape[1]:]``.
        """
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def decode(self, sequence: Any, **kwargs: Any) -> str:
        """Text of one sequence of token ids [T], up to its first end token."""
        ids = [int(token) for token in sequence]
        end = self.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **options | kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's arguments that a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_hw"]
