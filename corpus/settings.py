# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the rows of an output depend on, by content: all rows of one output have the same."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from huggingface_hub import constants

from conversion.atomic_folder import sync
from conversion.messages import printable


# Of config.json: what says nothing about the features.
VOLATILE = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}

# Of the image processor: what the patches of an image depend on.
PROCESSOR_FIELDS = (
    "patch_size",
    "image_size",
    "min_patches",
    "max_patches",
    "patch_layout",
    "resample",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)


@dataclass(frozen=True)
class Settings:
    """`weights` is a hash of every byte; no path is here, because paths may move."""

    weights: str
    config: dict[str, Any]
    processor: dict[str, Any]
    dtype: str
    pooling: str
    patch_features: str | None
    image_column: str | None
    id_column: str | None
    embedding_dtype: str = "float32"
    # The Arrow type of each column.
    keep: dict[str, str] | None = None

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What is not the same in a record of other settings, each as "NAME is VALUE, was VALUE"."""
        found = []
        for name, value in vars(self).items():
            # An output of before a setting was there has its default.
            was = other.get(name, getattr(type(self), name, None))
            if isinstance(value, dict) and isinstance(was, dict):
                keys = sorted(key for key in value.keys() | was.keys() if value.get(key) != was.get(key))
                found += [f"{name}.{key} is {value.get(key)!r}, was {was.get(key)!r}" for key in keys]
            elif value != was:
                found.append(f"{name} is {shown(value)}, was {shown(was)}")
        return found


@dataclass(frozen=True)
class Job:
    """
    `model` is a folder or an id of the Hub, whose commit is `revision`; `keep` has the columns that are kept of Parquet
    files, or of an archive the suffixes of the texts beside its images.
    """

    model: str
    revision: str | None
    inputs: tuple[str, ...]
    max_patches: int | None
    image_size: int | None
    patches_per_batch: int
    image_formats: tuple[str, ...]
    max_image_bytes: int
    max_image_pixels: int
    settings: Settings
    keep: pa.Schema | None = None


def shown(value: Any) -> str:
    """A hash shortened, anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def config_of(folder: str) -> dict[str, Any]:
    fields = json.loads(Path(folder, "config.json").read_bytes())
    return {name: value for name, value in fields.items() if name not in VOLATILE}


def processor_of(processor: Any) -> dict[str, Any]:
    fields = {name: getattr(processor, name, None) for name in PROCESSOR_FIELDS}
    # Outputs of before it was there have none.
    if processor.merge_size != 1:
        fields["merge_size"] = processor.merge_size
    # As JSON gives it back: a tuple is a list, an enumeration its number. The backends differ in rounding.
    return json.loads(json.dumps({**fields, "backend": type(processor).__name__}))


def weights_of(folder: str) -> str:
    """
    Hash of the files of weights that transformers reads in a folder.

    Raises:
        ValueError: there are none.
    """
    names = ["model.safetensors"]
    index = Path(folder, "model.safetensors.index.json")
    if not Path(folder, names[0]).exists() and index.exists():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    missing = [name for name in names if not Path(folder, name).is_file() or os.path.basename(name) != name]
    if missing:
        raise ValueError(f"{printable(folder)} has no weights (.safetensors): {printable(missing[0])} is not there.")
    return hashlib.sha256(json.dumps({name: file_hash(Path(folder, name)) for name in names}).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, remembered on this machine for as long as its size and times stay."""
    path = file.resolve()
    status = path.stat()
    # The time of the last change of the inode too: a copy may set the other back.
    key = f"{path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    folder = Path(constants.HF_HOME, "aimv2_packing", "hashes")
    remembered = folder / hashlib.sha256(os.fsencode(key)).hexdigest()
    if remembered.exists():
        return remembered.read_text()
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # A home that cannot be written to costs time, not the run.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            unfinished = folder / ".unfinished"
            unfinished.write_text(digest)
            sync(unfinished)
            os.replace(unfinished, remembered)
    return digest


def code_hash(folder: str) -> str:
    """Of the code that makes the features: a change of it is only warned about."""
    files = sorted([*Path(folder).glob("*_aimv2_packing.py"), *Path(__file__).parent.glob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
