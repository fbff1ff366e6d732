# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Processor of the image-text model: tokenizer and image processor in one."""

from transformers.processing_utils import ProcessorMixin


class Aimv2PackingProcessor(ProcessorMixin):
    """
    `processor(images=..., text=...)` gives `hidden_states` and `grid_thw` of the images, and `input_ids` and
    `attention_mask` of the texts.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer)


__all__ = ["Aimv2PackingProcessor"]
