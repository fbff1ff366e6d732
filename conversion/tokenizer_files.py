# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Takes the tokenizer of an image-text model over from its source: JSON and text, never code."""

import json
import os
import shutil
from pathlib import Path

from .safetensors_files import read_json, safe_path


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """
    Copies the tokenizer files of `source` into `folder`; classes of code that a configuration names are left out.

    Returns:
        `list[str]`: What a tokenizer still lacks, empty where it is complete.

    Raises:
        ValueError: a file lies outside `source`, or is no JSON object.
    """
    present = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    for name in present:
        path = safe_path(source, name)
        if name.endswith(".json"):
            fields = read_json(path)
            if name == "tokenizer_config.json" and "auto_map" in fields:
                del fields["auto_map"]
                (folder / name).write_text(json.dumps(fields, indent=2) + "\n")
                continue
        shutil.copyfile(path, folder / name)
    lacking = [] if "tokenizer_config.json" in present else ["tokenizer_config.json"]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
        lacking.append("tokenizer.json, or vocab.json and merges.txt")
    return lacking
