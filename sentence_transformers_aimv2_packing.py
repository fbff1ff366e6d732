# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What Sentence Transformers loads: images of any sizes, and texts where the model has them, as one vector each."""

from typing import Any

import torch
from sentence_transformers.base.modules.transformer import Transformer

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
        if self.tokenizer is not None:
            # Beyond it there are no positions; Sentence Transformers truncates to it.
            longest = self.config.text_config.max_position_embeddings
            self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, longest)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Adds `sentence_embedding` of shape `(num_images or num_texts, embedding_dimension)` to `features`, in their
        order and not normalised.
        """
        if features.get("modality") != "image":
            return super().forward(features, **kwargs)
        grid_thw = features["grid_thw"].cpu()
        lengths = grid_thw.prod(dim=1)
        budget = max(self.patches_per_forward, int(lengths.max()))
        batches = PatchBudgetBatchSampler(lengths.tolist(), budget)
        patches = features["hidden_states"].split([int(lengths[batch].sum()) for batch in batches])
        vectors = []
        for batch, hidden_states in zip(batches, patches, strict=True):
            part = {**features, "hidden_states": hidden_states, "grid_thw": grid_thw[batch]}
            vectors.append(super().forward(part, **kwargs)[self.module_output_name])
        features[self.module_output_name] = torch.cat(vectors)
        return features


__all__ = ["Aimv2PackingTransformer"]
