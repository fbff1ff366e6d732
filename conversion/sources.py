# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Finds checkpoints, on disk or on the Hub."""

import glob
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from .checkpoint_formats import Encoder, find_encoder
from .code_files import CODE_FILES
from .hub_files import HubOutOfReachError, ask_hub, cached_folder, hub_errors, local_path
from .image_text import ImageText, find_image_text
from .messages import printable
from .repo_contents import LICENCE, file_names
from .safetensors_files import (
    MAX_JSON_BYTES,
    choose_weights,
    find_weights,
    read_checkpoint,
    read_json,
    read_weight_map,
    safe_path,
)


@dataclass
class Source:
    """
    An original checkpoint.

    Attributes:
        name (`str`): Hub id with revision, or file or folder name.
        repo_id (`str` or `None`): Its Hub id.
        folder (`Path`): Where its other files are.
        config (`dict`): Content of its `config.json`, or empty.
        model (`Encoder` or `ImageText`): The AIMv2 vision encoder in it, or the image-text model that this is part of.
    """

    name: str
    repo_id: str | None
    folder: Path
    config: dict[str, Any]
    model: Encoder | ImageText


def read_source(
    source: str, revision: str | None = None, prefix: str | None = None, vision_only: bool = False
) -> Source:
    """
    Finds a checkpoint, downloads it if it is on the Hub, and looks for the AIMv2 model in it.

    Args:
        source (`str`): A folder, a `.safetensors` file, an index of such files, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        prefix (`str`, *optional*): What the names of the vision encoder's tensors begin with.
        vision_only (`bool`, *optional*, defaults to `False`): Whether to leave out what belongs to texts.

    Raises:
        ValueError: there is no such checkpoint, the Hub cannot give it, or it is damaged, unsafe or no AIMv2 encoder.
    """
    path = local_path(source, revision)
    repo_id, name = None, printable(Path(source).expanduser().resolve().name)
    if path is None:
        path, commit = download(source, revision)
        repo_id, name = source, f"{source} at revision {commit}"
    weights = find_weights(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(safe_path(folder, "config.json")) if os.path.lexists(folder / "config.json") else {}
    tensors = read_checkpoint(weights)
    vision = find_encoder(tensors, config, prefix)
    image_text = None if vision_only else find_image_text(vision, tensors, config)
    return Source(name, repo_id, folder, config, image_text or vision)


def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
    """
    The folder with the weights, configurations, tokenizer, card and licence of a Hub repo, and its commit. Where the
    Hub is out of reach, those of an earlier download.
    """
    with hub_errors(repo_id, revision):
        try:
            info = ask_hub(repo_id, revision)
        except HubOutOfReachError as error:
            folder = cached_folder(repo_id, revision, [])
            if folder is None or not holds_weights(folder):
                raise error.reason from None
            others = [x for x in file_names(folder) if not x.endswith(".safetensors")]
            print(
                f"warning: the Hub is out of reach: {repo_id} is what an earlier download holds, its weights and "
                f"{', '.join(map(printable, others))}. What is not among them is not taken over.",
                file=sys.stderr,
            )
            return folder, folder.name
        # Weights are as large as they are, and no text is.
        texts = [x.rfilename for x in info.siblings or [] if (x.size or 0) <= MAX_JSON_BYTES]
        names = [sibling.rfilename for sibling in info.siblings or []]
        files = [choose_weights(repo_id, names)]
        if files[0].endswith(".json"):
            index = Path(hf_hub_download(repo_id, files[0], revision=revision))
            files += sorted(set(read_weight_map(index).values()))
        # A converted repo's code is compared and not run.
        endings = (".json", ".py") if CODE_FILES[0].name in names else (".json",)
        licences = [name for name in texts if LICENCE.fullmatch(name.removeprefix("WEIGHTS_"))]
        wanted = [name for name in texts if name in ("merges.txt", "README.md", *licences) or name.endswith(endings)]
        # By the revision's own name, under which an offline run looks for it.
        patterns = [glob.escape(name) for name in (*files, *wanted)]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        return folder, folder.name


def holds_weights(folder: Path) -> bool:
    """Whether all the files of the weights are in an earlier download."""
    try:
        weights = find_weights(folder)
        files = read_weight_map(weights).values() if weights.suffix == ".json" else [weights.name]
    except ValueError:
        return False
    return all((folder / name).is_file() for name in files)
