# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of the input to images that are not done."""

import os
from collections.abc import Container, Iterable, Iterator

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from corpus.archives import read_archive
from corpus.inputs import InputError, Part, file_system
from corpus.rows import Image, stable_text
from corpus.settings import Job


# Read at once: on an object store in parallel.
FILES_AT_ONCE = 16
ROWS_AT_ONCE = 64


def read(parts: Iterable[Part], kind: str, job: Job, done: Container[str]) -> Iterator[Image]:
    """
    The images of some parts, less those that are done.

    Raises:
        InputError: an input is no longer there.
    """
    if kind == "image":
        yield from read_files([part for part in parts if part.name not in done], job)
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
                yield Image(part.name, stable_text(error), None)


def read_files(parts: list[Part], job: Job) -> Iterator[Image]:
    for first in range(0, len(parts), FILES_AT_ONCE):
        some = parts[first : first + FILES_AT_ONCE]
        for source in dict.fromkeys(part.source for part in some):
            fs, _ = file_system(job.inputs[source])
            of_source = [part for part in some if part.source == source]
            # Unlike `cat`, takes no name for a pattern.
            read = fs.cat_ranges([part.path for part in of_source], None, None, on_error="return")
            for part, data in zip(of_source, read, strict=True):
                if isinstance(data, Exception):
                    check_input(job, part)
                    yield Image(part.name, stable_text(data), None)
                else:
                    yield Image(part.name, None, data)


def read_row_group(part: Part, job: Job, done: Container[str]) -> Iterator[Image]:
    fs, _ = file_system(job.inputs[part.source])
    settings = job.settings
    with fs.open(part.path, "rb") as opened, pq.ParquetFile(opened) as file:
        if settings.id_column:
            column = file.read_row_group(part.row_group, columns=[settings.id_column])[settings.id_column]
            ids = [str(value) for value in column.to_pylist()]
        else:
            rows = file.metadata.row_group(part.row_group).num_rows
            ids = [f"{part.name}#{part.first_row + row}" for row in range(rows)]
        missing = [id_ not in done for id_ in ids]
        if not any(missing):
            return
        row = 0
        columns = [settings.image_column]
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[part.row_group], columns=columns):
            for value in batch.column(0):
                if missing[row]:
                    yield image_of(ids[row], value)
                row += 1


def image_of(id_: str, value: pa.Scalar) -> Image:
    """The bytes of a binary value, or of the `{"bytes", "path"}` that the datasets library writes."""
    data = value.as_py()
    data = data.get("bytes") if isinstance(data, dict) else data
    if not isinstance(data, bytes):
        return Image(id_, f"ValueError: the image must be bytes, got {type(data).__name__}", None)
    return Image(id_, None, data)


def check_input(job: Job, part: Part) -> None:
    """
    Tells an input that is gone, with all of its images, from a file that cannot be read.

    Raises:
        InputError: it is gone.
    """
    location = job.inputs[part.source]
    fs, _ = file_system(location)
    root = part.path.rsplit("/", part.name.count("/") + 1)[0] or "/"
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
