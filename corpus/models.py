# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The model repo of a run: found, checked and loaded with this repo's code."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from conversion.hub_files import download_files, require_converted
from conversion.local_code import local_class
from conversion.messages import printable
from corpus.settings import Settings, config_of


def model_folder(model: str, revision: str | None) -> tuple[str, str | None]:
    """
    The folder of a model repo, downloaded where it is on the Hub, and its commit there.

    Raises:
        ValueError: there is no such folder or repo, it is no packed AIMv2 model, or other files change what it is.
    """
    try:
        commit = require_converted(model, revision)
        folder = download_files(model, commit, ["*.json", "*.safetensors"]) if commit else Path(model).expanduser()
    except ValueError as error:
        raise ValueError(f"`--model` {error}") from error
    # Each would change what is loaded, and is in no hash.
    if others := {"configuration_files", "transformers_weights"} & config_of(str(folder)).keys():
        raise ValueError(f"`--model` {printable(model)} names other files to read in config.json ({min(others)}).")
    if os.path.lexists(os.path.join(folder, "adapter_config.json")):
        raise ValueError(f"`--model` {printable(model)} holds an adapter (adapter_config.json): merge it first.")
    return os.path.abspath(folder), commit


def load_model(folder: str, settings: Settings):
    """
    The image-text model for projected features, else the vision tower, which may be a part of one.

    Raises:
        ValueError: the weights cannot be read, or lack a tensor, which transformers would fill at random.
    """
    disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    # Or the pickle of a folder that holds both would be read.
    options["use_safetensors"] = True
    if settings.pooling == "projection":
        model_class = local_class("accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel")
    else:
        model_class = local_class("accelerated_aimv2_packing.Aimv2PackingAcceleratedModel")
    try:
        model, info = model_class.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {folder} cannot be read ({error}): copy or convert the model again."
        ) from error
    if info["missing_keys"]:
        raise ValueError(f"The weights in {folder} lack {sorted(info['missing_keys'])[0]}: convert the model again.")
    return model.eval()


def load_processor(folder: str, max_patches: int | None = None, image_size: int | None = None):
    """
    The image processor with the settings of a run.

    Raises:
        OSError: there is no preprocessor_config.json.
        ValueError: settings that do not fit each other.
    """
    processor_class = local_class("image_processing_aimv2_packing.Aimv2PackingImageProcessor")
    processor = processor_class.from_pretrained(folder)
    if max_patches is not None:
        if processor.image_size is not None or image_size is not None:
            side = image_size or processor.image_size
            raise ValueError(f"`--max-patches` has no meaning where every image is resized to {side} pixels.")
        processor.max_patches = max_patches
        processor.min_patches = min(processor.min_patches, max_patches)
    if image_size is not None:
        processor.image_size = image_size
    return processor


def device_of(name: str | None) -> str:
    """
    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` {name} is not there: {str(error).splitlines()[0]}") from error
    return str(device)
