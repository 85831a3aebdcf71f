"""GenLIP: one Transformer over image patches and, for captions, text tokens.

Image tokens attend to each other in both directions; text tokens attend to the image and causally to text. Batches
run *packed*: linears process the tokens of all images and texts end to end, and attention runs over groups of samples
of equal lengths. So no padding is computed, and no sample sees another.

Legend: B rows of a batch, L text tokens of a row (padded), N tokens of all rows (packed), S slots of a row in the
key-value cache, H heads, C channels of a head, D hidden size, E text width, V vocabulary, P patches of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .attention_genlip import (
    Attention,
    CachedAttention,
    PrefixAttention,
    apply_rotary,
    feature_maps,
    image_positions,
    mean_of_images,
    pack_images,
    rotary_cos_sin,
    split_images,
    text_start,
)
from .configuration_genlip import GenLIPConfig
from .shared_genlip import PATCH_SIZE

IGNORED_LABEL = -100
# The name of the key-value cache in arguments and outputs depends on the version of transformers.
_CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _attention_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear, marked for its initial weights. Not a subclass, since some quantizers replace only ``nn.Linear``."""
    linear = nn.Linear(inputs, outputs)
    vars(linear)["of_attention"] = True
    return linear


class GenLIPAttention(nn.Module):
    """Multi-head attention with rotary positions and, if configured, a sigmoid gate on its output."""

    def __init__(self, config: GenLIPConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer, self.head_dim, self.gated = layer, config.head_dim, config.gated_attention
        gates = {True: width, False: 0, "headwise": width // config.head_dim}[config.gated_attention]
        self.q_proj = _attention_linear(width, width + gates)
        self.k_proj = _attention_linear(width, width)
        self.v_proj = _attention_linear(width, width)
        self.out_proj = _attention_linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[N, D] from [N, D]."""
        query, *gate = self.q_proj(x).split(x.shape[-1], dim=-1)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in (query, self.k_proj(x), self.v_proj(x)))
        mixed = attention(
            apply_rotary(query, *rotary), apply_rotary(key, *rotary), value, self.layer
        )  # [N, H, head_dim]
        if gate:
            mixed = gate[0].sigmoid().unflatten(-1, (mixed.shape[1], -1)) * mixed
        return self.out_proj(mixed.flatten(1))


class GenLIPMLP(nn.Module):
    """SwiGLU: ``fc2(silu(gate_fc(x)) * fc1(x))``."""

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.gate_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] from [N, D]."""
        return self.fc2(F.silu(self.gate_fc(x)) * self.fc1(x))


class GenLIPLayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__()
        self.init = float(config.ls_init_value or 0.0)
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), self.init))

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] from [N, D]."""
        return x * self.lambda1


class GenLIPLayer(nn.Module):
    """Pre-norm Transformer layer with LayerScale and DropPath on both branches."""

    def __init__(self, config: GenLIPConfig, layer: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = GenLIPAttention(config, layer)
        self.mlp = GenLIPMLP(config)
        self.layer_scale1, self.layer_scale2 = (
            GenLIPLayerScale(config) if config.ls_init_value else nn.Identity() for _ in range(2)
        )

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, drop: Tensor | None = None
    ) -> Tensor:
        """[N, D] from [N, D]; ``drop`` [2, N] are the DropPath factors of both branches."""
        branch = self.layer_scale1(self.self_attn(self.layer_norm1(x), rotary, attention))
        x = x + (branch if drop is None else branch * drop[0, :, None])
        branch = self.layer_scale2(self.mlp(self.layer_norm2(x)))
        return x + (branch if drop is None else branch * drop[1, :, None])


class GenLIPTransformer(nn.Module):
    """The layers."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by gradient_checkpointing_enable

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(GenLIPLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attention: Attention,
        row_lengths: Tensor | None = None,
        count: int | None = None,
    ) -> list[Tensor]:
        """The input and the output of every layer, each [N, D].

        Args:
            x: [N, D].
            positions: int64 [3, N].
            attention: which tokens see which.
            row_lengths: int64 [rows], tokens of each sample; DropPath draws for samples.
            count: run only the first ``count`` layers; None: all.
        """
        rotary = rotary_cos_sin(positions, self.config, x.dtype)
        # A frozen encoder can be in training mode inside another model; its features must not be noisy.
        learns = self.training and any(weight.requires_grad for weight in self.parameters())
        drops: list[Tensor | None] = [None] * len(self.layers)
        if learns and self.config.drop_path_rate and row_lengths is not None:
            drops = self._drop_path(row_lengths, x.dtype)
        # A recomputed layer must not write into the cache twice.
        checkpointed = self.gradient_checkpointing and self.training and attention.cache is None
        if checkpointed and learns and not x.requires_grad:
            x.requires_grad_()  # reentrant checkpoints give no gradients otherwise
        states = [x]
        for layer, drop in list(zip(self.layers, drops, strict=True))[:count]:
            run = partial(self._gradient_checkpointing_func, layer.__call__) if checkpointed else layer
            states.append(run(states[-1], rotary, attention, drop))
        return states

    def _drop_path(self, row_lengths: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """[layers, 2, N]: 0 or 1 / (1 - rate), one draw for each layer, branch and sample."""
        rate = self.config.drop_path_rate
        draws = torch.rand(len(self.layers), 2, len(row_lengths), device=row_lengths.device)
        return list(((draws >= rate) / (1 - rate)).to(dtype).repeat_interleave(row_lengths, dim=2))


class GenLIPPatchEmbedding(nn.Conv2d):
    """The convolution of single patches, as one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """[P, D, 1, 1] from [P, 3, 16, 16], the shapes that adapters of convolutions need."""
        return F.linear(patches.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)[..., None, None]


class GenLIPVisionEmbeddings(nn.Module):
    """Patches to tokens."""

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = GenLIPPatchEmbedding(3, config.hidden_size, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, D] from [P, 768]."""
        # Called, never read: adapters, offloading and hooks replace or wrap the module.
        return self.patch_embedding(patches.unflatten(1, (3, PATCH_SIZE, PATCH_SIZE))).flatten(1)


def _few(names: Sequence[str]) -> str:
    """The first four names, and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class GenLIPPreTrainedModel(PreTrainedModel):
    """The base of all models: the vision parts, initial weights, and loading that allows no missing tensor."""

    config_class = GenLIPConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["GenLIPLayer", "GenLIPVisionEmbeddings"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # Encoders ignore the parts of captions, and of a classifier that was fine-tuned on top.
    _keys_to_ignore_on_load_unexpected = [r"^(embeddings|in_proj|proj|lm_head|classifier)\."]  # noqa: RUF012
    _new_parts: tuple[str, ...] = ()  # prefixes of weights that may start at random

    def _add_vision_parts(self, config: GenLIPConfig) -> None:
        self.vision_embeddings = GenLIPVisionEmbeddings(config)
        self.visual = GenLIPTransformer(config)
        self.ln_post = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.vision_embeddings.patch_embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the patch embedding."""
        self.vision_embeddings.patch_embedding = value

    def encode(
        self, pixel_values: Tensor | Sequence[Tensor], image_grid_hw: Tensor | None = None, count: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """(the input and the output of the first ``count`` layers, each [P, D]; int64 [images, 2] rows and columns).

        Args:
            pixel_values, image_grid_hw: as for ``GenLIPVisionModel.forward``.
            count: of layers; None: all.

        Raises:
            ValueError: invalid images, or one without patches.
        """
        patches, grid = pack_images(pixel_values, image_grid_hw)
        counts = grid.prod(dim=1)
        lengths = counts.tolist()
        if 0 in lengths:
            raise ValueError(f"image_grid_hw = {grid.tolist()}: an image without patches has no features")
        attention = PrefixAttention(lengths, [0] * len(lengths), patches.device)
        x = self.vision_embeddings(patches)
        return self.visual(x, image_positions(grid, self.config.positions), attention, counts, count), grid

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> str:
        # transformers calls it for every new model. Its own check accepts names that this model would ignore.
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation = {attn_implementation!r}: only 'sdpa' is supported, without output_attentions. "
                "Remove both"
            )
        return "sdpa"

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Only "sdpa" is supported.

        Raises:
            ValueError: another name.
        """
        self._check_and_adjust_attn_implementation(attn_implementation)

    @staticmethod
    def _per_image(states: Sequence[Tensor], pixel_values: Any, grid: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [P, D] as [B, patches, D] for images of one size, in classes that refuse to be misread."""
        if isinstance(pixel_values, Tensor) and pixel_values.dim() == 4:
            return tuple(x.unflatten(0, (len(grid), -1)).as_subclass(PatchStates) for x in states)
        return tuple(x.as_subclass(PackedStates) for x in states)

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _wanted(self, name: str, value: bool | None) -> bool:
        """An optional output's argument, or its default in the configuration; attention weights are an error."""
        wanted = bool(getattr(self.config, name) if value is None else value)
        if wanted and name == "output_attentions":
            raise ValueError("output_attentions = True: packed attention has no matrix of weights. Remove it")
        return wanted

    def _init_weights(self, module: nn.Module) -> None:
        """Attention: Xavier uniform (q and gate as one matrix). Other weights: normal. Biases 0, norms 1 and 0."""
        # transformers calls it only for modules that directly hold parameters.
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            if hasattr(module, "of_attention"):
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, GenLIPLayerScale):
            nn.init.constant_(module.lambda1, module.init)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.from_pretrained``, but weights that do not match the model are an error.

        Raises:
            ValueError: a tensor is missing, which would otherwise start at random; is unexpected, except the text parts
                that an encoder ignores; or has another shape, unless ``ignore_mismatched_sizes`` is given. Only a
                classifier may be missing; transformers warns that it starts at random.
        """
        # Shapes are compared here, by name and in one line.
        ignored = bool(kwargs.pop("ignore_mismatched_sizes", False))
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        model, info = loaded
        # Version 4 gives only names, version 5 also both shapes.
        misshapen = dict((key, ()) if isinstance(key, str) else (key[0], key[1:]) for key in info["mismatched_keys"])
        wrong = []
        missing = sorted(set(info["missing_keys"]) - set(misshapen))
        if missing := [name for name in missing if not name.startswith(cls._new_parts)]:
            wrong.append(f"no {_few(missing)}, which {cls.__name__} needs")
        if unexpected := sorted(info["unexpected_keys"]):
            wrong.append(f"{_few(unexpected)}, which {cls.__name__} with this config.json does not have")
        if misshapen and not ignored:
            wrong.append(_few([_misshapen(name, *shapes) for name, shapes in sorted(misshapen.items())]))
        if wrong:
            raise ValueError(f"{args[0] if args else 'the weights'}: {'; '.join(wrong)}")
        return (model, info) if output_loading_info else model


def _misshapen(name: str, stored: Sequence[int] = (), expected: Sequence[int] = ()) -> str:
    return (
        f"{name} is {list(stored)}, {list(expected)} expected" if stored else f"{name} has another shape than expected"
    )


class PatchStates(Tensor):
    """Hidden states of patches [B, patches, D]. Removing the first one, as if it were a class token, is an error.

    Results computed from them are plain tensors, except concatenations: towers join layers before they cut.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``func`` on plain tensors, unless it is ``[:, 1:]``."""
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and args[1][1:2] == (slice(1, None),):
            raise ValueError(
                "[:, 1:] of GenLIP's hidden states would drop the image's first patch: there is no class token. "
                "Use all of them; for LLaVA-NeXT: mm_vision_select_feature = 'cls_patch', mm_vision_select_layer = -1"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in (torch.cat, torch.concat, torch.concatenate) else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor, so that it loads without this class."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class PackedStates(Tensor):
    """Features of all patches of several images, packed [P, D]. Reading row i as image i is an error.

    Pipelines of transformers and loops like ``for image, features in zip(images, output)`` read so. Results computed
    from them are plain tensors, except copies.
    """

    _COPIES = (
        Tensor.to,
        Tensor.cpu,
        Tensor.cuda,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.detach,
        Tensor.clone,
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``func`` on plain tensors, unless it is ``[i]`` or iterates."""
        if func is Tensor.__deepcopy__:
            func, args = Tensor.clone, args[:1]
        if func is Tensor.__getitem__:
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            # A number of any kind: Python's, NumPy's, or a tensor without dimensions.
            one_row = hasattr(first, "__index__") and not isinstance(first, bool) and not getattr(first, "ndim", 0)
        else:
            one_row = func in (Tensor.__iter__, Tensor.unbind, torch.unbind)
        if one_row:
            raise ValueError(
                f"features of shape {list(args[0].shape)}: row i is a patch, not an image. Separate the images with "
                "model.split_images(features, image_grid_hw); in a pipeline use batch_size = 1"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in cls._COPIES else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor, so that it loads without this class."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class _OnlyFeatures(tuple[Tensor, ...]):
    """A tuple with one entry at index -1; any other index is an error."""

    def __getitem__(self, index: Any) -> Any:
        if index != -1:
            raise IndexError(
                f"hidden state {index}: this tower has only one, the output of ln_post. Use mm_vision_select_layer = -1"
            )
        return super().__getitem__(index)


class GenLIPVisionTower(nn.Module):
    """The vision model for callers that read features from ``hidden_states``, like the towers of LLaVA-NeXT.

    A caller configured for a class token, another layer or another model's pixels gets an error instead of almost right
    features.
    """

    def __init__(self, model: GenLIPVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = True) -> BaseModelOutputWithPooling:
        """Features of images of one size.

        Args:
            pixel_values: floats [B, 3, height, width] in [-1, 1], sides multiples of 16.
            output_hidden_states: taken as True.

        Returns:
            As ``GenLIPVisionModel``, but ``hidden_states`` has one entry, at index -1: the features [B, patches, D]
            after ``ln_post``.

        Raises:
            ValueError: another shape, or pixels beyond [-1, 1], which another model's image processor normalised.
        """
        if pixel_values.dim() != 4:
            raise ValueError(f"pixel_values of shape {list(pixel_values.shape)}: expected [B, 3, height, width]")
        largest = float(pixel_values.detach().abs().amax())
        if not largest <= 1.0:
            raise ValueError(
                f"pixel_values up to {largest:.3f}: GenLIP's are in [-1, 1], these are from another image processor. "
                "Load the folder's with AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)"
            )
        output = self.model(pixel_values, return_dict=True)
        features = output.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=output.pooler_output,
            hidden_states=_OnlyFeatures([features.as_subclass(PatchStates)]),
        )


class GenLIPVisionModel(GenLIPPreTrainedModel):
    """The vision encoder. It ignores the text parts of a checkpoint.

    ``num_features``, ``forward_features``, ``forward_intermediates`` and so on are for code written for timm.
    """

    num_prefix_tokens = 0  # no class token

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__(config)
        self._add_vision_parts(config)
        self.post_init()

    @property
    def vision_model(self) -> GenLIPVisionTower:
        """This model for callers that read ``hidden_states``; LLaVA-NeXT looks for this name."""
        return GenLIPVisionTower(self)

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_grid_hw: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Features of images.

        Args:
            pixel_values: normalised floats, in one of three forms:
                images of one size [B, 3, height, width], sides multiples of 16;
                images of any such sizes as a list of [3, height, width];
                packed patches [P, 768], each as (channel, row, column), with ``image_grid_hw``.
            image_grid_hw: int64 [images, 2], rows and columns of each image's patches; with packed patches.
            output_hidden_states: also return the embedding's and each layer's output.
            return_dict: False: a tuple.
            output_attentions: True is an error.
            interpolate_pos_encoding: has no effect. Rotary positions fit images of any size.

        Returns:
            ``last_hidden_state``: ``ln_post`` of every patch, [B, patches, D] for images of one size, else [P, D] with
            the images end to end, row by row, as ``PackedStates`` (``split_images`` separates them).
            ``pooler_output``: [images, D], the mean over each image's patches. It was not trained.
            ``hidden_states``: layers + 1 tensors of the same shape, before ``ln_post``; ``PatchStates`` for images of
            one size.

        Raises:
            ValueError: other shapes, images without patches, or ``output_attentions``.
        """
        self._wanted("output_attentions", output_attentions)
        wanted = self._wanted("output_hidden_states", output_hidden_states)
        states, grid = self.encode(pixel_values, image_grid_hw)
        features = self.ln_post(states[-1])
        pooled = mean_of_images(features, grid)
        one_size = isinstance(pixel_values, Tensor) and pixel_values.dim() == 4
        features = features.unflatten(0, (len(grid), -1)) if one_size else features.as_subclass(PackedStates)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=pooled,
            hidden_states=self._per_image(states, pixel_values, grid) if wanted else None,
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()

    split_images = staticmethod(split_images)

    @property
    def num_features(self) -> int:
        """D."""
        return self.config.hidden_size

    embed_dim = num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """``last_hidden_state`` [B, patches, D] of images [B, 3, height, width]."""
        return self(x).last_hidden_state

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, D], the mean of features [B, patches, D]. ``pre_logits`` has no effect: there is no classifier.

        Raises:
            ValueError: features of another shape.
        """
        if x.dim() != 3:
            raise ValueError(f"features of shape {list(x.shape)}: expected [B, patches, D], of images of one size")
        return x.mean(dim=1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The outputs of chosen layers, by the arguments of timm's Vision Transformers.

        Args:
            x: images [B, 3, height, width].
            indices: layers from 0, negative from the end; a number n: the last n; None: all.
            return_prefix_tokens: has no effect: there are none.
            norm: apply ``ln_post`` to each output.
            stop_early: run no layer after the last chosen one.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return only the list.
            output_dict: return {"image_features", "image_intermediates"}.

        Returns:
            (``ln_post`` of the last layer that ran [B, patches, D]; list of [B, D, rows, columns] or [B, patches, D],
            in the order of the layers).

        Raises:
            ValueError: another shape or format, or a layer that does not exist.
        """
        depth = self.config.num_hidden_layers
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError("forward_intermediates: expected images of one size as a tensor [B, 3, height, width]")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt = {output_fmt!r}: allowed are 'NCHW' and 'NLC'")
        chosen = (
            range(depth - indices, depth) if isinstance(indices, int) else range(depth) if indices is None else indices
        )
        layers = sorted({index + depth if index < 0 else index for index in chosen})
        if not layers or layers[0] < 0 or layers[-1] >= depth or (isinstance(indices, int) and indices > depth):
            raise ValueError(f"indices = {indices!r}: the model has {depth} layers")
        states, _ = self.encode(x, count=layers[-1] + 1 if stop_early else None)
        outputs = [self.ln_post(states[index + 1]) if norm else states[index + 1] for index in layers]
        if output_fmt == "NCHW":
            outputs = [feature_maps(output, x) for output in outputs]
        else:
            outputs = [output.unflatten(0, (len(x), -1)) for output in outputs]
        if intermediates_only:
            return outputs
        features = self.ln_post(states[-1]).unflatten(0, (len(x), -1))
        return {"image_features": features, "image_intermediates": outputs} if output_dict else (features, outputs)


class _Rows:
    """The place of each token of a batch when its rows are packed, each as its image followed by its text.

    Args:
        grid: int64 [B, 2], rows and columns of each row's image, (0, 0) without one.
        mask: bool [B, L], False at padding.
        kind: ``positions`` of the configuration.
    """

    def __init__(self, grid: Tensor, mask: Tensor, kind: str) -> None:
        self.mask = mask
        images, texts = grid.prod(dim=1), mask.sum(dim=1)
        self.image_lengths, self.text_lengths = images.tolist(), texts.tolist()
        self.lengths = images + texts  # [B]
        starts = self.lengths.cumsum(0) - self.lengths
        order = mask.cumsum(dim=1) - 1  # [B, L] of a token within its text
        self.text_slots = (starts + images)[:, None] + order  # [B, L]; undefined at padding
        self.has_previous = mask & ((order > 0) | (images > 0)[:, None])  # [B, L]
        is_text = torch.zeros(sum(self.image_lengths) + sum(self.text_lengths), dtype=torch.bool, device=mask.device)
        is_text[self.text_slots[mask]] = True
        self.image_slots = (~is_text).nonzero().squeeze(1)  # [P]
        text_positions = (text_start(grid, kind)[:, None] + order)[mask]
        self.positions = torch.empty(3, len(is_text), dtype=torch.int64, device=mask.device)
        self.positions[:, self.image_slots] = image_positions(grid, kind)
        self.positions[:, is_text] = text_positions.expand(3, -1)


class GenLIPForCausalLM(GenLIPPreTrainedModel, GenerationMixin):
    """The whole model: captions and answers from an image and a prompt.

    ``input_ids`` hold only text; a row's image is in ``pixel_values`` and comes before its text. Without images, or
    with a grid of (0, 0), a row is only text.
    """

    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__(config)
        self._add_vision_parts(config)
        width, text = config.hidden_size, config.text_embed_dim
        self.embeddings = nn.Embedding(config.vocab_size, text)
        self.in_proj = nn.Linear(text, width) if text != width else nn.Identity()
        self.proj = nn.Linear(width, text) if text != width else nn.Identity()
        self.lm_head = nn.Linear(text, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The LM head; its weights are not tied."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the LM head."""
        self.lm_head = new_embeddings

    def read_out(self, features: Tensor) -> Tensor:
        """Logits [..., V] of features after ``ln_post`` [..., D], of text or patches."""
        return self.lm_head(self.proj(features))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_grid_hw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every text token, and the loss.

        Args:
            input_ids: int64 [B, L], text without image tokens; with a filled cache only the new tokens.
            pixel_values: an image for each row, in one of the forms of ``GenLIPVisionModel``; not with a filled cache.
            image_grid_hw: int64 [B, 2], rows and columns of each row's patches; with packed patches or a filled cache.
            attention_mask: [B, L], 1 at tokens and 0 at padding (on either side); with a filled cache, of all text so
                far. None: no padding.
            past_key_values, cache: two names of the key-value cache, a ``DynamicCache``. It holds image and text,
                padded at the front.
            use_cache: return a cache, a new one if none is given.
            labels: int64 [B, L], the tokens of ``input_ids`` to predict and -100 elsewhere, unshifted: token k is
                predicted from the one before it, a row's first token from its image.
            logits_to_keep: number of last tokens, or columns, to compute logits for; 0: all.
            output_hidden_states: also return the embedding's and each layer's output.
            return_dict: False: a tuple.
            inputs_embeds: [B, L, E], outputs of ``get_input_embeddings()``, instead of ``input_ids``.
            output_attentions: True is an error.
            interpolate_pos_encoding: has no effect, as in ``GenLIPVisionModel``.

        Returns:
            ``logits`` [B, L, V], 0 at padding. ``loss``: float32, the mean over all labels. ``hidden_states``:
            layers + 1 tensors [N, D], before ``ln_post``, rows end to end without padding, each image then text.

        Raises:
            ValueError: images or labels that do not match the rows, a cache that is not dynamic or lacks tokens, or
                ``output_attentions``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        text: Any = input_ids if inputs_embeds is None else inputs_embeds
        expected = "input_ids" if inputs_embeds is None else "inputs_embeds"
        if text.dim() != (2 if inputs_embeds is None else 3) or not text.numel():
            axes = "[B, L]" if inputs_embeds is None else "[B, L, E]"
            raise ValueError(f"{expected} of shape {list(text.shape)}: expected {axes} with at least one token")
        if labels is not None and labels.shape != text.shape[:2]:
            raise ValueError(f"labels of shape {list(labels.shape)}: {expected} have {list(text.shape[:2])} tokens")
        self._wanted("output_attentions", output_attentions)
        wanted = self._wanted("output_hidden_states", output_hidden_states)
        cache = past_key_values if cache is None else cache
        if cache is not None and getattr(cache, "is_compileable", False):
            raise ValueError(f"a cache of {type(cache).__name__}: images need a DynamicCache")
        if cache is not None and cache.get_seq_length():
            if labels is not None or pixel_values is not None:
                raise ValueError("pixel_values or labels with a filled cache: it already holds the images. Remove them")
            states = self._extend(text, image_grid_hw, attention_mask, cache)
            columns = _columns(text.shape[1], logits_to_keep)
            logits = self.read_out(self.ln_post(states[-1].unflatten(0, text.shape[:2])[:, columns]))
            loss = None
        else:
            if use_cache and cache is None:
                cache = DynamicCache()
            rows, states = self._begin(text, pixel_values, image_grid_hw, attention_mask, cache)
            logits, loss = self._outputs(states[-1], rows, labels, logits_to_keep)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=tuple(states) if wanted else None, **{_CACHE_NAME: cache}
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()

    def _embed(self, text: Tensor) -> Tensor:
        """[..., D] from token ids [...] or outputs of the token embedding [..., E]."""
        return self.in_proj(text if text.is_floating_point() else self.embeddings(text))

    def _begin(
        self,
        text: Tensor,
        pixel_values: Tensor | Sequence[Tensor] | None,
        image_grid_hw: Tensor | None,
        attention_mask: Tensor | None,
        cache: Any,
    ) -> tuple[_Rows, list[Tensor]]:
        """(places of the tokens, input and output of every layer [N, D]) of images and text."""
        shape = text.shape[:2]
        mask = torch.ones(shape, device=text.device).bool() if attention_mask is None else attention_mask.bool()
        if mask.shape != shape:
            raise ValueError(f"attention_mask of shape {list(mask.shape)}: the text has {list(shape)}")
        if pixel_values is None:
            if image_grid_hw is not None and bool(image_grid_hw.any()):
                raise ValueError("image_grid_hw without pixel_values: give both or neither")
            patches, grid = None, torch.zeros(len(text), 2, dtype=torch.int64)
        else:
            patches, grid = pack_images(pixel_values, image_grid_hw)
        if len(grid) != len(text):
            raise ValueError(
                f"{len(grid)} images for {len(text)} rows of text: expected one for each row; a row without an image "
                "has (0, 0) in image_grid_hw"
            )
        rows = _Rows(grid.to(text.device), mask, self.config.positions)
        tokens = self._embed(text[mask])
        x = tokens.new_zeros(rows.positions.shape[1], tokens.shape[1]).index_copy(0, rows.text_slots[mask], tokens)
        if patches is not None:
            x = x.index_copy(0, rows.image_slots, self.vision_embeddings(patches).to(x.dtype))
        attention = PrefixAttention(rows.image_lengths, rows.text_lengths, x.device, cache)
        return rows, self.visual(x, rows.positions, attention, rows.lengths)

    def _extend(
        self, text: Tensor, image_grid_hw: Tensor | None, attention_mask: Tensor | None, cache: Any
    ) -> list[Tensor]:
        """The input and output of every layer [B * L, D], of tokens after those in the cache."""
        batch, count = text.shape[:2]
        empty = torch.zeros(batch, 2, dtype=torch.int64, device=text.device)
        grid = empty if image_grid_hw is None else image_grid_hw
        images = grid.prod(dim=1)
        if attention_mask is None:
            texts = (cache.get_seq_length() + count - images.amax()).expand(batch)
        elif attention_mask.shape[1] < count or not bool(attention_mask[:, -count:].all()):
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)}: with a filled cache it must cover the text so "
                f"far and the {count} new tokens, without padding among the new ones"
            )
        else:
            texts = attention_mask.bool().sum(dim=1)
        if (needed := int((images + texts).max())) != cache.get_seq_length() + count:
            raise ValueError(
                f"a cache of {cache.get_seq_length()} tokens and {count} new ones, but images and text have {needed}. "
                "Give image_grid_hw with a cache that holds images. Remove prompt_lookup_num_tokens and "
                "assistant_model: for them some versions of transformers crop the cache as if it held only text"
            )
        order = texts[:, None] - count + torch.arange(count, device=text.device)
        positions = (text_start(grid, self.config.positions)[:, None] + order).flatten().expand(3, -1)
        attention = CachedAttention(cache, images + texts, count)
        return self.visual(self._embed(text.flatten(0, 1)), positions, attention)

    def _outputs(
        self, hidden: Tensor, rows: _Rows, labels: Tensor | None, logits_to_keep: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(logits [B, kept, V], loss) from the last layer's output [N, D]; the head computes each text slot once."""
        columns = _columns(rows.mask.shape[1], logits_to_keep)
        kept, kept_slots = rows.mask[:, columns], rows.text_slots[:, columns]
        slots = kept_slots[kept]
        if labels is not None:
            predicted = rows.has_previous & (labels != IGNORED_LABEL)
            before = rows.text_slots[predicted] - 1
            slots = torch.cat((slots, before))
        slots = slots.unique()
        read = self.read_out(self.ln_post(hidden[slots]))  # [slots, V]
        logits = read.new_zeros(*kept.shape, read.shape[-1])
        logits[kept] = read[torch.searchsorted(slots, kept_slots[kept])]
        if labels is None:
            return logits, None
        return logits, F.cross_entropy(read[torch.searchsorted(slots, before)].float(), labels[predicted])

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Each row ``expand_size`` times. A row has many packed patches, so images are repeated as a whole."""
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None:
            patches, grid = pack_images(pixels, model_kwargs.pop("image_grid_hw", None))
            if expand_size > 1:
                repeated = [image for image in split_images(patches, grid) for _ in range(expand_size)]
                patches, grid = torch.cat(repeated), grid.repeat_interleave(expand_size, dim=0)
        # Static in older versions of transformers.
        mixin: Any = super()
        input_ids, model_kwargs = mixin._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixels is not None:
            model_kwargs |= {"pixel_values": patches, "image_grid_hw": grid}
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_grid_hw: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass: first all text and images, then the tokens that the cache lacks.

        ``inputs_embeds`` are the first columns of the text; ``input_ids`` end in the tokens after them.

        Raises:
            ValueError: a prompt ends in padding, or attention weights are requested.
        """
        self._wanted("output_attentions", output_attentions)
        cache = past_key_values if cache is None else cache
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cached = 0 if cache is None else cache.get_seq_length()
        if not cached and not bool(mask[:, -1].all()):
            raise ValueError("the prompts end in padding: new tokens would follow it. Pad on the left for generation")
        if cached:
            lengths = mask.sum(dim=1)
            if image_grid_hw is not None:
                lengths = lengths + image_grid_hw.prod(dim=1)
            # PEFT's learned prompts are in the cache and not yet in the mask.
            input_ids = input_ids[:, -max(int(lengths.max()) - cached, 1) :]
        elif inputs_embeds is not None and (new := mask.shape[1] - inputs_embeds.shape[1]):
            inputs_embeds = torch.cat((inputs_embeds, self.embeddings(input_ids[:, -new:])), dim=1)
        embedded = inputs_embeds is not None and not cached
        return {
            "input_ids": None if embedded else input_ids,
            "inputs_embeds": inputs_embeds if embedded else None,
            "pixel_values": None if cached else pixel_values,
            "image_grid_hw": image_grid_hw,
            "attention_mask": mask,
            "past_key_values": cache,  # the name that PEFT reads, in every version
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }


def _columns(length: int, logits_to_keep: int | Tensor) -> slice | Tensor:
    """The columns to keep, of ``length``."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(max(length - logits_to_keep, 0) if logits_to_keep else 0, None)
