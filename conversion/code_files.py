# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The code that a model repo carries, and that loading it with `trust_remote_code` runs."""

import ast
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .messages import without_credentials


REPO = Path(__file__).resolve().parent.parent
CODE_FILES = sorted(REPO.glob("*_aimv2_packing.py"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_code(folder: Path, files: Iterable[Path] = CODE_FILES) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)


@cache
def with_imports(*modules: str) -> tuple[Path, ...]:
    """The files of these modules of this tree and of all that they import from each other, by name."""
    found: dict[str, Path] = {}
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = REPO / f"{module}.py"
            nodes = ast.walk(ast.parse(found[module].read_bytes()))
            pending += [x.module for x in nodes if isinstance(x, ast.ImportFrom) and x.level == 1 and x.module]
    return tuple(found[module] for module in sorted(found))


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
    url = git("remote", "get-url", "origin" if "origin" in remotes else remotes[0]) if remotes else ""
    # A scheme or a host; else, as after a drive's letter, it is a folder of this machine.
    if url.startswith("file:") or not re.match(r"[^/\\]{2,}:", url):
        return f"{commit} of a clone that names no remote repo"
    # A card is public: what a URL may hold of passwords stays out of it.
    return f"{commit} of {without_credentials(url)}"
