# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Features of images and texts, by transformers' models one image at a time, and packed."""

import random
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from transformers import Aimv2Model, Aimv2VisionModel, PreTrainedConfig

from .code_files import REPO
from .local_code import Aimv2PackingConfig, local_class
from .messages import printable


pack_in_order = local_class("batching_aimv2_packing.pack_in_order")
PHOTOGRAPHS = REPO / "examples" / "photographs"
MAX_PATCHES_PER_FORWARD = 8192
RANDOM_SIZES = 10
NUM_TEXTS = 8


def read_images(
    config: Aimv2PackingConfig, paths: list[Path] | None
) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """
    Names of the images, and `hidden_states` and `grid_thw` of each.

    Raises:
        ValueError: there are none.
    """
    files = paths or sorted(PHOTOGRAPHS.glob("*.jpg"))
    pictures: list[tuple[str, Any]] = [(printable(path.name), str(path)) for path in files]
    if not pictures:
        raise ValueError(f"No image to compare: {PHOTOGRAPHS} holds none. Name some with --images.")
    if paths is None:
        draw, num_photographs = random.Random(0), len(pictures)
        for index in range(RANDOM_SIZES):
            name, path = pictures[index % num_photographs]
            width, height = draw.randint(224, 1000), draw.randint(224, 1000)
            with Image.open(path) as photograph:
                pictures.append((f"{name} at {width} x {height}", photograph.resize((width, height))))
    # Not to `from_pretrained`: an AutoProcessor gives its arguments to the model's configuration as well.
    sizes = {
        "patch_size": config.patch_size,
        "patch_layout": config.patch_layout,
        "image_size": None if config.is_native else config.image_size,
    }
    processor = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessor").from_pretrained(REPO)
    return [name for name, _ in pictures], [processor(picture, return_tensors="pt", **sizes) for _, picture in pictures]


def pixels(inputs: dict[str, torch.Tensor], config: Aimv2PackingConfig) -> torch.Tensor:
    """The image that the patches were cut from, of shape `(1, num_channels, height, width)`."""
    _, rows, columns = inputs["grid_thw"][0].tolist()
    side = config.patch_size
    patches = inputs["hidden_states"].view(rows, columns, -1)
    if config.patch_layout == "channels_last":
        image = patches.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
    else:
        image = patches.view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
    return image.reshape(1, -1, rows * side, columns * side)


@torch.no_grad()
def original_features(
    model: Aimv2VisionModel, inputs: dict[str, torch.Tensor], config: Aimv2PackingConfig
) -> torch.Tensor:
    """`last_hidden_state` and `pooler_output` of one image, float32 of shape `(patches (+ 1), hidden_size)`."""
    pixel_values = pixels(inputs, config).to(model.device, model.dtype)
    # cuDNN's convolutions round float32 to TF32 by default; the packed model's matrix product does not.
    with torch.backends.cudnn.flags(allow_tf32=False):
        outputs = model(pixel_values)
    pooled = outputs.pooler_output.flatten(0, -2) if config.use_head else pixel_values.new_empty(0, config.hidden_size)
    return torch.cat([outputs.last_hidden_state[0], pooled]).float().cpu()


@torch.no_grad()
def original_joint(
    model: Aimv2Model, inputs: list[dict[str, torch.Tensor]], texts: dict[str, torch.Tensor], config: Aimv2PackingConfig
) -> dict[str, torch.Tensor]:
    """Features of all images, one at a time, and of all texts in the joint space, and their logits, in float32."""
    texts = {name: tensor.to(model.device) for name, tensor in texts.items()}
    image_features, logits = [], []
    for x in inputs:
        pixel_values = pixels(x, config).to(model.device, model.dtype)
        with torch.backends.cudnn.flags(allow_tf32=False):
            image_features.append(model.get_image_features(pixel_values).pooler_output)
            logits.append(model(pixel_values=pixel_values, **texts).logits_per_image)
    text_features = model.get_text_features(**texts).pooler_output
    parts = {"images": torch.cat(image_features), "texts": text_features, "logits": torch.cat(logits)}
    return {name: tensor.float().cpu() for name, tensor in parts.items()}


@torch.no_grad()
def packed_joint(
    model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], texts: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same, as many images in one forward as fit in `MAX_PATCHES_PER_FORWARD`."""
    texts = {name: tensor.to(model.device) for name, tensor in texts.items()}
    image_features, logits = [], []
    for patches, grid_thw in batches(inputs):
        hidden_states = patches.to(model.device)
        image_features.append(model.get_image_features(hidden_states, grid_thw).pooler_output)
        logits.append(model(hidden_states=hidden_states, grid_thw=grid_thw, **texts).logits_per_image)
    text_features = model.get_text_features(**texts).pooler_output
    parts = {"images": torch.cat(image_features), "texts": text_features, "logits": torch.cat(logits)}
    return {name: tensor.float().cpu() for name, tensor in parts.items()}


def random_texts(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """
    `input_ids` and `attention_mask` of texts of random tokens and lengths, each closed and padded at its end. Words
    would need a tokenizer, which a source may lack.
    """
    generator = torch.Generator().manual_seed(0)
    longest = config.max_position_embeddings
    lengths = torch.randint(1, longest + 1, (NUM_TEXTS, 1), generator=generator)
    input_ids = torch.randint(0, max(1, config.vocab_size - 1), (NUM_TEXTS, longest), generator=generator)
    # All but the closing token.
    input_ids += (input_ids >= config.eos_token_id).long()
    positions = torch.arange(longest)
    input_ids = torch.where(positions < lengths - 1, input_ids, config.eos_token_id)
    return {"input_ids": input_ids, "attention_mask": (positions < lengths).long()}


@torch.no_grad()
def packed_features(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """As [`original_features`] of each image, as many in one forward as fit in `MAX_PATCHES_PER_FORWARD`."""
    features = []
    for hidden_states, grid_thw in tqdm(batches(inputs), desc="Packed"):
        outputs = model(hidden_states.to(model.device), grid_thw)
        pooled = [outputs.last_hidden_state.new_empty(0, model.config.hidden_size)] * len(grid_thw)
        if model.config.use_head:
            pooled = list(outputs.pooler_output.split(1))
        encoded = outputs.last_hidden_state.split(grid_thw.prod(dim=1).tolist())
        features += [torch.cat(pair).float().cpu() for pair in zip(encoded, pooled, strict=True)]
    return features


def batches(inputs: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`hidden_states` and `grid_thw` of as many images, in their order, as fit in `MAX_PATCHES_PER_FORWARD`."""
    groups = pack_in_order(inputs, lambda x: len(x["hidden_states"]), MAX_PATCHES_PER_FORWARD)
    return [tuple(torch.cat([x[name] for x in group]) for name in ("hidden_states", "grid_thw")) for group in groups]
