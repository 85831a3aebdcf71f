"""Turn images and prompts into the model's input, and generated tokens into text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin

# For a file that is loaded first, version 4 of transformers copies only what this file itself imports.
from .shared_genlip import is_batch

_IMAGE_MARKER = re.compile("<image>", re.IGNORECASE)
_MARKUP = re.compile(r"<\|.+\|>", re.DOTALL)
_TOKENIZER_OPTIONS = ("padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length")
# Options of other processors that describe what this one always does.
_ALWAYS = {"add_special_tokens": False, "return_attention_mask": True, "return_token_type_ids": False}


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
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The arguments of ``GenLIPForCausalLM``'s ``forward`` and ``generate``.

        Args:
            images: one image or a list, as for ``GenLIPImageProcessor``; None: only text.
            text: one prompt for all images, or one for each; None: the model's prompt. An ``<image>`` marker is
                removed, since the image always comes first. No special token is added.
            return_tensors: "pt" (the default) or "np".
            kwargs: ``padding`` (default: True), ``padding_side`` ("left"), ``pad_to_multiple_of``, ``truncation`` and
                ``max_length`` of the tokenizer; also within ``text_kwargs``, ``images_kwargs`` or ``common_kwargs``.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 [B, L], and with images ``pixel_values`` and, for native sizes,
            ``image_grid_hw``.

        Raises:
            ValueError: an invalid image, an empty prompt, a prompt with several image markers or a control token, a
                number of texts that does not match the images, or an option that is unknown or has no effect.
        """
        if images is None and text is None:
            raise ValueError("images = None, text = None: give at least one of them")
        texts = self.prompt if text is None else text
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not all(isinstance(one, str) for one in texts):
            raise ValueError(
                f"text of {type(text).__name__}: expected a text or a list of texts. Name the arguments: images=, text="
            )
        options = {"return_tensors": return_tensors, **kwargs}
        for group in ("text_kwargs", "images_kwargs", "common_kwargs"):
            options |= options.pop(group, None) or {}
        options = {name: value for name, value in options.items() if value is not None}
        tensors = options.pop("return_tensors", "pt")
        of_text = self._text_options(options)
        data: dict[str, Any] = {}
        count = None
        if images is not None:
            images = list(images) if is_batch(images) else [images]
            # Others' code lists the images of each text.
            images = [x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x for x in images]
            data |= self.image_processor(images, return_tensors=tensors, **options)
            count = len(images)
        elif options:
            name, value = next(iter(options.items()))
            raise ValueError(f"{name} = {value!r}: not an option without images. Remove it")
        texts = list(texts) * (count or 1) if text is None or isinstance(text, str) else list(texts)
        if count is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} texts for {count} images: expected one for all, or one for each")
        if not texts:
            raise ValueError("text is empty: expected at least one")
        texts = [self._clean(one) for one in texts]
        if "" in texts:
            raise ValueError(f"text {texts.index('')} of {len(texts)} is empty: the model needs a prompt")
        encoded = self.tokenizer(texts, add_special_tokens=False, return_tensors=tensors, **of_text)
        data |= {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return BatchFeature(data)

    @staticmethod
    def _text_options(options: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer's options, removed from ``options``.

        Raises:
            ValueError: an option with another value than the only one, or without effect.
        """
        for name, always in _ALWAYS.items():
            if (value := options.pop(name, always)) != always:
                raise ValueError(f"{name} = {value!r}: only {always!r} is supported. Remove it")
        given = {name: options.pop(name) for name in _TOKENIZER_OPTIONS if name in options}
        truncates = given.get("truncation") not in (None, False, "do_not_truncate")
        if "max_length" in given and not truncates and given.get("padding") != "max_length":
            raise ValueError(f"max_length = {given['max_length']!r}: no effect. Add truncation=True")
        return {"padding": True, "padding_side": "left", **given}

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
