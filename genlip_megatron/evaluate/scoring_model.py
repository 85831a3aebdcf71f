"""A GenLIP with its language head, opened for an evaluation by the name that ``--load`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.encoders.genlip import GenLIPEncoder
from genlip_megatron.encoders.random_weights import randomised
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.infer.caption import prompt_ids
from genlip_megatron.infer.load import Loaded, load, override_images


@dataclass(frozen=True)
class ScoringModel:
    """A model that gives texts a likelihood.

    Attributes:
        name: what the user called it.
        loaded: the model and its tokenizer.
        processor: prepares its images.
        prompt: text between image and texts.
        prompt_ids: its tokens.
        fingerprint: hexadecimal digest of the weights and the preprocessing.
    """

    name: str
    loaded: Loaded
    processor: GenLIPImageProcessor
    prompt: str
    prompt_ids: list[int]
    fingerprint: str

    def settings(self) -> dict[str, Any]:
        """What a table says about it."""
        native = self.processor.image_mode == "native"
        sizes = ("min_pixels", "max_pixels") if native else ("size", "fixed_resize")
        return {
            "encoder": self.name,
            "fingerprint": self.fingerprint,
            "place": str(self.loaded.place),
            "step": self.loaded.step,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "prompt": self.prompt,
            "images": {name: getattr(self.processor, name) for name in ("image_mode", *sizes)},
        }


def open_scoring_model(
    name: str,
    *,
    device: torch.device,
    log: Callable[[str], None],
    prompt: str | None = None,
    dtype: str = "auto",
    tokenizer: str = "",
    images: Mapping[str, Any] | None = None,
) -> ScoringModel:
    """Open ``[random:][genlip:]WHERE``.

    Args:
        name: a run, a checkpoint, or an exported or released folder. ``random:`` replaces its weights by random ones.
        device: where its weights go.
        log: called with a line about each damaged checkpoint that is skipped.
        prompt: None: that of its training.
        dtype: "fp32", "bf16", "fp16"; "auto": that of the stored weights.
        tokenizer: file to use instead of the one that the checkpoint or folder names.
        images: settings of ``override_images``.

    Raises:
        ValueError: no usable model, a model without a language head, or a setting that does not fit it.
    """
    rest = name.removeprefix("random:")
    where = rest.removeprefix("genlip:")
    if ":" in where and not Path(where).exists():
        raise ValueError(
            f"--load {name}: only GenLIP has a language head that can score texts. Name a run, a checkpoint "
            "iter_NNNNNNN or an exported folder."
        )
    loaded = load(where, log, device=device, dtype=dtype, tokenizer=tokenizer)
    if rest != name:
        loaded = replace(loaded, model=randomised(loaded.model))
    processor = override_images(loaded.image_processor, images or {})
    text = loaded.prompt if prompt is None else prompt
    ids = prompt_ids(loaded.tokenizer, text)
    # The digest of an encoder covers all weights of its module.
    fingerprint = GenLIPEncoder(name, loaded.model, processor).fingerprint
    return ScoringModel(name, loaded, processor, text, ids, fingerprint)
