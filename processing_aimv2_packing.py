# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Processor of the image-text model: tokenizer and image processor in one."""

from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import has_file


TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class Aimv2PackingProcessor(ProcessorMixin):
    """
    `processor(images=..., text=...)` gives `hidden_states` and `grid_thw` of the images, and `input_ids` and
    `attention_mask` of the texts; either may be left out. Arguments of one part alone go in `images_kwargs` and
    `text_kwargs`.
    """

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None: this processor takes images and texts. Frames of a video go into "
                    "`image_processor.preprocess_videos`."
                )
        if isinstance(text, list) and not text:
            raise ValueError("`text` must be a text or a list of at least one, got an empty list.")
        # Images are read by the image processor, with its own arguments, such as `allow_urls`.
        return images, *super().prepare_inputs_layout(None, text, **kwargs)[1:]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~transformers.ProcessorMixin.from_pretrained`].

        Raises:
            ValueError: the repo has no tokenizer.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            where = {
                name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs
            }
            if any(has_file(pretrained_model_name_or_path, name, **where) for name in TOKENIZER_FILES):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has no tokenizer, none of {', '.join(TOKENIZER_FILES)}: add the "
                "tokenizer files of its source, or load the image processor alone, with `AutoImageProcessor`."
            ) from error


__all__ = ["Aimv2PackingProcessor"]
