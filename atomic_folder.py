# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a folder that appears whole or not at all."""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """
    Gives an empty folder beside `target` to fill, and renames it to `target` when the block ends without an
    exception. Until then, and if the process is killed at any moment, `target` is what it was; what a killed process
    left behind is removed by the next one with the same target.

    Args:
        target (`Path`): The folder to make.
        overwrite (`bool`): Whether an existing `target` may be replaced.

    Raises:
        FileExistsError: `target` exists and `overwrite` is false.
        BlockingIOError: another process is making `target`.
    """
    target = target.resolve()
    work, previous = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.previous")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent, wait=True):
        if work.exists():
            with locked(work, wait=False):
                remove(work)
        restore(previous, target)
        remove(previous)
        check_target(target, overwrite)
        work.mkdir()
        lock = open_locked(work, wait=False)
    try:
        yield work
        for path in work.rglob("*"):
            sync(path)
        sync(work)
        with locked(target.parent, wait=True):
            check_target(target, overwrite)
            if target.exists():
                replace(work, target, previous)
            else:
                work.rename(target)
        sync(target.parent)
    finally:
        os.close(lock)
        restore(previous, target)
        remove(previous)
        remove(work)


def restore(previous: Path, target: Path) -> None:
    """Puts back what `replace` had moved away when it was interrupted between its two renames."""
    if previous.exists() and not target.exists():
        previous.rename(target)


def check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another folder, or replace it with --overwrite.")


def replace(work: Path, target: Path, previous: Path) -> None:
    """Puts `work` in the place of the existing `target`; the old content is then at `work` or at `previous`."""
    if not exchange(work, target):
        # A process killed between the two leaves `previous` for the next one to restore.
        target.rename(previous)
        work.rename(target)


def exchange(first: Path, second: Path) -> bool:
    """Whether two folders have changed places in one step, which only Linux and some file systems can do."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second)
    return renameat2 is not None and renameat2(*paths, RENAME_EXCHANGE) == 0


def open_locked(folder: Path, wait: bool) -> int:
    """A descriptor of `folder` that holds its lock until it is closed; the system closes it when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"{folder} is in use by another process.") from None
    return descriptor


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    descriptor = open_locked(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
