# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the image processor of a source becomes in the output: one of this repo's own kind, one of transformers
(`preprocessor_config.json`, or a part of `processor_config.json`), or timm's `pretrained_cfg`.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .local_code import Aimv2PackingConfig, local_class
from .messages import printable
from .repo_contents import IMAGE_PROCESSOR_FIELDS, mismatches, shortened
from .safetensors_files import read_json, safe_path


image_processor_class = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessorPil")

# What another processor's fields mean here too.
SHARED = ("do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "resample", "rescale_factor")
# What the fields below are read from, and what says nothing of the pixels.
READ = {
    *SHARED,
    *("size", "crop_size", "do_center_crop", "do_resize", "min_pixels", "max_pixels", "patch_size"),
    *("auto_map", "default_to_square", "feature_extractor_type", "image_processor_type", "processor_class"),
    *("data_format", "device", "input_data_format", "return_tensors"),
}
# transformers' number of what timm calls an interpolation.
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def image_settings(
    source: Path, source_config: dict[str, Any], vision: Aimv2PackingConfig, default: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """
    `preprocessor_config.json` of the output, and a line for each thing that the source's image processor does and this
    one cannot.

    Args:
        source (`Path`): Folder of the source.
        source_config (`dict`): Content of its `config.json`, or empty.
        vision (`Aimv2PackingConfig`): Configuration of the vision encoder.
        default (`dict`): What holds where the source is silent.

    Raises:
        ValueError: a setting is of no use: means of another number of channels, a file that is no JSON.
    """
    fields, timm = read_fields(source), source_config.get("pretrained_cfg")
    found: dict[str, Any] = {}
    notes: list[str] = []
    if str(fields.get("image_processor_type")).startswith("Aimv2PackingImageProcessor"):
        kept = IMAGE_PROCESSOR_FIELDS.keys() - {"image_processor_type", "patch_size", "patch_layout"}
        found = {name: fields[name] for name in sorted(kept & fields.keys())}
        notes += not_taken(fields, READ | IMAGE_PROCESSOR_FIELDS.keys())
    elif fields:
        found = {name: fields[name] for name in SHARED if fields.get(name) is not None}
        found |= read_size(fields, vision, notes)
        notes += not_taken(fields, READ)
    elif isinstance(timm, dict):
        found = read_timm(timm, notes)
    for name in ("image_mean", "image_std"):
        if type(found.get(name)) in (int, float):
            found[name] = [found[name]] * vision.num_channels
    if "max_patches" in found and type(found["max_patches"]) is int:
        found.setdefault("min_patches", min(default["min_patches"], found["max_patches"]))
    image_size = None if vision.is_native else vision.image_size
    settings = {
        **default,
        "image_size": image_size,
        **found,
        "patch_size": vision.patch_size,
        "patch_layout": vision.patch_layout,
    }
    for wrong in check(found, settings, vision.num_channels):
        raise ValueError(f"The image processor of the source cannot be taken over: {wrong}.")
    fixed = ("auto_map", "image_processor_type")
    try:
        image_processor_class(**{name: value for name, value in settings.items() if name not in fixed})
    except ValueError as error:
        raise ValueError(f"The image processor of the source cannot be taken over: {error}") from error
    return settings, notes


def read_fields(source: Path) -> dict[str, Any]:
    """The fields of the source's image processor, or none; `processor_config.json` comes first, as in loading."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if os.path.lexists(source / name):
            content = read_json(safe_path(source, name))
            fields = content.get("image_processor") if name == "processor_config.json" else content
            if isinstance(fields, dict):
                return fields
    return {}


def read_size(fields: dict[str, Any], vision: Aimv2PackingConfig, notes: list[str]) -> dict[str, Any]:
    """`image_size`, or the limits in patches, of what one of transformers' image processors makes of an image."""
    size, crop = sides(fields.get("size")), sides(fields.get("crop_size"))
    edge, area = size.get("shortest_edge"), vision.patch_size**2
    if fields.keys() & {"min_pixels", "max_pixels"} or ("patch_size" in fields and "longest_edge" in size):
        # As Qwen2-VL's, whose edges are areas.
        limits = {
            "min_patches": fields.get("min_pixels") or edge,
            "max_patches": fields.get("max_pixels") or size.get("longest_edge"),
        }
        return {"image_size": None, **{name: max(1, x // area) for name, x in limits.items() if type(x) is int}}
    if fields.get("do_resize") is False:
        notes.append("the source's image processor does not resize (do_resize), and this one does")
        return {}
    if not size and not crop:
        return {}
    crops = fields.get("do_center_crop", bool(crop)) is not False
    if crops and edge and crop.get("height") == crop.get("width") == edge and edge % vision.patch_size == 0:
        if vision.is_native:
            notes.append(
                f"like the source's, the image processor crops to {edge} x {edge} pixels; with `image_size` null in "
                "its configuration each image keeps its size, which this encoder can take"
            )
        return {"image_size": edge}
    cropping = f"crops to crop_size {shortened(fields.get('crop_size'))}" if crops else "does not crop"
    resizing = f"resizes to size {shortened(fields.get('size'))}"
    notes.append(f"the source's image processor {resizing} and {cropping}, which this one cannot")
    return {}


def sides(value: Any) -> dict[str, int]:
    """A size of transformers' as an object: one number is a shortest edge of `size` and a square of `crop_size`."""
    if type(value) is int:
        return {"shortest_edge": value, "height": value, "width": value}
    return {name: side for name, side in value.items() if type(side) is int} if isinstance(value, dict) else {}


def read_timm(timm: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """timm's settings: its evaluation resizes the shortest edge to the size over `crop_pct`, and crops the centre."""
    found = {name: timm[key] for name, key in (("image_mean", "mean"), ("image_std", "std")) if key in timm}
    notes += not_taken({name: timm[name] for name in ("crop_pct", "crop_mode") if name in timm}, ())
    interpolation = timm.get("interpolation", "bicubic")
    if isinstance(interpolation, str) and interpolation in INTERPOLATIONS:
        found["resample"] = INTERPOLATIONS[interpolation]
    else:
        notes += not_taken({"interpolation": interpolation}, ())
    return found


def not_taken(fields: dict[str, Any], known: Collection[str]) -> list[str]:
    """A line for each field that may change pixels and is not known."""
    off: tuple = (None, False, 1, [], {}, "center")
    return [
        f"{printable(name)} {shortened(value)} of the source's image processor is not taken over"
        for name, value in fields.items()
        if name not in known and not any(type(value) is type(x) and value == x for x in off)
    ]


def check(found: dict[str, Any], settings: dict[str, Any], channels: int) -> Iterator[str]:
    """What is wrong with the settings that were found, and with all of them together."""
    for name, value in found.items():
        yield from mismatches(value, IMAGE_PROCESSOR_FIELDS[name], name)
    for name in {"image_mean", "image_std"} & found.keys():
        if len(found[name]) != channels:
            yield f"{name} holds {len(found[name])} values, and images have {channels} channels"
    if 0 in settings["image_std"]:
        yield "image_std holds 0"
    side, patch_size = settings["image_size"], settings["patch_size"]
    if side is not None and (side < 1 or side % patch_size):
        yield f"image_size {side} is no multiple of patch_size {patch_size}"
    if not 1 <= settings["min_patches"] <= settings["max_patches"]:
        yield f"min_patches {settings['min_patches']} and max_patches {settings['max_patches']} are no limits"
