# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands print: names that others chose, addresses, and what to do where the system gives an error."""

import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO


NEXT_STEPS = {
    **dict.fromkeys((errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR), "choose another folder"),
    errno.EACCES: "ask for the right to it, or choose another place",
    errno.EPERM: "ask for the right to it, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
}


# The packages by which fsspec speaks to object stores. Their errors are none of the system's.
STORES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests"}


def say(*lines: str, file: TextIO | None = None) -> None:
    """
    Prints lines, to standard output by default; what its encoding lacks is escaped. Where nobody reads it any more, as
    after `| head`, or its disk is full, nothing is raised: what is done is done.
    """
    file = sys.stdout if file is None else file
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(errors="backslashreplace")
    try:
        print(*lines, sep="\n", file=file, flush=True)
    except OSError:
        # Or Python tries again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def printable(name: object) -> str:
    """
    A name that somebody else chose (of a file, a tensor, a class), safe to print and to write in lists: `repr` of it
    where it holds control characters, line ends or what else is not printable, and as it is where it does not.

    ```python
    >>> printable("cat.jpg"), printable("cat\\n.jpg")
    ('cat.jpg', "'cat\\\\n.jpg'")
    ```
    """
    text = os.fsdecode(name) if isinstance(name, (bytes, os.PathLike)) else str(name)
    return text if text.isprintable() else repr(text)


def listed(names: Sequence[object], most: int = 5) -> str:
    """The first of these names, each [`printable`], and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def printable_lines(text: str) -> str:
    """A message of one or more lines, in which what is not printable is escaped."""
    return "\n".join(
        line if line.isprintable() else "".join(x if x.isprintable() else repr(x)[1:-1] for x in line)
        for line in text.split("\n")
    )


def without_credentials(text: str) -> str:
    """The text, in whose URLs what may hold a password or a token is left out: user, query and fragment."""
    text = re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


def next_step(error: BaseException) -> str | None:
    """What to do about an error of the system, or `None` where it is none that a user can put right."""
    return NEXT_STEPS.get(error.errno) if isinstance(error, OSError) and error.errno is not None else None


def is_of_store(error: BaseException) -> bool:
    """Whether an object store, or the way to it, gave the error: it lacks credentials, or does not answer."""
    return type(error).__module__.partition(".")[0] in STORES
