# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a source's tokenizer and licences become in the output: JSON and text, never code."""

import json
import os
import shutil
from pathlib import Path

from .messages import printable
from .repo_contents import LICENCE, TEXT_FILES, mismatches
from .repo_kinds import TOKENIZER_FILES, is_converted
from .safetensors_files import read_json, safe_path


# Of one licence; the longest in use have a tenth of it.
MAX_LICENCE_BYTES = 1 << 20
# In a text, of the control characters.
LAYOUT_BYTES = b"\t\n\r\f"


def copy_tokenizer(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """
    Copies the tokenizer files of `source` into `folder`. Of the fields of `tokenizer_config.json` and
    `special_tokens_map.json` those are copied that say how to tokenize.

    Returns:
        `tuple[list[str], list[str]]`: What a tokenizer still lacks, empty where it is complete; and the fields that
        were left out, other than names of code.

    Raises:
        ValueError: a file lies outside `source`, or is no JSON object of the kind that its name says.
    """
    present = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    left_out = []
    for name in present:
        path = safe_path(source, name)
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            fields = read_json(path)
            kept = {
                field: value
                for field, value in fields.items()
                if not any(mismatches({field: value}, TEXT_FILES[name], ""))
            }
            left_out += [
                f"{printable(field)} of {name}" for field in fields if field not in kept and field != "auto_map"
            ]
            if kept != fields:
                (folder / name).write_text(json.dumps(kept, indent=2) + "\n")
                continue
        elif name.endswith(".json") and (wrong := next(mismatches(read_json(path), TEXT_FILES[name], name), None)):
            raise ValueError(f"{source} has a tokenizer that is none: {wrong}.")
        shutil.copyfile(path, folder / name)
    lacking = [] if "tokenizer_config.json" in present else ["tokenizer_config.json"]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
        lacking.append("tokenizer.json, or vocab.json and merges.txt")
    return lacking, left_out


def copy_licences(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """
    Copies the licences of the weights into `folder`, as `WEIGHTS_LICENSE` and the like.

    Returns:
        `tuple[list[str], list[str]]`: Their names in `folder`, and why others were left out, a line each.

    Raises:
        ValueError: a licence lies outside `source`.
    """
    prefix = "WEIGHTS_" if is_converted(source) else ""
    copied, left_out = [], []
    for entry in sorted(source.iterdir()):
        name = entry.name.removeprefix(prefix)
        if not entry.name.startswith(prefix) or not LICENCE.fullmatch(name) or entry.is_dir():
            continue
        path = safe_path(source, entry.name)
        with path.open("rb") as file:
            content = file.read(MAX_LICENCE_BYTES + 1)
        if len(content) > MAX_LICENCE_BYTES:
            left_out.append(f"{entry.name} is longer than {MAX_LICENCE_BYTES} bytes")
        elif any(byte < ord(" ") and byte not in LAYOUT_BYTES for byte in content):
            left_out.append(f"{entry.name} is no text")
        else:
            copied.append(f"WEIGHTS_{name}")
            (folder / copied[-1]).write_bytes(content)
    return copied, left_out
