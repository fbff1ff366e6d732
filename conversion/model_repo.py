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
from .code_files import REPO, copy_code
from .image_settings import image_settings
from .image_text import ImageText
from .messages import printable
from .model_card import write_card
from .repo_contents import repo_differences
from .repo_kinds import RepoKind, is_converted, repo_kind
from .safetensors_files import main_dtype, same_tensors, write_checkpoint
from .source_files import copy_licences, copy_tokenizer
from .sources import Source, read_source
from .verification import Report


# Fields of a configuration that say how it was made or where its code is.
DERIVED = ("architectures", "auto_map", "dtype", "transformers_version")
NO_TOKENIZER = (
    "{source} has no complete tokenizer, it lacks {lacking}. The converted repo takes images and token ids, but no "
    "words until these files are added to it"
)


def convert(
    source: Source,
    output: Path,
    model_id: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verifier: Callable[[Path], Report] | None = None,
    plain: bool = False,
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
        plain (`bool`, *optional*, defaults to `False`): Whether the repo carries the plain model alone.

    Raises:
        ValueError: the result does not fit on the disk, or `output` is not to be replaced.
        FileExistsError: `output` exists and may not be replaced.
    """
    model, kind = source.model, RepoKind(isinstance(source.model, ImageText), plain)
    check_output(output, source.folder, overwrite, kind)
    with atomic_folder(output, overwrite) as folder:
        needed = sum(tensor.nbytes_as(dtype) for tensor in model.tensors.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            sizes = [tqdm.format_sizeof(size, "B") for size in (needed, free)]
            raise ValueError(
                f"{output} needs {sizes[0]}, but only {sizes[1]} are free there: free some space, choose another disk, "
                "or convert to a smaller --dtype."
            )
        for note in (*model.notes, *write_configs(folder, source, kind, dtype)):
            warn(note)
        if kind.image_text:
            lacking, left_out = copy_tokenizer(source.folder, folder)
            if left_out:
                warn(f"not taken over from the source's tokenizer: {', '.join(left_out)}")
            if lacking:
                warn(NO_TOKENIZER.format(source=source.name, lacking=" and ".join(lacking)))
        copy_code(folder, kind.code_files)
        shutil.copyfile(REPO / "LICENSE", folder / "LICENSE")
        licences, left_out = copy_licences(source.folder, folder)
        for reason in left_out:
            warn(f"not taken over from the source: {reason}")
        # Last, as it takes longest, of what may be refused.
        for name in write_checkpoint(folder, model.tensors, dtype, max_shard_size):
            warn(f"{printable(name)} holds NaN or infinite values")
        report = verifier(folder) if verifier else None
        write_card(folder, source, kind, model_id, dtype, licences, report)


def check_output(output: Path, source: Path, overwrite: bool, kind: RepoKind) -> None:
    """Refuses to write where something else than an earlier conversion would be lost."""
    output, source = output.resolve(), source.resolve()
    if source.is_relative_to(output):
        raise ValueError(f"{output} holds the source: choose another folder for the output.")
    if overwrite and output.exists() and not (is_converted(output) or is_empty_folder(output)):
        raise ValueError(f"{output} is no converted model repo: --overwrite does not replace it. Remove it yourself.")
    if not overwrite and is_converted(output) and (difference := other_kind(output, kind.plain)):
        raise FileExistsError(f"{output} exists and {difference}. Choose another folder, or replace it: --overwrite.")


def other_kind(output: Path, plain: bool) -> str | None:
    """How a converted repo differs from what is asked for in its kind, or `None`."""
    if repo_kind(output).plain == plain:
        return None
    return "has no engines, as --plain makes it" if plain is False else "has engines, without which --plain makes it"


def warn(text: str) -> None:
    print(f"warning: {text}.", file=sys.stderr)


def difference_from(output: Path, source: Source, dtype: torch.dtype | None, plain: bool) -> str | None:
    """
    How `output`, a converted repo, differs from what [`convert`] makes of `source`, by content; `None` where its kind,
    code, configuration and weights are the same.
    """
    if difference := other_kind(output, plain):
        return difference
    if differences := repo_differences(output):
        return f"is not what this tree writes: {differences[0]}"
    existing = read_source(str(output)).model
    if type(existing) is not type(source.model) or fields(existing.config) != fields(source.model.config):
        return "has another configuration"
    same = same_tensors(existing.tensors, source.model.tensors, dtype)
    return None if same else "has other weights, or weights of another dtype"


def fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of the model, without what [`convert`] sets itself."""

    def stripped(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: stripped(inner) for name, inner in value.items() if name not in DERIVED}

    return stripped(config.to_dict())


def write_configs(folder: Path, source: Source, kind: RepoKind, dtype: torch.dtype | None) -> list[str]:
    """`config.json` and those of the processors. Returns what of the source's image processor could not be kept."""
    config = source.model.config
    vision = config.vision_config if kind.image_text else config
    config.architectures, config.auto_map = kind.architectures, kind.auto_map
    config.dtype = dtype or main_dtype(source.model.tensors)
    config.save_pretrained(folder)
    settings, notes = image_settings(source.folder, source.config, vision, kind.image_processor)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    kind.write_json(folder)
    return notes
