# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The code that a model repo carries, and that loading it with `trust_remote_code` runs."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit


REPO = Path(__file__).resolve().parent.parent
CODE_FILES = sorted(REPO.glob("*_aimv2_packing.py"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_code(folder: Path) -> None:
    for path in CODE_FILES:
        shutil.copyfile(path, folder / path.name)


def origin() -> str:
    """Where this tree's code comes from, in words: the clone's repo and commit, as far as git knows them."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPO), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPO:
            return "an unknown commit: the converter did not run from a clone"
        commit = f"commit {git('rev-parse', 'HEAD')}"
        if git("status", "--porcelain", "--", *(path.name for path in CODE_FILES)):
            commit += " with changes that are not committed"
        remotes = git("remote").split()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit: the converter did not run from a clone"
    if not remotes:
        return f"{commit} of a clone that names no remote repo"
    url = urlsplit(git("remote", "get-url", "origin" if "origin" in remotes else remotes[0]))
    # A card is public: what a URL may hold of passwords stays out of it.
    return f"{commit} of {url._replace(netloc=url.netloc.rpartition('@')[2]).geturl()}"


def code_differences(folder: Path) -> list[str]:
    """
    How the code that loading `folder` may run differs from this tree's, a line each; none where it is the same. Nothing
    of `folder` is run.

    Raises:
        ValueError: a JSON file that may name code cannot be read.
    """
    expected = {path.name: path for path in CODE_FILES}
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    lines = [f"{name} is missing" for name in expected if name not in found]
    for name, path in found.items():
        if name not in expected:
            lines.append(f"{name} is not in this tree")
        elif not path.is_file() or sha256(path) != sha256(expected[name]):
            lines.append(f"{name} differs")
    for path in sorted([*folder.rglob("*config.json"), *folder.rglob("modules.json")]):
        for name in named_classes(path):
            module = name.rpartition(".")[0]
            # `--` stands between the id of another repo and a class of it.
            if "--" in name or not (f"{module}.py" in expected or module.startswith("sentence_transformers.")):
                lines.append(f"{path.relative_to(folder)} names {name}, which is not in this tree")
    return lines


def named_classes(path: Path) -> list[str]:
    """The classes that a configuration's `auto_map`, or Sentence Transformers' list of modules, names for loading."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if path.name == "modules.json":
        named = [module.get("type") for module in value if isinstance(module, dict)] if isinstance(value, list) else []
    else:
        auto_map = value.get("auto_map") if isinstance(value, dict) else None
        named = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    # A class may stand for itself, or be one of a pair of tokenizers.
    flat = [name for each in named for name in (each if isinstance(each, list) else [each])]
    return sorted({name for name in flat if isinstance(name, str)})
