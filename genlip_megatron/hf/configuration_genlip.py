"""Configuration of a GenLIP model, with the field names of the authors' ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .shared_genlip import FIXED, is_count, rope_settings

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # before version 5
    from transformers.utils.backbone_utils import BackboneConfigMixin


class GenLIPConfig(BackboneConfigMixin, PretrainedConfig):
    """Sizes of a GenLIP model.

    Args:
        vocab_size: rows of the token embedding and of the LM head.
        hidden_size: width D of the Transformer.
        num_hidden_layers: Transformer layers.
        num_attention_heads: attention heads; D must be a multiple of twice their number.
        intermediate_size: inner width of the SwiGLU.
        text_embed_dim: width E of the token embedding and LM head; None: D. E != D adds projections.
        gated_attention: multiply attention's output by a sigmoid gate (``q_proj`` is then [2D, D]); "headwise": one
            value for each head (``q_proj`` is then [D + H, D]).
        positions: "mrope": rotary channels interleave the axes; "chunked": T, H and W in turn; "1d": the index in the
            sample on every axis. The authors' code knows only the first.
        ls_init_value: initial value of LayerScale; 0 or None: no LayerScale.
        drop_path_rate: fraction of residual branches dropped in training, drawn for each sample.
        rope_theta: base of the rotary frequencies.
        rope_scaling: ``{"rope_type": "default", "mrope_section": [T, H, W]}``; T is not read.
        rope_parameters: the same with ``rope_theta``, as newer versions of transformers write it.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of normally initialised weights.
        out_features: stages whose feature maps ``GenLIPBackbone`` returns, of "stem", "stage1" to the number of layers;
            None: the last one.
        out_indices: the same as indices of ``stage_names``; give one of the two.

    The fields of ``FIXED`` accept only the value of this model.

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
        gated_attention: bool | str = True,
        positions: str = "mrope",
        ls_init_value: float | None = 0.1,
        drop_path_rate: float = 0.0,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, allowed in FIXED.items():
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
            if not is_count(value):
                raise ValueError(f"{name} = {value!r}: must be a whole number of at least 1")
            setattr(self, name, value)
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size = {hidden_size} with num_attention_heads = {num_attention_heads}: each head needs an "
                "even number of channels, so hidden_size must be a multiple of twice the heads"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate = {drop_path_rate!r}: must be in [0, 1)")
        if gated_attention not in (True, False, "headwise"):
            raise ValueError(f"gated_attention = {gated_attention!r}: must be true, false or 'headwise'")
        rope = rope_settings({"rope_scaling": rope_scaling, "rope_parameters": rope_parameters})
        self.rope_theta = float(rope_theta or rope.get("rope_theta") or 10000.0)
        self.mrope_section = list(rope.get("mrope_section", [12, 12, 12]))
        if positions not in ("mrope", "1d", "chunked"):
            raise ValueError(f"positions = {positions!r}: must be 'mrope', '1d' or 'chunked'")
        if positions == "chunked" and sum(self.mrope_section) != self.head_dim // 2:
            raise ValueError(
                f"positions = 'chunked': the sum of mrope_section = {self.mrope_section} must be half a head, "
                f"{self.head_dim // 2}"
            )
        self.positions = positions
        self.gated_attention = gated_attention
        self.ls_init_value = ls_init_value
        self.drop_path_rate = drop_path_rate
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        if out_indices is None:
            self.out_features = out_features or self.stage_names[-1:]
        else:
            self.out_indices = out_indices
            if out_features is not None and out_features != self.out_features:
                raise ValueError(
                    f"out_features = {out_features!r}: out_indices = {out_indices!r} are the stages "
                    f"{self.out_features!r}. Remove one of the two"
                )
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's outputs: of the patch embedding and of each layer."""
        return ["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))]

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
        rope = rope_settings({"rope_scaling": value})
        if "rope_theta" in rope:
            raise ValueError(f"rope_scaling.rope_theta = {rope['rope_theta']!r}: set rope_theta instead")
        self.mrope_section = list(rope.get("mrope_section", [12, 12, 12]))

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name in ``config.json``."""
        fields = super().to_dict()
        fields.pop("mrope_section", None)
        return fields | {"rope_scaling": self.rope_scaling, "tie_word_embeddings": False}
