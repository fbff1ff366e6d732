# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The Parquet files of a run. A file appears in the output complete, by one rename, and only the command itself renames,
never a worker: whatever dies, no image has two rows.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from corpus.inputs import file_system


# Folder of files that are being written; its name hides it from readers of the Parquet files.
UNFINISHED = "_unfinished"
SETTINGS = "_settings.json"
SKIPPED = "_skipped.txt"
LOCK = "_lock"

# Of each kind of error, in the summary.
FIRST_IDS = 3


class Counts(NamedTuple):
    """What is in some rows; `errors` has the number and the first ids of each text."""

    images: int
    patches: int
    errors: dict[str, tuple[int, list[str]]]

    def failed(self) -> int:
        return sum(count for count, _ in self.errors.values())


class Output:
    """No name is ever taken for a pattern: the functions of fsspec that look for * and [ in names are not used."""

    def __init__(self, location: str):
        self.location = location
        self.fs, path = file_system(location)
        self.path = path.rstrip("/")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """
        Holds the output for this run, and leaves nothing unfinished behind.

        Raises:
            OSError: the output cannot be written to.
            ValueError: another run is writing to it.
        """
        self.fs.makedirs(f"{self.path}/{UNFINISHED}", exist_ok=True)
        lock = FileLock(f"{self.path}/{LOCK}", blocking=False) if isinstance(self.fs, LocalFileSystem) else None
        try:
            if lock:
                lock.acquire()
        except Timeout as error:
            raise ValueError(f"`--output` {self.location} is being written by another run.") from error
        try:
            yield
        finally:
            # What cannot be removed now counts for nothing, and the next run removes it.
            with suppress(OSError):
                self.remove_unfinished()
            if lock:
                lock.release()

    def files(self) -> list[str]:
        self.fs.invalidate_cache()
        # An object store has no empty folders.
        if not self.fs.exists(self.path):
            return []
        names = (name.rsplit("/", 1)[-1] for name in self.fs.ls(self.path, detail=False))
        return sorted(name for name in names if name.endswith(".parquet") and not name.startswith(("_", ".")))

    @contextmanager
    def parquet(self, file: str) -> Iterator[pq.ParquetFile]:
        """
        Raises:
            ValueError: the file cannot be read.
        """
        try:
            with self.fs.open(f"{self.path}/{file}", "rb") as opened, pq.ParquetFile(opened) as parquet:
                yield parquet
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{file} of `--output` {self.location} cannot be read ({error}): delete it to redo its rows."
            ) from error

    @cached_property
    def schema(self) -> pa.Schema | None:
        """Of the rows that were there before."""
        for file in self.files():
            with self.parquet(file) as parquet:
                return parquet.schema_arrow
        return None

    def read(self, file: str, columns: list[str] | None = None) -> pa.Table:
        """
        Raises:
            ValueError: the file cannot be read.
        """
        with self.parquet(file) as parquet:
            return parquet.read(columns=columns)

    def rows(self) -> Iterator[tuple[str, str, str | None]]:
        """The file, the id and the error of every row."""
        for file in self.files():
            table = self.read(file, ["id", "error"])
            for id_, error in zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True):
                yield file, id_, error

    def record(self) -> dict[str, Any] | None:
        """What the output was begun with."""
        file = f"{self.path}/{SETTINGS}"
        return json.loads(self.fs.cat_file(file)) if self.fs.exists(file) else None

    def write_record(self, record: dict[str, Any]) -> None:
        self.write_text(SETTINGS, json.dumps(record, indent=2))

    def write_skipped(self, skipped: list[tuple[str, str]]) -> None:
        if skipped:
            self.write_text(SKIPPED, "".join(f"{name}\t{reason}\n" for name, reason in skipped))
        elif self.fs.exists(f"{self.path}/{SKIPPED}"):
            self.fs.rm_file(f"{self.path}/{SKIPPED}")

    def write_text(self, name: str, text: str) -> None:
        self.fs.pipe_file(f"{self.path}/{UNFINISHED}/{name}", text.encode())
        self.move(name)

    def write(self, table: pa.Table, name: str | None = None) -> str:
        """Writes a file that is not yet part of the output."""
        name = name or f"{uuid.uuid4().hex}.parquet"
        # An output that was begun with lists of a fixed size keeps them: readers want one schema.
        table = table.cast(self.schema or table.schema)
        with self.fs.open(f"{self.path}/{UNFINISHED}/{name}", "wb") as file:
            # No value comes twice: a dictionary of them takes an eighth more.
            pq.write_table(table, file, use_dictionary=False)
        return name

    def move(self, name: str) -> None:
        """Makes an unfinished file part of the output, or puts it in the place of the one of the same name."""
        source, target = f"{self.path}/{UNFINISHED}/{name}", f"{self.path}/{name}"
        if isinstance(self.fs, LocalFileSystem):
            os.replace(source, target)
        else:
            self.fs.cp_file(source, target)
            self.fs.rm_file(source)

    def publish(self, name: str, retried: dict[str, str]) -> None:
        """
        Makes an unfinished file part of the output. Rows that were tried again, `{id: file}`, take the place of the
        old ones in their own files, one rename each.
        """
        if not retried:
            self.move(name)
            return
        table = self.read(f"{UNFINISHED}/{name}")
        targets = [retried.get(id_) for id_ in table["id"].to_pylist()]
        new = table.filter(pa.array([target is None for target in targets]))
        if len(new):
            self.move(self.write(new))
        for file in sorted({target for target in targets if target}):
            replacing = table.filter(pa.array([target == file for target in targets]))
            ids = set(replacing["id"].to_pylist())
            old = self.read(file)
            kept = old.filter(pa.array([id_ not in ids for id_ in old["id"].to_pylist()]))
            self.move(self.write(pa.concat_tables([kept, replacing.cast(old.schema)]), file))

    def remove_unfinished(self) -> None:
        folder = f"{self.path}/{UNFINISHED}"
        self.fs.invalidate_cache()
        if self.fs.exists(folder):
            for file in self.fs.find(folder):
                self.fs.rm_file(file)
            if isinstance(self.fs, LocalFileSystem):
                self.fs.rmdir(folder)


def counts_of(table: pa.Table) -> Counts:
    grids = np.array(table["grid_thw"].drop_null().to_pylist(), dtype=np.int64).reshape(-1, 3)
    failed = table.filter(table["error"].is_valid())
    errors: dict[str, tuple[int, list[str]]] = {}
    for id_, error in zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True):
        add_errors(errors, {error: (1, [id_])})
    return Counts(len(table), int(grids.prod(1).sum()), errors)


def add_errors(errors: dict[str, tuple[int, list[str]]], more: dict[str, tuple[int, list[str]]]) -> None:
    for text, (count, ids) in more.items():
        before, first = errors.get(text, (0, []))
        errors[text] = (before + count, (first + ids)[:FIRST_IDS])
