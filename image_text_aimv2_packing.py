# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""AIMv2 for images and words (LiT): the packed vision tower and transformers' text encoder, in one joint space."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2TextModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.aimv2.modeling_aimv2 import Aimv2Output
from transformers.utils.generic import can_return_tuple

from .configuration_aimv2_packing import Aimv2PackingImageTextConfig
from .layout_aimv2_packing import kind_of
from .modeling_aimv2_packing import Aimv2PackingModel, Aimv2PackingPreTrainedModel


# What both parts can be asked for.
TEXT_OPTIONS = ("output_attentions", "output_hidden_states")


class Aimv2PackingImageTextModel(Aimv2PackingPreTrainedModel):
    """
    Images of any sizes and texts, with the weights and outputs of [`~transformers.Aimv2Model`] ("LiT: Zero-Shot
    Transfer with Locked-image text Tuning").
    """

    config_class = Aimv2PackingImageTextConfig
    base_model_prefix = "aimv2"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules: list[str] = []  # The parts name their own.
    _newly_initialized = ()
    tower_class = Aimv2PackingModel

    def __init__(self, config: Aimv2PackingImageTextConfig):
        config.validate()
        super().__init__(config)
        self.vision_model = self.tower_class._from_config(config.vision_config)
        self.text_model = Aimv2TextModel._from_config(config.text_config)
        for layer in self.text_model.encoder.layers:
            # As in Apple's code. transformers leaves causality to the mask, and drops the mask where nothing is padded:
            # its features of a text then depend on the other texts.
            layer.attention.is_causal = True
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, hidden_states: torch.Tensor | None = None, grid_thw: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(total_patches, num_channels * patch_size**2)`), grid_thw
                (`torch.Tensor` of integers of shape `(num_images, 3)`): As for [`Aimv2PackingModel`].
            kwargs: `layout`, `output_hidden_states` and all else that it takes.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is what the head gives,
            projected into the joint space, `(num_segments, projection_dim)`, not normalised; all else is the vision
            tower's.

        Raises:
            ValueError: the arguments have the wrong shape or dtype, or do not agree.
        """
        outputs = self.vision_model(hidden_states, grid_thw, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.Tensor` of integers of shape `(num_texts, num_tokens)`):
                Texts of at most `text_config.max_position_embeddings` tokens, each closed by
                `text_config.eos_token_id`.
            attention_mask (`torch.Tensor` of shape `(num_texts, num_tokens)`, *optional*):
                1 for tokens, 0 for padding; by default all are tokens. A token sees those before it, as in Apple's
                code; in transformers' own model, under `sdpa`, it sees all tokens where nothing is padded.
            kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is the feature of the first
            closing token, projected into the joint space, `(num_texts, projection_dim)`, not normalised; all else is
            the text encoder's.

        Raises:
            ValueError: the tokens have the wrong shape or dtype, are too many, or none; the mask has another shape.
            TypeError: an argument is none of these, and none that transformers passes to every model.
        """
        for name, value in kwargs.items():
            if value is not None and name not in (*TEXT_OPTIONS, "num_items_in_batch", "use_cache"):
                raise TypeError(f"`{name}` is not an argument of `get_text_features`.")
        outputs = self._encode_texts(input_ids, self._text_mask(input_ids, attention_mask), kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def _encode_texts(
        self, input_ids: torch.Tensor, mask: torch.Tensor, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling:
        # Nothing else: its attention would read `is_causal`, and ignore the rest.
        options = {name: kwargs[name] for name in TEXT_OPTIONS if name in kwargs}
        return self.text_model(input_ids, mask, return_dict=True, **options)

    def _text_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Checks the tokens and returns their mask."""
        if (
            not isinstance(input_ids, torch.Tensor)
            or input_ids.ndim != 2
            or input_ids.numel() == 0
            or input_ids.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                "`input_ids` must be a tensor of integers of shape (num_texts, num_tokens), none of them 0, got "
                f"{kind_of(input_ids)}."
            )
        longest = self.config.text_config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"`input_ids` must hold at most {longest} tokens per text, got {input_ids.shape[1]}: call the "
                f"processor with `truncation=True, max_length={longest}`."
            )
        if attention_mask is None:
            return torch.ones_like(input_ids)
        given = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else kind_of(attention_mask)
        if given != tuple(input_ids.shape):
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {given}."
            )
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> Aimv2Output:
        """
        Args:
            input_ids, attention_mask: As for [`~Aimv2PackingImageTextModel.get_text_features`].
            hidden_states, grid_thw: As for [`~Aimv2PackingImageTextModel.get_image_features`].
            kwargs: `output_hidden_states`, of both parts, and `return_dict`; what else the vision tower takes.

        Returns:
            [`~transformers.models.aimv2.modeling_aimv2.Aimv2Output`]: `image_embeds` of shape `(num_segments,
            projection_dim)` and `text_embeds` of shape `(num_texts, projection_dim)`, each of length 1;
            `logits_per_image` of shape `(num_segments, num_texts)`, their products times the scale, and
            `logits_per_text`, the same transposed; `vision_model_output` and `text_model_output`, not projected.

        Raises:
            ValueError: the arguments have the wrong shape or dtype, or do not agree.
        """
        if input_ids is None or hidden_states is None:
            raise ValueError(
                "`forward` compares images with texts: it needs `input_ids`, and `hidden_states` with `grid_thw`. For "
                "one of them alone there are `get_image_features` and `get_text_features`."
            )
        text_mask = self._text_mask(input_ids, attention_mask)
        vision_outputs = self.vision_model(hidden_states, grid_thw, return_dict=True, **kwargs)
        text_outputs = self._encode_texts(input_ids, text_mask, kwargs)
        image_embeds = F.normalize(self.visual_projection(vision_outputs.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text_outputs.pooler_output), dim=-1)

        # With accelerate's `device_map` the parts may be on different devices.
        scale = self.logit_scale.clamp(0, math.log(self.config.max_logit_scale)).exp().to(text_embeds.device)
        logits_per_text = (scale * text_embeds) @ image_embeds.to(text_embeds.device).T
        return Aimv2Output(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


__all__ = ["Aimv2PackingImageTextModel"]
