# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Finds checkpoints, on disk or on the Hub."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checkpoint_formats import Encoder, find_encoder
from .code_files import CODE_FILES
from .safetensors_files import choose_weights, find_weights, read_checkpoint, read_json, read_weight_map, safe_path


@dataclass
class Source:
    """
    An original checkpoint.

    Attributes:
        name (`str`): Hub id with revision, or file or folder name.
        repo_id (`str` or `None`): Its Hub id.
        folder (`Path`): Where its other files are.
        config (`dict`): Content of its `config.json`, or empty.
        encoder (`Encoder`): The AIMv2 encoder in it.
    """

    name: str
    repo_id: str | None
    folder: Path
    config: dict[str, Any]
    encoder: Encoder


def read_source(source: str, revision: str | None = None, prefix: str | None = None) -> Source:
    """
    Finds a checkpoint, downloads it if it is on the Hub, and looks for the AIMv2 encoder in it.

    Args:
        source (`str`): A folder, a `.safetensors` file, an index of such files, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        prefix (`str`, *optional*): What the names of the encoder's tensors begin with.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged, unsafe or no AIMv2 encoder.
        `huggingface_hub.errors.HfHubHTTPError`: the Hub refuses.
    """
    path = Path(source).expanduser()
    repo_id = None
    name = path.resolve().name
    if not path.exists():
        path, commit = download(source, revision)
        repo_id, name = source, f"{source} at revision {commit}"
    elif revision is not None:
        raise ValueError(f"--revision is for sources on the Hub, but {source} is a local path.")
    weights = find_weights(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(safe_path(folder, "config.json")) if os.path.lexists(folder / "config.json") else {}
    return Source(name, repo_id, folder, config, find_encoder(read_checkpoint(weights), config, prefix))


def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """The folder with the weights, configuration, card and licence of a Hub repo, and its commit."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is no existing path and no Hub id: {error}") from error
    info = HfApi().model_info(repo_id, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    files = [choose_weights(repo_id, names)]
    if files[0].endswith(".json"):
        index = Path(hf_hub_download(repo_id, files[0], revision=info.sha))
        files += sorted(set(read_weight_map(index).values()))
    wanted = [*files, "*.json", "README.md", "LICENSE*", "WEIGHTS_LICENSE*", *(path.name for path in CODE_FILES)]
    return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=wanted)), str(info.sha)
