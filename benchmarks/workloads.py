# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of random weights and batches of images: what the other benchmarks here measure."""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


REPO = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(REPO))
from conversion.local_code import local_class  # noqa: E402


Grid = tuple[int, int]

# hidden_size, intermediate_size, num_attention_heads
GEOMETRIES = {"large": (1024, 2816, 8), "huge": (1536, 4096, 12), "1B": (2048, 5632, 16), "3B": (3072, 8192, 24)}


def mixes() -> dict[str, list[Grid]]:
    """Grids `(height, width)` in patches, in the random order in which images arrive."""
    generator = torch.Generator().manual_seed(0)

    def sides(low: int, high: int) -> Grid:
        height, width = torch.randint(low, high + 1, (2,), generator=generator).tolist()
        return height, width

    small = [sides(4, 8) for _ in range(48)]
    return {
        "small": small,
        "mixed": [(11, 11), (32, 32), (16, 22), (27, 18), (12, 30), (24, 24), (14, 19), (20, 29)],
        "uniform_224": [(16, 16)] * 8,
        "uniform_448": [(32, 32)] * 4,
        "huge_among_small": [*small[:24], (64, 64), *small[24:]],
        "thumbnails": [sides(2, 5) for _ in range(512)],
        "one_224": [(16, 16)],
        "two_224": [(16, 16)] * 2,
        "four_mixed": [(11, 11), (32, 32), (16, 22), (27, 18)],
    }


def fill(grids: list[Grid], patches: int | None) -> list[Grid]:
    """The mix over and over until it holds `patches` patches."""
    if patches is None:
        return grids
    filled: list[Grid] = []
    while sum(height * width for height, width in filled) < patches:
        filled.append(grids[len(filled) % len(grids)])
    return filled


class Models(NamedTuple):
    """The original, the packed model and, where asked for, its compiled twin and an older one: of the same weights."""

    reference: Aimv2VisionModel
    packed: Any
    compiled: Any = None
    older: Any = None


def packing_class(checkout: Path = REPO) -> Any:
    """The class that a checkout of this repo names for `AutoModel`."""
    name = json.loads((checkout / "config.json").read_text())["auto_map"]["AutoModel"]
    return local_class(name) if checkout.resolve() == REPO else get_class_from_dynamic_module(name, str(checkout))


def make_models(args: argparse.Namespace, dtype: torch.dtype) -> Models:
    if args.checkpoint:
        reference = Aimv2VisionModel.from_pretrained(args.checkpoint)
    else:
        hidden_size, intermediate_size, heads = GEOMETRIES[args.geometry]
        torch.manual_seed(0)
        config = Aimv2VisionConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=heads,
            num_hidden_layers=args.layers,
            is_native=args.positions == "native",
            use_head=False,
        )
        with torch.device(args.device):
            reference = Aimv2VisionModel(config)
    reference = reference.to(args.device, dtype).eval()
    fields = reference.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)

    def packed(checkout: Path = REPO) -> torch.nn.Module:
        model_class = packing_class(checkout)
        with torch.device("meta"):
            model = model_class(model_class.config_class(**fields))
        model.load_state_dict(reference.state_dict(), strict=True, assign=True)
        # Weights of its own, laid in memory as those of a model that was loaded; `assign` shares the reference's.
        return copy.deepcopy(model).eval()

    compiled = packed() if args.compile else None
    for layer in compiled.encoder.layers if compiled is not None else ():
        layer.compile(fullgraph=True, dynamic=True)
    return Models(reference, packed(), compiled, packed(args.against) if args.against else None)


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    channels, height, width = pixels.shape
    patches = pixels.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch_size**2)


def model_flops(packed, grids: list[Grid]) -> int:
    """Floating-point operations of one forward: two per multiply-add, matrix products only."""
    config = packed.config
    patch_dim = config.num_channels * config.patch_size**2
    per_patch = config.num_hidden_layers * (
        4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    )
    total = 0
    for height, width in grids:
        patches = height * width
        total += 2 * patches * (per_patch + patch_dim * config.hidden_size)
        total += 2 * config.num_hidden_layers * 2 * patches**2 * config.hidden_size
    return total
