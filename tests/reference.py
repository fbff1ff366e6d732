# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests compare with: transformers' model, and Apple's forward written out in float64."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.initialization import no_init_weights

from conversion.local_code import hub_module, local_class


REPO = Path(__file__).resolve().parent.parent

Aimv2PackingModel = local_class("modeling_aimv2_packing.Aimv2PackingModel")
Aimv2PackingAcceleratedModel = local_class("accelerated_aimv2_packing.Aimv2PackingAcceleratedModel")
Aimv2PackingConfig = Aimv2PackingModel.config_class


packed_layout, with_positions = hub_module("layout").packed_layout, hub_module("layout").with_positions

# Head size 32, two heads, two layers; otherwise as the released models.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "use_head": False,
    "is_native": True,
}

# Grids that break things: one patch, strips, equal neighbours, equal areas of other shape, one that is large.
ODD_GRIDS = [(1, 1), (1, 9), (9, 1), (3, 3), (3, 3), (2, 6), (6, 2), (4, 3), (1, 1), (13, 11)]


def patchify(pixels: torch.Tensor, patch_size: int = 14, channels_last: bool = False) -> torch.Tensor:
    """`(channels, height, width)` to `(patches, patch_dim)`, row by row."""
    channels, height, width = pixels.shape
    patches = pixels.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    order = (1, 3, 2, 4, 0) if channels_last else (1, 3, 0, 2, 4)
    return patches.permute(order).reshape(-1, channels * patch_size**2)


def random_images(grids: list[tuple[int, int]], patch_size: int = 14) -> list[torch.Tensor]:
    return [torch.randn(3, height * patch_size, width * patch_size) for height, width in grids]


def pack(images: list[torch.Tensor], patch_size: int = 14) -> dict[str, torch.Tensor]:
    grids = [(1, image.shape[1] // patch_size, image.shape[2] // patch_size) for image in images]
    return {
        "hidden_states": torch.cat([patchify(image, patch_size) for image in images]),
        "grid_thw": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
    }


def random_mixes(count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Packed batches of 2 to 11 images, each side 1 to 19 patches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = int(torch.randint(2, 12, (), generator=generator))
        grids = [tuple(torch.randint(1, 20, (2,), generator=generator).tolist()) for _ in range(images)]
        yield pack(random_images(grids))


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which every part of the model shows in the output: norms near one, biases not zero."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float32)
        scale = 0.3 if parameter.ndim == 1 else parameter.shape[1:].numel() ** -0.5
        torch.nn.init.zeros_(parameter)
        parameter.data.add_(noise * scale + ("norm" in name and name.endswith("weight")))
    return model.eval()


def reference_model(dtype: torch.dtype = torch.float32, attn: str = "sdpa", **config) -> Aimv2VisionModel:
    with no_init_weights():
        model = Aimv2VisionModel(Aimv2VisionConfig(**{**TINY, **config}, attn_implementation=attn))
    return random_weights(model).to(dtype)


def packing_model(reference: Aimv2VisionModel, attn: str = "sdpa", plain: bool = False, **config):
    """The packed model with the weights, the geometry and the dtype of `reference`; accelerated unless `plain`."""
    fields = {**reference.config.to_dict(), **config}
    for name in ("model_type", "architectures", "transformers_version", "dtype", "auto_map"):
        fields.pop(name, None)
    model_class = Aimv2PackingModel if plain else Aimv2PackingAcceleratedModel
    # On a GPU a model's weights are laid side by side as they are initialised.
    with no_init_weights() if torch.get_default_device().type == "cpu" else nullcontext():
        model = model_class(Aimv2PackingConfig(**fields, attn_implementation=attn)).to(reference.dtype).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


def apple_forward(model: Aimv2VisionModel, image: torch.Tensor) -> torch.Tensor:
    """
    Apple's `AIMv2` forward on one `(channels, height, width)` image, in float64 and from the weights alone:
    `(patches, hidden_size)` after the final norm. Learned positions at the native grid only.
    """
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config

    def rms_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    patch, bias = weights["embeddings.patch_embed.weight"], weights["embeddings.patch_embed.bias"]
    x = F.conv2d(image.double()[None], patch, bias, stride=config.patch_size)[0]
    height, width = x.shape[1:]
    x = rms_norm(x.flatten(1).T, "embeddings.rms_norm")

    if config.is_native:
        frequency = 10000.0 ** -(torch.arange(config.hidden_size // 4).double() / (config.hidden_size // 4))
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        angles = [position.double()[:, None] * frequency for position in (column, row)]
        x = x + torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()], dim=1)
    else:
        x = x + weights["embeddings.position_embedding.weight"]

    heads = config.num_attention_heads
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        normed = rms_norm(x, f"{layer}.rms_norm1")
        q, k, v = (
            linear(normed, f"{layer}.attention.{name}_proj").view(len(x), heads, -1).transpose(0, 1) for name in "qkv"
        )
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
        x = x + linear(attended, f"{layer}.attention.out_proj")
        normed = rms_norm(x, f"{layer}.rms_norm2")
        gate, up = linear(normed, f"{layer}.ffn.gate_proj"), linear(normed, f"{layer}.ffn.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{layer}.ffn.down_proj")
    return rms_norm(x, "rms_norm")
