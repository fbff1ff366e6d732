# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A vision tower as the training code of LLaVA-style models wraps one: images of any sizes in, the features of a chosen
layer out, image by image with their rows and columns. The class is there to be copied; run, it prints what it makes of
pictures.

    python examples/llava_tower.py [IMAGE ...] [--checkpoint CHECKPOINT] [--select-layer N]
"""

import argparse
from collections.abc import Sequence
from typing import Any

from loading import PHOTOGRAPHS, load, run  # first: it says what is not installed


# isort: split
import torch
from torch import nn


class LlavaTower(nn.Module):
    """
    Args:
        model (`Aimv2PackingModel`): The tower.
        image_processor: Of its checkpoint.
        select_layer (`int`, *optional*, defaults to -2): As LLaVA's `vision_feature_layer`, an index of
            `hidden_states`: -1 and the number of blocks are the last block, before the final norm. 0, the embeddings,
            is refused.
        frozen (`bool`, *optional*, defaults to `True`): Whether the tower stays in evaluation mode and is not trained.

    Attributes:
        hidden_size (`int`): Of a feature.

    Raises:
        ValueError: there is no such layer.

    Example:

    ```python
    >>> tower = LlavaTower(model, image_processor)
    >>> [tuple(features.shape) for features in tower([PIL.Image.new("RGB", size) for size in ((448, 224), (280, 420))])]
    [(16, 32, 1024), (30, 20, 1024)]
    ```
    """

    def __init__(self, model: nn.Module, image_processor: Any, select_layer: int = -2, frozen: bool = True):
        super().__init__()
        blocks = len(model.encoder.layers)
        if not (-blocks <= select_layer <= -1 or 1 <= select_layer <= blocks):
            raise ValueError(
                f"`select_layer` must be from 1 to {blocks} or from -{blocks} to -1, with {blocks} blocks, got "
                f"{select_layer}."
            )
        self.model, self.image_processor = model, image_processor
        self.select_layer, self.frozen = select_layer, frozen
        self.hidden_size = model.config.hidden_size
        model.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LlavaTower":
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    @property
    def dummy_feature(self) -> torch.Tensor:
        """`(1, hidden_size)` of zeros, for an example without an image."""
        return torch.zeros(1, self.hidden_size, device=self.model.device, dtype=self.model.dtype)

    def forward(self, images: Sequence[Any] | torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            images (`list`, or `torch.Tensor` of shape `(batch, channels, height, width)`): Floating-point tensors, in a
                batch or a list of `(channels, height, width)`, are normalised pixels, their sides multiples of the
                patch size. All else is what the image processor takes: paths, PIL images, arrays.

        Returns:
            `list[torch.Tensor]`: Per image `(rows, columns, hidden_size)`.

        Raises:
            ValueError: a side is no multiple of the patch size, or normalised pixels and other images are mixed.
        """
        if len(images) == 0:
            return []
        is_normalised = {isinstance(image, torch.Tensor) and image.is_floating_point() for image in images}
        if len(is_normalised) == 2:
            raise ValueError("`images` must be all normalised pixels (floating-point tensors) or none, got both.")
        inputs = self.pack(images) if True in is_normalised else self.image_processor(list(images), return_tensors="pt")
        hidden_states, grid_thw = inputs["hidden_states"].to(self.model.device), inputs["grid_thw"]
        block = self.select_layer - (self.select_layer > 0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            (maps,) = self.model.get_intermediate_layers(hidden_states, grid_thw, n=[block], reshape=True, norm=False)
        return [features.squeeze(0) for features in maps]

    def pack(self, images: Sequence[torch.Tensor] | torch.Tensor) -> dict[str, torch.Tensor]:
        """The patches of normalised pixels end to end, in the order of values that the model was made for."""
        size = self.model.config.patch_size
        patches, grids = [], []
        for image in images:
            if image.ndim != 3 or image.shape[1] % size or image.shape[2] % size or 0 in image.shape:
                raise ValueError(
                    "Normalised pixels must have the shape (channels, height, width), their sides multiples of the "
                    f"patch size {size}, got {tuple(image.shape)}."
                )
            cells = image.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (channels, rows, size, columns, size)
            order = (1, 3, 2, 4, 0) if self.model.config.patch_layout == "channels_last" else (1, 3, 0, 2, 4)
            patches.append(cells.permute(order).flatten(2).flatten(0, 1))
            grids.append((1, cells.shape[1], cells.shape[3]))
        return {"hidden_states": torch.cat(patches), "grid_thw": torch.tensor(grids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="default: the photographs of the examples")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument("--select-layer", type=int, default=-2, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    images = arguments.images or sorted(map(str, PHOTOGRAPHS.glob("*.jpg")))
    image_processor, model = load(arguments.checkpoint)
    for image, features in zip(images, LlavaTower(model, image_processor, arguments.select_layer)(images), strict=True):
        rows, columns, width = features.shape
        print(f"{image}: {rows} x {columns} features of {width} values")


if __name__ == "__main__":
    run(main)
