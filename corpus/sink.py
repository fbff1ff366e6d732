# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Where encoded rows go: gathered until they make a file, counted, published."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corpus.output import Counts, Output
from corpus.progress import Progress, Summary


# Of the rows in memory that wait to become a file.
BYTES_PER_FILE = 256 * 2**20


@dataclass
class Sink:
    """
    `retried` is the file of each error row that is tried again, `limit` the most images of this run. A file is due when
    it has `rows_per_file` rows or `BYTES_PER_FILE`, or its first row waits for `flush_seconds`.
    """

    output: Output
    retried: dict[str, str]
    rows_per_file: int
    flush_seconds: float
    progress: Progress
    summary: Summary
    limit: int | None

    def __post_init__(self) -> None:
        self.accepted = 0
        self.clear()

    def clear(self) -> None:
        self.waiting: list[Any] = []
        self.rows = self.bytes = 0
        self.since = time.monotonic()

    def is_full(self) -> bool:
        return self.limit is not None and self.accepted >= self.limit

    def room_for(self, rows: int) -> int:
        return rows if self.limit is None else min(rows, self.limit - self.accepted)

    def add(self, item: Any, rows: int, size: int) -> None:
        """An item that stands for encoded rows: a table and its counts, or references to them."""
        if not self.waiting:
            self.since = time.monotonic()
        self.waiting.append(item)
        self.accepted += rows
        self.rows += rows
        self.bytes += size

    def is_due(self) -> bool:
        if not self.waiting:
            return False
        late = time.monotonic() - self.since >= self.flush_seconds
        return late or self.rows >= self.rows_per_file or self.bytes >= BYTES_PER_FILE

    def take(self) -> tuple[list[Any], int]:
        """The items that wait, and their rows. From here on they are written once or not at all."""
        taken = self.waiting, self.rows
        self.clear()
        return taken

    def publish(self, file: str, counts: Iterable[Counts]) -> None:
        """Makes an unfinished file part of the output."""
        self.output.publish(file, self.retried)
        for count in counts:
            self.summary.add(count)
