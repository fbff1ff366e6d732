# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What Ray's tasks do. Nothing here imports torch, which would take longer than the tasks."""

from collections.abc import Container, Iterator

import pyarrow as pa

from corpus.inputs import parts_of
from corpus.output import Counts, Output, counts_of
from corpus.readers import read
from corpus.rows import IMAGE_SCHEMA, table_of, with_kept
from corpus.settings import Job


# Of images on their way from one stage to the next; Ray joins small blocks and waits when too many lie about.
BYTES_PER_BLOCK = 32 * 2**20
FILES_PER_BLOCK = 64


def read_stage(table: pa.Table, kind: str, job: Job, done: Container[str]) -> Iterator[pa.Table]:
    """Parts of the input to `IMAGE_SCHEMA`, less the rows that are done."""
    schema = with_kept(IMAGE_SCHEMA, job.keep)
    rows: list[tuple] = []
    size = 0
    for image in read(parts_of(table), kind, job, done):
        rows.append(image[: len(schema)])
        size += len(image.data or b"")
        if size > BYTES_PER_BLOCK or len(rows) == FILES_PER_BLOCK:
            yield table_of(rows, schema)
            rows, size = [], 0
    yield table_of(rows, schema)


def write(location: str, rows: int, *tables: pa.Table) -> str:
    """The task that writes: rows of the output to one file that is not yet part of it."""
    return Output(location).write_rows(pa.concat_tables(tables)[:rows])


def count(rows: int, table: pa.Table) -> Counts:
    return counts_of(table[:rows])
