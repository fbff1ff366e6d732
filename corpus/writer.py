# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of the output, written by a thread while more is encoded."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from corpus.output import Counts
from corpus.sink import Sink


class Writer:
    """
    Writes one file at a time: encoding waits where it is faster. A file becomes part of the output where the methods
    are called, never in the thread.
    """

    def __init__(self, sink: Sink, pool: ThreadPoolExecutor):
        self.sink, self.pool = sink, pool
        self.pending: tuple[Future[str], Iterable[Counts]] | None = None

    def start(self) -> None:
        """
        Begins to write the rows that wait in the sink.

        Raises:
            OSError: the file before cannot be written.
        """
        self.publish()
        taken, rows = self.sink.take()
        if rows:
            tables, counts = zip(*taken, strict=True)
            self.pending = self.pool.submit(self.write, tables), counts

    def write(self, tables: tuple[pa.Table, ...]) -> str:
        return self.sink.output.write_rows(pa.concat_tables(tables))

    def publish(self, wait: bool = True) -> None:
        """
        Makes the file that is written part of the output.

        Raises:
            OSError: it cannot be written.
        """
        if self.pending and (wait or self.pending[0].done()):
            (written, counts), self.pending = self.pending, None
            self.sink.publish(written.result(), counts)

    def finish(self) -> None:
        """Writes and publishes all."""
        try:
            self.publish()
        finally:
            self.start()
            self.publish()
