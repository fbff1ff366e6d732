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

from .checkpoint_formats import RELEASED, Encoder
from .code_files import origin, sha256
from .hub_card import sealed
from .image_text import ImageText
from .messages import printable, printable_lines
from .repo_kinds import RepoKind
from .safetensors_files import main_dtype, safe_path
from .sources import Source
from .verification import Report


TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_card(
    folder: Path,
    source: Source,
    kind: RepoKind,
    model_id: str,
    dtype: torch.dtype | None,
    licences: list[str],
    report: Report | None,
) -> None:
    """Writes `README.md`; `licences` are the names of the weights' licences in `folder`."""
    model, config = source.model, source.model.config
    image_text = kind.image_text
    vision = config.vision_config if image_text else config
    licence, licence_text = source_licence(source, licences)
    weights_dtype = str(dtype or main_dtype(model.tensors)).removeprefix("torch.")
    parity = (
        "Not measured. To measure it: `python convert_weights.py REPO --verify`, with the converter of the code's repo."
    )
    if report is not None:
        parity = (
            f"Packed against {report.reference}, image by image, in {report.dtype} on {report.device} with "
            f"PyTorch {torch.__version__}.\n\n{report.thresholds()}\n\n{report.tables()}"
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
        title=in_card(model_id.rsplit("/", maxsplit=1)[-1]),
        model_id=model_id,
        source=in_card(source.name),
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
        left_out=in_card(summary(model.dropped)),
        parity=parity,
        code=[(path.name, sha256(path)) for path in kind.code_files],
        origin=origin(),
        licence=licence_text,
    )
    (folder / "README.md").write_text(sealed(str(card)), "utf-8")


def source_licence(source: Source, licences: list[str]) -> tuple[dict[str, Any], str]:
    """
    Fields of the card's front matter, and words, for the licence that the source's own card states. A link to one of
    the source's files leads to the copy, which is one of `licences`.
    """
    data: dict[str, Any] = {}
    if (source.folder / "README.md").exists():
        path = safe_path(source.folder, "README.md")
        try:
            data = metadata_load(path) or {}
        except (ValueError, RecursionError, YAMLError) as error:
            print(f"warning: the card of {source.name} cannot be read: {printable_lines(str(error))}", file=sys.stderr)
    several = data.get("license")
    stated = {name: data[name] for name in ("license", "license_name") if isinstance(data.get(name), str)}
    if isinstance(several, list) and several and all(isinstance(name, str) for name in several):
        stated["license"] = several
    if isinstance(link := data.get("license_link"), str):
        name = f"WEIGHTS_{link.removeprefix('./').removeprefix('WEIGHTS_')}"
        if name in licences or re.match("https?://", link):
            stated["license_link"] = name if name in licences else link
        else:
            print(f"warning: license_link {link!a} leads to no file that is copied: left out.", file=sys.stderr)
    if not stated:
        words = [f"{in_card(source.name)} does not state it in a card"]
    else:
        lists = [value if isinstance(value, list) else [value] for value in stated.values()]
        words = [in_card(word) for words in lists for word in words if word not in licences]
    return stated, ", ".join([*words, *(f"`{name}`" for name in licences)])


def in_card(text: str) -> str:
    """A name that somebody else chose as Markdown shows it: no HTML, no link, no cell of a table."""
    return re.sub(r"[<>&|`\[\]\\*]", lambda match: f"&#{ord(match[0])};", printable(text))


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
    return ", ".join(f"{printable(x)} ({count} tensors)" if count > 1 else printable(x) for x, count in groups.items())
