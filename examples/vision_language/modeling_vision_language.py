# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A LLaVA-style model with AIMv2 as its tower: configuration, model and processor. Beside the tower's files it is the code
of a model repo, which AutoModel and AutoProcessor load in any process.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .accelerated_aimv2_packing import Aimv2PackingAcceleratedModel
from .batching_aimv2_packing import merge_patches
from .configuration_aimv2_packing import Aimv2PackingConfig


class VisionLanguageConfig(PreTrainedConfig):
    model_type = "aimv2_packing_llava"
    sub_configs = {"vision_config": Aimv2PackingConfig, "text_config": AutoConfig}
    vision_config: Any = None
    text_config: Any = None
    image_token_id: int | None = None
    # Side of the square of patches that one image token stands for, as the image processor's.
    merge_size: int = 1

    def __post_init__(self, **kwargs):
        # As they come from a file. The tower's is of this repo's class, whichever repo it was loaded from.
        if self.vision_config is not None and not isinstance(self.vision_config, Aimv2PackingConfig):
            vision = self.vision_config if isinstance(self.vision_config, dict) else self.vision_config.to_dict()
            self.vision_config = Aimv2PackingConfig(**{k: v for k, v in vision.items() if k != "model_type"})
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


class VisionLanguageModel(PreTrainedModel):
    """
    Each image token of the text is replaced by one projected square of `merge_size` x `merge_size` patches, in the
    order of the packed sequence.
    """

    config_class = VisionLanguageConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisionLanguageConfig):
        super().__init__(config)
        self.vision = Aimv2PackingAcceleratedModel._from_config(config.vision_config)
        self.language = AutoModelForCausalLM.from_config(config.text_config)
        width = config.text_config.hidden_size
        features = config.vision_config.hidden_size * config.merge_size**2
        self.projector = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.post_init()

    def embed(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor | None = None, grid_thw: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        `(texts, length, text hidden_size)`: the embeddings of the text, with projected patches for image tokens.

        Raises:
            ValueError: there are more or fewer image tokens than squares of patches.
        """
        embeddings = self.language.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        rows, tokens = embeddings.new_empty(0, embeddings.shape[-1]), int(is_image.sum())
        if hidden_states is not None:
            features = self.vision(hidden_states, grid_thw).last_hidden_state
            rows = self.projector(merge_patches(features, grid_thw, self.config.merge_size))
        if tokens != len(rows):
            raise ValueError(f"`input_ids` must hold an image token per row of features, got {tokens} and {len(rows)}.")
        return embeddings.masked_scatter(is_image[..., None], rows.to(embeddings.dtype))

    def forward(self, input_ids, attention_mask=None, hidden_states=None, grid_thw=None, labels=None, **kwargs):
        embeddings = self.embed(input_ids, hidden_states, grid_thw)
        # No cache: it would keep what gradient checkpointing throws away.
        return self.language(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, use_cache=False, **kwargs
        )

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, hidden_states=None, grid_thw=None, **kwargs) -> torch.Tensor:
        """The new tokens alone; `kwargs` are those of [`~transformers.GenerationMixin.generate`]."""
        embeddings = self.embed(input_ids, hidden_states, grid_thw)
        return self.language.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)


class VisionLanguageProcessor(ProcessorMixin):
    """
    `processor(images, text)` writes an image token for every row of features: each `<image>` of a text becomes as many
    as its image has squares of `merge_size` x `merge_size` patches. As transformers' `Qwen2VLProcessor`.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands for an image in its text; transformers calls it for each."""
        return self.image_token * (
            int(image_inputs["grid_thw"][image_idx].prod()) // self.image_processor.merge_size**2
        )

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """
        Image tokens of images of `(height, width)` pixels, without the images: what vLLM asks a processor for.

        Args:
            image_sizes (`list`, *optional*): Of each image.
            kwargs: As a call's for images, such as `max_patches`.
        """
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes or ()]
        tokens = [count // self.image_processor.merge_size**2 for count in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)


__all__ = ["VisionLanguageConfig", "VisionLanguageModel", "VisionLanguageProcessor"]
