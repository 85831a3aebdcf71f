"""Captions from the Megatron model without a key-value cache, as a reference for ``infer/caption.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from genlip_megatron import megatron_patches
from genlip_megatron.batch import Sample
from genlip_megatron.config import ONE_RANK, override
from genlip_megatron.convert.hf_folder import preprocessor_config
from genlip_megatron.device import current_device
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.infer.caption import Decoding, prompt_ids
from genlip_megatron.infer.prepare import Prepared
from genlip_megatron.tokenizer import load_tokenizer


class RecomputingCaptioner:
    """Captions batches of images in this process; has the interface of ``Captioner``.

    Args:
        place: folder of a run, or one of its checkpoints.
        log: gets a line for each damaged checkpoint that is skipped.
        prompt: of the captions; None: the run's.
        decoding: how tokens are chosen; top-p, top-k and beams are not supported.
        dtype: "auto" for the run's, "fp32" or "bf16".
        device: "auto" or the kind of device that Megatron-Core uses here.
        tokenizer: file to use instead of the run's.

    Raises:
        ValueError: no checkpoint, or an unsupported option.
    """

    def __init__(
        self,
        place: str | Path,
        log: Callable[[str], None],
        prompt: str | None,
        decoding: Decoding,
        dtype: str = "auto",
        device: str = "auto",
        tokenizer: str = "",
    ) -> None:
        for flag, value, plain in (
            ("top-p", decoding.top_p, 1.0),
            ("top-k", decoding.top_k, 0),
            ("num-beams", decoding.num_beams, 1),
        ):
            if value != plain:
                raise ValueError(f"--{flag} {value}: not with --recompute, which supports only {plain}")
        if dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--dtype {dtype}: with --recompute use auto, fp32 or bf16")
        megatron_patches.install()
        from genlip_megatron.checkpoint import loading
        from genlip_megatron.model.genlip import build_model
        from genlip_megatron.model.specs import transformer_config
        from genlip_megatron.parallel import groups

        found = loading.find(place, True, log)
        if found is None:
            raise ValueError(f"--load {place}: no checkpoint found (no folder iter_NNNNNNN). --recompute needs one")
        here = current_device()
        if device not in ("auto", here.type, str(here)):
            raise ValueError(f"--device {device}: with --recompute use {here.type}, the device of this machine")
        precision = {} if dtype == "auto" else {"train.precision": dtype}
        config = override(loading.read_config(found[0]), {**ONE_RANK, **precision})
        self.place = found[0]
        self.prompt = config.data.prompt if prompt is None else prompt
        self.image_processor = GenLIPImageProcessor(**preprocessor_config(config.data))
        self._tokenizer = load_tokenizer(tokenizer or config.data.tokenizer, config.model.vocab_size)
        self._prompt, self._decoding = prompt_ids(self._tokenizer, self.prompt), decoding
        groups.initialize(config)
        self._end = groups.finalize
        self._model: list[torch.nn.Module] = list(build_model(config, transformer_config(config)))
        loading.load_weights(found[0], self._model, log)

    def tokens(self, images: Sequence[Prepared]) -> list[list[int]]:
        """New tokens of each image, without the end token."""
        from genlip_megatron.infer.generate import generate

        samples = [Sample(image.patches, image.rows, image.columns, self._prompt) for image in images]
        decoding = self._decoding
        temperature = decoding.temperature if decoding.samples else 0.0
        with torch.inference_mode():
            return generate(
                self._model,
                samples,
                self._tokenizer.closing_ids[:1],
                decoding.max_new_tokens,
                temperature,
                decoding.seed,
            )

    def text(self, ids: Sequence[int]) -> str:
        """The caption of tokens."""
        return self._tokenizer.decode(ids).strip()

    def close(self) -> None:
        """End the process group."""
        self._end()
