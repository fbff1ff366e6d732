# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the card of a converted repo."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from .checkpoint_formats import Encoder
from .code_files import CODE_FILES, origin, sha256
from .image_text import ImageText
from .safetensors_files import main_dtype, safe_path
from .sources import Source
from .verification import Report


TEMPLATE = Path(__file__).with_name("model_card_template.md")
# By hidden size, intermediate size and number of layers.
RELEASED = {
    (1024, 2816, 24): "Large",
    (1536, 4096, 24): "Huge",
    (2048, 5632, 24): "1B",
    (3072, 8192, 24): "3B",
}


def write_card(folder: Path, source: Source, model_id: str, dtype: torch.dtype | None, report: Report | None) -> None:
    model, config = source.model, source.model.config
    image_text = isinstance(model, ImageText)
    vision = config.vision_config if image_text else config
    licence, licence_text = source_licence(source)
    if any(folder.glob("WEIGHTS_LICENSE*")):
        licence_text += f" (`{next(folder.glob('WEIGHTS_LICENSE*')).name}`)"
    weights_dtype = str(dtype or main_dtype(model.tensors)).removeprefix("torch.")
    parity = (
        "Not measured. To measure it: `python convert_weights.py REPO --verify`, with the converter of the code's repo."
    )
    if report is not None:
        parity = (
            f"Packed against {report.reference}, image by image, in {report.dtype} on {report.device} with "
            f"PyTorch {torch.__version__}; bounds: max diff {report.max_diff_bound:.1e}, min cosine "
            f"{report.min_cosine_bound}.\n\n{report.tables()}"
        )
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="zero-shot-image-classification" if image_text else "image-feature-extraction",
            base_model=source.repo_id,
            tags=["vision", "aimv2", "feature-extraction", "sentence-transformers", "custom_code"],
            **licence,
        ),
        template_path=str(TEMPLATE),
        model_id=model_id,
        source=source.name,
        cast="" if dtype is None else f", in {weights_dtype}",
        description=describe(model),
        checkpoint_format=model.checkpoint_format.name,
        config=config,
        vision=vision,
        text=config.text_config if image_text else None,
        positions="2-D sin-cos, any size"
        if vision.is_native
        else f"learned at {vision.image_size} x {vision.image_size} pixels, interpolated elsewhere",
        dtype=weights_dtype,
        left_out=summary(model.dropped),
        parity=parity,
        code=[(path.name, sha256(path)) for path in CODE_FILES],
        origin=origin(),
        licence=licence_text,
    )
    card.save(folder / "README.md")


def source_licence(source: Source) -> tuple[dict[str, Any], str]:
    """Fields of the card's front matter, and words, for the licence that the source's own card states."""
    stated: dict[str, Any] = {}
    if (source.folder / "README.md").exists():
        path = safe_path(source.folder, "README.md")
        try:
            data = metadata_load(path) or {}
            names = ("license", "license_name", "license_link")
            stated = {name: data[name] for name in names if isinstance(data.get(name), str)}
        except (ValueError, RecursionError, YAMLError) as error:
            print(f"warning: the card of {source.name} cannot be read: {error}", file=sys.stderr)
    if not stated:
        return {}, f"{source.name} does not state it in a card"
    return stated, ", ".join(f"`{value}`" for value in stated.values())


def describe(model: Encoder | ImageText) -> str:
    """The model in a few words: the released one with its geometry, or its sizes."""
    config = model.config.vision_config if isinstance(model, ImageText) else model.config
    name = RELEASED.get((config.hidden_size, config.intermediate_size, config.num_hidden_layers))
    size = f"AIMv2-{name}" if name else f"AIMv2 of {config.num_hidden_layers} layers of {config.hidden_size}"
    resolution = "native resolution" if config.is_native else f"{config.image_size} pixels"
    return f"{size}, {resolution}" + (", with its text encoder" if isinstance(model, ImageText) else "")


def summary(names: list[str]) -> str:
    """Names of tensors by what they begin with, with their number where that is not 1."""
    # Up to the number of a layer, or else to the module.
    groups = Counter(re.sub(r"\.\d+\..*|\.[^.]*$", "", name, count=1) for name in names)
    return ", ".join(f"{group} ({count} tensors)" if count > 1 else group for group, count in groups.items())
