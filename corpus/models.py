# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The model repo of a run: found, checked and loaded with this repo's code."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import HF_MODULES_CACHE
from transformers.utils.logging import disable_progress_bar

from corpus.settings import Settings


MODEL_TYPES = ("aimv2_packing", "aimv2_packing_image_text")


def code_folder() -> str:
    """Where the files called `*_aimv2_packing.py` are. Ray puts them and this package into two folders."""
    beside = Path(__file__).resolve().parent.parent
    return str(beside if (beside / "modeling_aimv2_packing.py").exists() else Path.cwd())


def local_class(name: str) -> Any:
    """A class or function of this repo's code: never of the model repo's, which only gives weights and settings."""
    os.makedirs(HF_MODULES_CACHE, exist_ok=True)
    # Workers start together, and transformers copies the files without a lock.
    with FileLock(os.path.join(HF_MODULES_CACHE, ".aimv2_packing.lock")):
        return get_class_from_dynamic_module(name, code_folder())


def model_folder(model: str, revision: str | None) -> tuple[str, str | None]:
    """
    The folder of a model repo, downloaded where it is on the Hub, and its commit there.

    Raises:
        ValueError: there is no such folder or repo, or it is no packed AIMv2 model.
    """
    if os.path.isdir(model):
        if revision:
            raise ValueError(f"`--revision` is for a model on the Hub, and `--model` {model} is a folder.")
        folder, commit = os.path.abspath(model), None
    else:
        folder, commit = hub_folder(model, revision)
    file = Path(folder, "config.json")
    if not file.exists():
        raise ValueError(f"`--model` {model} is no model repo: it has no config.json.")
    model_type = json.loads(file.read_bytes()).get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"`--model` {model} has model_type {model_type!r}, expected one of {MODEL_TYPES}. Convert it first: "
            f"python convert_weights.py {model} FOLDER, then --model FOLDER."
        )
    return folder, commit


def hub_folder(model: str, revision: str | None) -> tuple[str, str]:
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise ValueError(f"`--model` {model} is no folder, and no id of the Hub.") from None
    reason = ""
    try:
        # One short question, because a download asks an unreachable Hub again and again.
        commit = HfApi().model_info(model, revision=revision, timeout=10).sha
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"`--model` {model} is no folder, and the Hub shows no such repo{at} ({type(error).__name__}): check the "
            "spelling, or log in with `hf auth login`."
        ) from error
    except Exception as error:
        commit, reason = None, type(error).__name__
    patterns = ["*.json", "*.safetensors"]
    try:
        folder = snapshot_download(
            model, revision=commit or revision, allow_patterns=patterns, local_files_only=commit is None
        )
    except LocalEntryNotFoundError as error:
        reason = reason or type(error.__cause__ or error).__name__
        raise ValueError(f"`--model` {model} is no folder, and the Hub cannot be reached ({reason}).") from None
    return folder, commit or os.path.basename(folder)


def load_model(folder: str, settings: Settings):
    """
    The image-text model for projected features, else the vision tower, which may be a part of one.

    Raises:
        ValueError: the weights lack a tensor, which transformers would fill at random.
    """
    disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "output_loading_info": True}
    if settings.pooling == "projection":
        model_class = local_class("image_text_aimv2_packing.Aimv2PackingImageTextModel")
    else:
        model_class = local_class("modeling_aimv2_packing.Aimv2PackingModel")
    model, info = model_class.from_pretrained(folder, **options)
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
