# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a complete model repo."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig

from .atomic_folder import atomic_folder, is_empty_folder
from .checkpoint_formats import Encoder
from .code_files import REPO, code_differences, copy_code
from .hub_files import CONVERTED_TYPES
from .image_text import ImageText
from .model_card import write_card
from .safetensors_files import main_dtype, read_json, safe_path, same_tensors, write_checkpoint
from .sentence_transformers_files import write_sentence_transformers_files
from .sources import Source, read_source
from .tokenizer_files import copy_tokenizer
from .verification import Report


IMAGE_TEXT_CLASSES = {
    "AutoConfig": "configuration_aimv2_packing.Aimv2PackingImageTextConfig",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForZeroShotImageClassification"),
        "accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel",
    ),
}
PROCESSOR = {
    "auto_map": {"AutoProcessor": "processing_aimv2_packing.Aimv2PackingProcessor"},
    "processor_class": "Aimv2PackingProcessor",
}
# Fields of a configuration that say how it was made or where its code is.
DERIVED = ("architectures", "auto_map", "dtype", "transformers_version")
NO_TOKENIZER = (
    "warning: {source} has no complete tokenizer, it lacks {lacking}. The converted repo takes images and token ids, "
    "but no words until these files are added to it."
)


def convert(
    source: Source,
    output: Path,
    model_id: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verifier: Callable[[Path], Report] | None = None,
) -> None:
    """
    Writes a complete model repo: weights, configurations, tokenizer, code, licence and card.

    Args:
        source (`Source`): What to convert.
        output (`Path`): The folder to make. It appears once it is complete.
        model_id (`str`): What the card's usage example loads.
        dtype (`torch.dtype`, *optional*): What to cast the weights to; by default they keep theirs.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size of the largest file of weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an earlier conversion at `output`.
        verifier (`Callable`, *optional*): Called with the finished folder before it appears at `output`, to verify
            it; what it raises prevents that.

    Raises:
        ValueError: the result does not fit on the disk, or `output` is not to be replaced.
        FileExistsError: `output` exists and may not be replaced.
    """
    model = source.model
    check_output(output, source.folder, overwrite)
    with atomic_folder(output, overwrite) as folder:
        needed = sum(tensor.nbytes_as(dtype) for tensor in model.tensors.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            sizes = [tqdm.format_sizeof(size, "B") for size in (needed, free)]
            raise ValueError(
                f"{output} needs {sizes[0]}, but only {sizes[1]} are free there: free some space, choose another disk, "
                "or convert to a smaller --dtype."
            )
        for name in write_checkpoint(folder, model.tensors, dtype, max_shard_size):
            print(f"warning: {name} holds NaN or infinite values.", file=sys.stderr)
        write_configs(folder, model, dtype)
        if isinstance(model, ImageText) and (lacking := copy_tokenizer(source.folder, folder)):
            print(NO_TOKENIZER.format(source=source.name, lacking=" and ".join(lacking)), file=sys.stderr)
        copy_code(folder)
        shutil.copyfile(REPO / "LICENSE", folder / "LICENSE")
        for path in source.folder.glob("WEIGHTS_LICENSE*" if is_converted(source.folder) else "LICENSE*"):
            if not path.is_dir():
                name = f"WEIGHTS_{path.name.removeprefix('WEIGHTS_')}"
                shutil.copyfile(safe_path(source.folder, path.name), folder / name)
        report = verifier(folder) if verifier else None
        write_card(folder, source, model_id, dtype, report)


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuses to write where something else than an earlier conversion would be lost."""
    output, source = output.resolve(), source.resolve()
    if source.is_relative_to(output):
        raise ValueError(f"{output} holds the source: choose another folder for the output.")
    if overwrite and output.exists() and not (is_converted(output) or is_empty_folder(output)):
        raise ValueError(f"{output} is no converted model repo: --overwrite does not replace it. Remove it yourself.")


def is_converted(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in CONVERTED_TYPES


def holds_conversion(output: Path, source: Source, dtype: torch.dtype | None) -> bool:
    """Whether `output` already is what [`convert`] makes of `source`: weights, configuration and code, by content."""
    if not is_converted(output) or code_differences(output):
        return False
    existing = read_source(str(output)).model
    same_kind = type(existing) is type(source.model) and fields(existing.config) == fields(source.model.config)
    return same_kind and same_tensors(existing.tensors, source.model.tensors, dtype)


def fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of the model, without what [`convert`] sets itself."""

    def stripped(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: stripped(inner) for name, inner in value.items() if name not in DERIVED}

    return stripped(config.to_dict())


def write_configs(folder: Path, model: Encoder | ImageText, dtype: torch.dtype | None) -> None:
    """`config.json` and those of the processors: those of this repo, with the model's fields."""
    config, vision = model.config, model.config
    if isinstance(model, ImageText):
        vision = config.vision_config
        config.architectures, config.auto_map = ["Aimv2PackingAcceleratedImageTextModel"], IMAGE_TEXT_CLASSES
        (folder / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    else:
        config.architectures = ["Aimv2PackingAcceleratedModel"]
        config.auto_map = read_json(REPO / "config.json")["auto_map"]
    config.dtype = dtype or main_dtype(model.tensors)
    config.save_pretrained(folder)
    processor = read_json(REPO / "preprocessor_config.json") | {
        "patch_size": vision.patch_size,
        "patch_layout": vision.patch_layout,
        "image_size": None if vision.is_native else vision.image_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n")
    write_sentence_transformers_files(folder, config)
