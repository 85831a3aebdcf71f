"""The encoder in other models: feature maps for segmentation and detection heads, and an image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from .attention_genlip import feature_maps, mean_of_images
from .configuration_genlip import GenLIPConfig
from .modeling_genlip import GenLIPPreTrainedModel
from .shared_genlip import PATCH_SIZE  # noqa: F401 (version 4 of transformers copies only direct imports)

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # before version 5
    from transformers.utils.backbone_utils import BackboneMixin


class GenLIPBackbone(BackboneMixin, GenLIPPreTrainedModel):
    """Feature maps of the layers that ``config.out_features`` or ``config.out_indices`` name."""

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__(config)
        # Version 5 calls it in __init__.
        getattr(self, "_init_backbone", lambda config: None)(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self._add_vision_parts(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Feature maps of images of one size. Layers after the last chosen one run only for ``output_hidden_states``.

        Args:
            pixel_values: normalised floats [B, 3, height, width], sides multiples of 16.
            output_hidden_states: also return the embedding's and each layer's output, [B, patches, D].
            output_attentions: True is an error.
            return_dict: False: return a tuple.

        Returns:
            ``feature_maps``: for each of ``out_features``, the stage's output after ``ln_post``, [B, D, height / 16,
            width / 16].

        Raises:
            ValueError: ``pixel_values`` has another shape.
        """
        self._wanted("output_attentions", output_attentions)
        wanted = self._wanted("output_hidden_states", output_hidden_states)
        chosen: list[int] = [self.stage_names.index(name) for name in self.out_features]
        states, _ = self.encode(pixel_values, count=None if wanted else max(chosen))
        maps: Any = tuple(feature_maps(self.ln_post(states[index]), pixel_values) for index in chosen)
        output = BackboneOutput(
            feature_maps=maps,
            hidden_states=tuple(x.unflatten(0, (len(pixel_values), -1)) for x in states) if wanted else None,
        )
        return output if self._wants_dict(return_dict) else output.to_tuple()


class GenLIPForImageClassification(GenLIPPreTrainedModel):
    """A linear classifier on the mean of an image's features. Pretraining does not train it: fine-tune it."""

    _new_parts = ("classifier.",)

    def __init__(self, config: GenLIPConfig) -> None:
        super().__init__(config)
        labels: Any = config.num_labels
        self.num_labels: int = labels
        self._add_vision_parts(config)
        self.classifier = nn.Linear(config.hidden_size, labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_grid_hw: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits of images, and the loss if labels are given.

        Args:
            pixel_values, image_grid_hw: images in any form of ``GenLIPVisionModel``.
            labels: int64 [images] classes, or what another ``config.problem_type`` of transformers needs.
            output_hidden_states: also return the embedding's and each layer's output, [P, D].
            output_attentions: True is an error.
            return_dict: False: return a tuple.

        Returns:
            ``logits`` [images, ``num_labels``], and ``loss`` if labels are given.

        Raises:
            ValueError: invalid images.
        """
        self._wanted("output_attentions", output_attentions)
        wanted = self._wanted("output_hidden_states", output_hidden_states)
        states, grid = self.encode(pixel_values, image_grid_hw)
        logits = self.classifier(mean_of_images(self.ln_post(states[-1]), grid))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=tuple(states) if wanted else None)
        return output if self._wants_dict(return_dict) else output.to_tuple()
