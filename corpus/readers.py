# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of the input to images that are not done."""

import os
from collections.abc import Container, Iterable, Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem

from corpus.archives import read_archive
from corpus.inputs import InputError, Part, bare, file_system, shown
from corpus.rows import TOO_LARGE, Image, detail_of, stable_text
from corpus.settings import Job
from corpus.tables import read_row_group


# Read at once: on an object store in parallel.
FILES_AT_ONCE = 16
BYTES_AT_ONCE = 2**27


def read(parts: Iterable[Part], kind: str, job: Job, done: Container[str]) -> Iterator[Image]:
    """
    The images of some parts, less those that are done.

    Raises:
        InputError: an input is no longer there.
    """
    if kind == "image":
        yield from read_files((part for part in parts if part.name not in done), job)
        return
    reader = read_archive if kind == "archive" else read_row_group
    for part in parts:
        try:
            yield from reader(part, job, done)
        except InputError:
            raise
        # What decompresses and parses raises more than OSError.
        except Exception as error:
            check_input(job, part)
            if part.name not in done:
                yield Image(part.name, detail_of(error), None)


def read_files(parts: Iterable[Part], job: Job) -> Iterator[Image]:
    for some in together(parts):
        for source in dict.fromkeys(part.source for part in some):
            fs, _ = file_system(job.inputs[source])
            of_source = [part for part in some if part.source == source]
            readable = [part for part in of_source if part.size <= job.max_image_bytes]
            # Unlike `cat`, takes no name for a pattern. What has grown since is read as far as it may be large.
            paths, limit = [part.path for part in readable], job.max_image_bytes + 1
            read = fs.cat_ranges(paths, 0, limit, on_error="return") if paths else []
            found = dict(zip(readable, read, strict=True))
            for part in of_source:
                data = found.get(part)
                if isinstance(data, Exception):
                    check_input(job, part)
                    yield Image(part.name, detail_of(data), None)
                elif data is None or len(data) > job.max_image_bytes:
                    yield Image(part.name, detail_of(ValueError(TOO_LARGE)), None)
                else:
                    yield Image(part.name, None, data)


def together(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Files that are read at once."""
    some: list[Part] = []
    for part in parts:
        if some and (len(some) == FILES_AT_ONCE or sum(each.size for each in some) + part.size > BYTES_AT_ONCE):
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def check_input(job: Job, part: Part) -> None:
    """
    Tells an input that is gone, with all of its images, from a file that cannot be read.

    Raises:
        InputError: it is gone.
    """
    fs, _ = file_system(job.inputs[part.source])
    location = shown((job.inputs[part.source],))
    root = bare(fs, part.path).rsplit("/", part.name.count("/") + 1)[0] or "/"
    try:
        there = has_entries(fs, root)
    except Exception as error:
        raise InputError(f"`--input` {location} can no longer be read ({stable_text(error)}).") from error
    if not there:
        raise InputError(f"`--input` {location} is no longer there.")


def has_entries(fs: fsspec.AbstractFileSystem, root: str) -> bool:
    """Whether a folder exists and, on a local disk, is more than the empty place of what is mounted there."""
    if isinstance(fs, LocalFileSystem):
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    fs.invalidate_cache()
    return fs.exists(root)
