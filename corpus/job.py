# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a worker has to know, and what is read."""

from dataclasses import dataclass
from typing import NamedTuple

from corpus.settings import Settings


@dataclass(frozen=True)
class Job:
    """`model` is a folder or an id of the Hub, whose commit is `revision`."""

    model: str
    revision: str | None
    inputs: tuple[str, ...]
    max_patches: int | None
    image_size: int | None
    patches_per_batch: int
    image_formats: tuple[str, ...]
    settings: Settings


class Part(NamedTuple):
    """A file of the input, or one row group of a Parquet file. `name` is the path below `inputs[source]`."""

    source: int
    path: str
    name: str
    row_group: int = 0
    first_row: int = 0


class Image(NamedTuple):
    """The bytes of a file, or why there are none."""

    id: str
    error: str | None
    data: bytes | None
