# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a folder that appears whole or not at all."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """
    Gives an empty folder beside `target` to fill, and renames it to `target` when the block ends without an
    exception. Until then, and if the process is killed at any moment, `target` is what it was; what a killed process
    left behind is removed by the next one with the same target. An empty folder at `target` counts as none.

    Args:
        target (`Path`): The folder to make.
        overwrite (`bool`): Whether an existing `target` may be replaced.

    Raises:
        FileExistsError: `target` exists and `overwrite` is false.
        ValueError: a link lies where the folder is made; what it leads to stays as it is.
        BlockingIOError: another process is making `target`.
    """
    target = target.resolve()
    work, previous = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.previous")
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_process(target):
        for path in (work, previous):
            if path.is_symlink():
                raise ValueError(f"{path} is a link, and a folder is made there: remove the link.")
        remove(work)
        restore(previous, target)
        remove(previous)
        check_target(target, overwrite)
        work.mkdir()
        try:
            yield work
            for path in work.rglob("*"):
                sync(path)
            sync(work)
            check_target(target, overwrite)
            if is_empty_folder(target):
                target.rmdir()
            if target.exists():
                replace(work, target, previous)
            else:
                work.rename(target)
            sync(target.parent)
        finally:
            restore(previous, target)
            remove(previous)
            remove(work)


@contextmanager
def only_process(target: Path) -> Iterator[None]:
    """
    Holds the lock of `target`, the empty file `.NAME.lock` beside it, which exists while a process makes `target`.
    The system gives the lock up when a process dies. Who holds the lock removes the file; one that a killed process
    left is taken over by the next.

    Raises:
        BlockingIOError: another process holds it.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"{target} is being made by another process.") from None
    try:
        yield
    finally:
        if os.name != "nt":
            # Before the release: a lock on a removed file is no lock, which filelock notices. On Windows it removes it.
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def restore(previous: Path, target: Path) -> None:
    """Puts back what `replace` had moved away when it was interrupted between its two renames."""
    if previous.exists() and not target.exists():
        previous.rename(target)


def check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite and not is_empty_folder(target):
        raise FileExistsError(f"{target} exists. Choose another folder, or replace it with --overwrite.")


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def replace(work: Path, target: Path, previous: Path) -> None:
    """Puts `work` in the place of the existing `target`; the old content is then at `work` or at `previous`."""
    if not exchange(work, target):
        # A process killed between the two leaves `previous` for the next one to restore.
        target.rename(previous)
        work.rename(target)


def exchange(first: Path, second: Path) -> bool:
    """Whether two folders have changed places in one step, which only Linux and some file systems can do."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second)
    return renameat2 is not None and renameat2(*paths, RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk. Windows does the second by itself, and opens no folder."""
    if path.is_dir() and os.name == "nt":
        return
    # Windows asks for a descriptor that may write.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of networks above all, sync no folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
