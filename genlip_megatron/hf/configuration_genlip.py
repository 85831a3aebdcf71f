"""Configuration of a GenLIP model, with the field names of the authors' ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Fields for which the model supports one value: another value would mean another computation.
_FIXED = {
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "silu",
    "use_swiglu_ffn": True,
    "attention_dropout": 0.0,
    "spatial_merge_size": 1,
    "mrope_interleaved": True,
    "use_llm_head": False,
    "llm_decoder": None,
    "tie_word_embeddings": False,
}


class GenLIPConfig(PretrainedConfig):
    """Sizes of a GenLIP model.

    Args:
        vocab_size: rows of the token embedding and of the LM head.
        hidden_size: width D of the Transformer.
        num_hidden_layers: Transformer layers.
        num_attention_heads: attention heads; D must be a multiple of twice their number.
        intermediate_size: inner width of the SwiGLU.
        text_embed_dim: width E of the token embedding and LM head; None: D. E != D adds projections.
        gated_attention: multiply attention's output by a sigmoid gate (``q_proj`` is then [2D, D]).
        ls_init_value: initial value of LayerScale; 0 or None: no LayerScale.
        drop_path_rate: fraction of residual branches dropped in training, drawn for each sample.
        rope_theta: base of the rotary frequencies.
        rope_scaling: ``{"rope_type": "default", "mrope_section": [T, H, W]}``; T is not read.
        rope_parameters: the same with ``rope_theta``, as newer versions of transformers write it; if both are given,
            they must agree.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of normally initialised weights.

    ``patch_size``, ``num_channels``, ``hidden_act``, ``use_swiglu_ffn``, ``attention_dropout``,
    ``spatial_merge_size``, ``mrope_interleaved``, ``use_llm_head``, ``llm_decoder`` and ``tie_word_embeddings`` accept
    only the value of this model.

    Raises:
        ValueError: an unsupported value; names the field, the value and the allowed value.
    """

    model_type = "genlip"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1152,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        text_embed_dim: int | None = None,
        gated_attention: bool = True,
        ls_init_value: float | None = 0.1,
        drop_path_rate: float = 0.0,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        for name, allowed in _FIXED.items():
            value = kwargs.pop(name, allowed)
            if value != allowed:
                raise ValueError(f"{name} = {value!r}: only {allowed!r} is supported")
            if name != "tie_word_embeddings":
                setattr(self, name, allowed)
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "text_embed_dim": hidden_size if text_embed_dim is None else text_embed_dim,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be a whole number of at least 1")
            setattr(self, name, value)
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size = {hidden_size} with num_attention_heads = {num_attention_heads}: each head needs an "
                "even number of channels, so hidden_size must be a multiple of twice the heads"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate = {drop_path_rate!r}: must be in [0, 1)")
        older, newer = dict(rope_scaling or {}), dict(rope_parameters or {})
        for name in ("mrope_section", "rope_theta"):
            if name in older and name in newer and older[name] != newer[name]:
                raise ValueError(
                    f"rope_scaling.{name} = {older[name]!r}: rope_parameters.{name} = {newer[name]!r} is another "
                    "name of this setting. Remove the wrong one"
                )
        rope = older | newer
        theta = rope.pop("rope_theta", None)
        self.rope_theta = float(rope_theta or theta or 10000.0)
        self._set_rope(rope)
        self.gated_attention = gated_attention
        self.ls_init_value = ls_init_value
        self.drop_path_rate = drop_path_rate
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    def _set_rope(self, rope: dict[str, Any]) -> None:
        for name in ("type", "rope_type"):
            if rope.get(name, "default") not in ("default", "mrope"):
                raise ValueError(f"rope_scaling.{name} = {rope[name]!r}: allowed is 'default'")
        unknown = sorted(set(rope) - {"type", "rope_type", "mrope_section", "mrope_interleaved"})
        if unknown:
            raise ValueError(
                f"rope_scaling.{unknown[0]} = {rope[unknown[0]]!r}: allowed are rope_type and mrope_section"
            )
        if not rope.get("mrope_interleaved", True):
            raise ValueError("rope_scaling.mrope_interleaved = False: only True is supported")
        section = rope.get("mrope_section", [12, 12, 12])
        if len(section) != 3 or any(not isinstance(part, int) or part < 0 for part in section):
            raise ValueError(f"rope_scaling.mrope_section = {section!r}: must be three whole numbers, for T, H and W")
        self.mrope_section = list(section)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    # A property, since newer versions of transformers rename an attribute of this name in config.json, where older
    # versions and the authors' code would not find the sections.
    @property
    def rope_scaling(self) -> dict[str, Any]:
        """The rotary sections, as the authors' configuration holds them."""
        return {"type": "default", "rope_type": "default", "mrope_section": list(self.mrope_section)}

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self._set_rope(dict(value or {}))

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name in ``config.json``."""
        fields = super().to_dict()
        fields.pop("mrope_section", None)
        fields["rope_scaling"] = self.rope_scaling
        fields["tie_word_embeddings"] = False
        return fields
