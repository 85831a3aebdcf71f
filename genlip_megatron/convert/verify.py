"""Run the same batch through the Megatron model and the model of the other library, and compare.

Both compute in float32 on the CPU, with the rounding of the conversion applied to both, so they differ only in the
order of additions. Needs the memory of both models in float32.

Legend: N tokens of all samples, T text tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genlip_megatron.config import ONE_RANK, PATCH_VALUES, RunConfig, override
from genlip_megatron.convert.openclip import Description, state_dict
from genlip_megatron.optional import need, need_open_clip

# Relative to the largest absolute value. Another order of sums over thousands of channels gives about 1e-6; a misplaced
# tensor about 1.
TOLERANCE = 1e-4
# The same where a folded patch embedding was rounded to 16 bits, which the other model cannot repeat.
ROUNDED = 2e-2
# (rows, columns, text tokens) of each sample: images of different shapes, texts of different lengths.
_SAMPLES = ((3, 4, 7), (4, 2, 5))


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of two tensors, and the largest absolute value in the first.

    ``tolerance`` is relative to the latter."""

    what: str
    absolute: float
    largest: float
    tolerance: float = TOLERANCE

    @property
    def small(self) -> bool:
        """Whether it is within the tolerance; False for NaN."""
        return self.absolute <= self.tolerance * self.largest

    def __str__(self) -> str:
        return (
            f"{self.what}: largest difference {self.absolute:.3g}, values up to {self.largest:.3g} "
            f"({'within' if self.small else 'ABOVE'} the tolerance of {self.tolerance:.0e} of the largest value)"
        )


def compare_models(
    checkpoint: Path,
    config: RunConfig,
    released: Path,
    encoder_only: bool = False,
    dtype: torch.dtype | None = None,
    fields: dict[str, Any] | None = None,
) -> list[Difference]:
    """Differences of hidden states (of the embedding and each layer) and of logits; an encoder has no logits.

    Args:
        checkpoint: a Megatron checkpoint.
        config: of the run that saved it.
        released: a Hugging Face folder.
        encoder_only: the folder holds only the vision encoder.
        dtype: to which the conversion rounded the weights; None: no rounding.
        fields: of the Hugging Face configuration; None: those of the folder's ``config.json``, which is incomplete in
            a release.

    Raises:
        ValueError: transformers is not installed, or rejects the folder.
    """
    need("transformers")
    patches, texts = _inputs(config.model.vocab_size)
    hidden, logits, is_image = _megatron_outputs(checkpoint, config, patches, texts, dtype)
    from genlip_megatron.hf.configuration_genlip import GenLIPConfig
    from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, GenLIPVisionModel

    kind: Any = GenLIPVisionModel if encoder_only else GenLIPForCausalLM
    given = None if fields is None else GenLIPConfig(**fields)
    model = kind.from_pretrained(released, config=given, dtype=torch.float32).eval()
    _round(model, dtype)
    images = (torch.cat(patches), torch.tensor([(rows, columns) for rows, columns, _ in _SAMPLES]))
    with torch.no_grad():
        if encoder_only:
            theirs = model(*images, output_hidden_states=True).hidden_states
            return [_difference("hidden states", torch.stack(hidden)[:, is_image], torch.stack(theirs))]
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        mask = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
        output = model(ids, *images, attention_mask=mask, output_hidden_states=True)
    return [
        _difference("hidden states", torch.stack(hidden), torch.stack(output.hidden_states)),
        _difference("logits", logits, output.logits[mask]),
    ]


def compare_openclip(
    checkpoint: Path, config: RunConfig, described: Description, file: Path, dtype: torch.dtype | None = None
) -> list[Difference]:
    """Differences of the text's logits from those of OpenCLIP's model.

    Args:
        checkpoint: a Megatron checkpoint.
        config: of the run that saved it.
        described: OpenCLIP's configuration.
        file: OpenCLIP's weights.
        dtype: to which the conversion rounded the weights; None: no rounding.

    Raises:
        ValueError: OpenCLIP with GenLIP is not installed, or rejects the configuration or the weights.
    """
    need_open_clip()
    # DropPath, which only training uses, would need timm.
    trunk = {**described.model_cfg["genlip_cfg"], "drop_path_rate": 0.0}
    kind = importlib.import_module("open_clip.naflex_genlip_model").NaFlexGenLip
    state = state_dict(file)
    try:
        model = kind(**{**described.model_cfg, "genlip_cfg": trunk}).eval()
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except Exception as error:  # of any kind: OpenCLIP's own checks, torch's, Python's for a missing argument
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: converted, but OpenCLIP itself cannot load it to compare: {reason}") from None
    patches, texts = _inputs(config.model.vocab_size)
    _, ours, _ = _megatron_outputs(checkpoint, config, patches, texts, dtype)
    stored = {tensor.dtype for tensor in state.values()} if dtype is None else {dtype}
    if not described.folds:
        _round(model, dtype)
    mean, std = torch.tensor(described.mean), torch.tensor(described.std)
    logits = []
    for values, text, (rows, columns, _) in zip(patches, texts, _SAMPLES, strict=True):
        pixels = values.unflatten(1, (3, 16, 16)).permute(0, 2, 3, 1)  # [P, row, column, channel]
        image = {
            "patches": ((pixels / 2 + 0.5 - mean) / std).flatten(1)[None],
            "patch_coord": torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[None],
            "patch_valid": torch.ones(1, len(values), dtype=torch.bool),
        }
        valid = torch.ones(1, len(text), dtype=torch.bool)
        with torch.no_grad():
            output = model(image, torch.tensor([text]), valid)
        logits.append(output["logits"][0, len(values) :])
    tolerance = TOLERANCE if not described.folds or stored == {torch.float32} else ROUNDED
    return [replace(_difference("logits", ours, torch.cat(logits)), tolerance=tolerance)]


def _inputs(vocab_size: int) -> tuple[list[Tensor], list[list[int]]]:
    """(patches [P, 768] in [-1, 1], token ids) of each sample."""
    generator = torch.Generator().manual_seed(1)
    patches = [torch.empty(r * c, PATCH_VALUES).uniform_(-1, 1, generator=generator) for r, c, _ in _SAMPLES]
    return patches, [torch.randint(vocab_size, (count,), generator=generator).tolist() for *_, count in _SAMPLES]


def _difference(what: str, ours: Tensor, theirs: Tensor) -> Difference:
    return Difference(what, (ours - theirs).abs().max().item(), ours.abs().max().item())


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in model.parameters() if dtype is not None else ():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def _megatron_outputs(
    checkpoint: Path,
    config: RunConfig,
    patches: Sequence[Tensor],
    texts: Sequence[Sequence[int]],
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(the embedding's and each layer's output [N, D], logits [T, V] of the text, bool [N] of image tokens) of the
    Megatron model in this process."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.batch import Sample, pack_samples
    from genlip_megatron.checkpoint import loading
    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config
    from genlip_megatron.parallel import groups

    config = override(
        config,
        {**ONE_RANK, "train.precision": "fp32", "train.transformer_impl": "local", "parallel.recompute": "none"},
    )
    groups.initialize(config)
    (model,) = build_model(config, transformer_config(config))
    assert model.embed is not None and model.head is not None
    loading.load_weights(checkpoint, [model], print)
    _round(model, dtype)
    model.eval()
    samples = [
        Sample(image, rows, columns, text)
        for image, text, (rows, columns, _) in zip(patches, texts, _SAMPLES, strict=True)
    ]
    batch = pack_samples([samples], sum(rows * columns + count for rows, columns, count in _SAMPLES))
    states: list[Tensor] = []

    def keep(_: torch.nn.Module, inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[:, 0].clone())

    hooks = [module.register_forward_hook(keep) for module in (model.embed, *model.decoder.layers)]
    hidden = model.hidden_states(batch)
    for hook in hooks:
        hook.remove()
    logits = model.head.logits(hidden, (~batch.is_image).nonzero()[:, 0])
    groups.finalize()
    return states, logits, batch.is_image
