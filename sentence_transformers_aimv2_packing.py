# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What Sentence Transformers loads: images of any sizes, and texts where the model has them, as one vector each."""

import os
from collections.abc import Sequence
from typing import Any

import torch


try:
    from sentence_transformers.base.modules.transformer import Transformer
except ImportError as error:
    raise ImportError("This needs Sentence Transformers: `pip install 'sentence-transformers>=6.2'`.") from error

from .batching_aimv2_packing import PatchBudgetBatchSampler


class Aimv2PackingTransformer(Transformer):
    """
    The first and only module of a [`~sentence_transformers.SentenceTransformer`]: a batch of images of any sizes goes
    through the model's `get_image_features` in forwards of a bounded number of patches.

    Args:
        model_name_or_path (`str`): The model repo.
        patches_per_forward (`int`, *optional*, defaults to 16384):
            A batch of more patches goes through the model in several forwards of at most this many, or of one larger
            image.
        kwargs: As for [`~sentence_transformers.base.modules.transformer.Transformer`].

    Raises:
        ValueError: `patches_per_forward` is below 1.
    """

    config_keys = [*Transformer.config_keys, "patches_per_forward"]

    def __init__(self, model_name_or_path: str, *, patches_per_forward: int = 16384, **kwargs: Any):
        if patches_per_forward < 1:
            raise ValueError(f"`patches_per_forward` must be at least 1, got {patches_per_forward}.")
        super().__init__(model_name_or_path, **kwargs)
        self.patches_per_forward = patches_per_forward
        self.image_suffixes = getattr(self.processor, "image_processor", self.processor).image_suffixes()
        if self.tokenizer is not None:
            # Beyond it there are no positions; Sentence Transformers truncates to it.
            longest = self.config.text_config.max_position_embeddings
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, longest)

    def _image_named(self, sample: Any) -> Any:
        """
        `sample`, or `{"image": sample}` where it is a path of an image.

        Raises:
            ValueError: it is a dictionary of several images.
        """
        if isinstance(sample, os.PathLike):
            return {"image": sample}
        if isinstance(sample, dict) and isinstance(sample.get("image"), (list, tuple)):
            if len(sample["image"]) != 1:
                raise ValueError(f"An input must hold one image, got {len(sample['image'])}.")
            return {**sample, "image": sample["image"][0]}
        if isinstance(sample, str) and os.path.splitext(sample)[1].lower() in self.image_suffixes:
            is_image = os.path.isfile(sample) or sample.lower().startswith("file://")
            return {"image": sample} if is_image else sample
        return sample

    def preprocess(self, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Args:
            inputs (sequence): All images or all texts. A `Path` and `{"image": ...}` are images. A string is an image
                where it is an existing file or a `file://` URL with the suffix of one of the image processor's formats,
                or what Sentence Transformers takes for the URL of an image; else it is a text.
            args, kwargs: As for [`~sentence_transformers.base.modules.transformer.Transformer`].

        Returns:
            `dict`: For images `image_grid_thw` of shape `(num_images, 3)` and `pixel_values` of shape `(total_patches,
            num_channels * patch_size**2)`, the model's `grid_thw` and `hidden_states`.

        Raises:
            FileNotFoundError: a path is no file.
            OSError: a file holds no image of a format that this PIL reads.
            ValueError: images and texts in one batch, or several images in one input.
        """
        features = super().preprocess([self._image_named(sample) for sample in inputs], *args, **kwargs)
        if features.get("modality") != "image":
            return features
        grid_thw = features["grid_thw"]
        if len(grid_thw) != len(inputs):
            raise ValueError(f"An input must hold one image, got {len(grid_thw)} in {len(inputs)} inputs.")
        # By these names trainers and losses of Sentence Transformers find and cut packed images. The first tensor tells
        # them the number of samples.
        named = {"image_grid_thw": grid_thw, "pixel_values": features["hidden_states"]}
        return named | {key: value for key, value in features.items() if key not in ("grid_thw", "hidden_states")}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Adds `sentence_embedding` of shape `(num_images or num_texts, embedding_dimension)` to `features`, in their
        order and not normalised.

        Raises:
            ValueError: the embeddings of all layers are asked for.
        """
        if self.config.output_hidden_states:
            raise ValueError(
                "This model gives one vector per input and no embeddings of its layers: `output_hidden_states`, "
                "`AdaptiveLayerLoss` and `Matryoshka2dLoss` cannot be used with it."
            )
        if features.get("modality") != "image":
            return super().forward(features, **kwargs)
        grid_thw = features["image_grid_thw"].cpu()
        lengths = grid_thw.prod(dim=1)
        budget = max(self.patches_per_forward, int(lengths.max()))
        batches = PatchBudgetBatchSampler(lengths.tolist(), budget)
        patches = features["pixel_values"].split([int(lengths[batch].sum()) for batch in batches])
        vectors = []
        for batch, hidden_states in zip(batches, patches, strict=True):
            part = {**features, "hidden_states": hidden_states, "grid_thw": grid_thw[batch]}
            vectors.append(super().forward(part, **kwargs)[self.module_output_name])
        features[self.module_output_name] = torch.cat(vectors)
        return features


__all__ = ["Aimv2PackingTransformer"]
