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
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from conversion.atomic_folder import sync
from conversion.messages import printable
from corpus.inputs import file_system, shown


# The dot hides them from what reads the Parquet files.
UNFINISHED = ".unfinished"
SETTINGS = ".settings.json"
SKIPPED = ".skipped.txt"
INPUTS = ".inputs"
LOCK = ".lock"

# What they were called in outputs that were begun before they had dots.
OLD_NAMES = {"_unfinished": UNFINISHED, "_settings.json": SETTINGS, "_skipped.txt": SKIPPED, "_lock": LOCK}

# What rows depend on and files tell in the metadata of their schema.
MADE_WITH = ("weights", "pooling", "dtype")

# Of each kind of error, in the summary.
FIRST_IDS = 3


class Counts(NamedTuple):
    """What is in some rows; `errors` has the number and the first ids of each text, `last_id` is of the last row."""

    images: int
    patches: int
    errors: dict[str, tuple[int, list[str]]]
    last_id: str

    def failed(self) -> int:
        return sum(count for count, _ in self.errors.values())


class Output:
    """No name is ever taken for a pattern: the functions of fsspec that look for * and [ in names are not used."""

    def __init__(self, location: str):
        self.shown = shown((location,))
        self.fs, path = file_system(location)
        self.path = path.rstrip("/")
        self.failed: set[str] = set()

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """
        Holds the output for this run, and leaves nothing unfinished behind.

        Raises:
            OSError: the output cannot be written to.
            ValueError: another run is writing to it, or its folder of unfinished files is a link to another.
        """
        for name in (UNFINISHED, "_unfinished"):
            if self.is_local and os.path.islink(f"{self.path}/{name}"):
                raise ValueError(f"{name} of `--output` {self.shown} is a symbolic link: remove it.")
        self.fs.makedirs(f"{self.path}/{UNFINISHED}", exist_ok=True)
        locks = [FileLock(f"{self.path}/{LOCK}", blocking=False)] if self.is_local else []
        is_old = self.fs.exists(f"{self.path}/_settings.json")
        if is_old and self.is_local:
            locks.append(FileLock(f"{self.path}/_lock", blocking=False))
        with ExitStack() as held:
            try:
                for lock in locks:
                    held.enter_context(lock)
            except Timeout as error:
                raise ValueError(f"`--output` {self.shown} is being written by another run.") from error
            try:
                if is_old:
                    self.rename_old_files()
                yield
            finally:
                # What cannot be removed now counts for nothing, and the next run removes it.
                with suppress(OSError):
                    self.remove_unfinished(UNFINISHED)

    def rename_old_files(self) -> None:
        if not self.fs.exists(f"{self.path}/{SETTINGS}"):
            self.write_bytes(SETTINGS, self.content_of("_settings.json"))
        self.remove_unfinished("_unfinished")
        for name in OLD_NAMES:
            if name != "_unfinished" and self.fs.exists(f"{self.path}/{name}"):
                self.fs.rm_file(f"{self.path}/{name}")

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
        path = f"{self.path}/{file}"
        try:
            if self.is_local and not os.path.isfile(path):
                raise OSError("no regular file")
            with self.fs.open(path, "rb") as opened, pq.ParquetFile(opened) as parquet:
                yield parquet
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{file} of `--output` {self.shown} cannot be read ({error}): delete it to redo its rows."
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

    def texts(self, file: str, *names: str) -> pa.Table:
        """
        Columns of texts, of which the first has no null.

        Raises:
            ValueError: the file cannot be read, or has no such columns.
        """
        table = self.read(file, list(names))
        are_texts = sorted(table.column_names) == sorted(names) and {*table.schema.types} == {pa.string()}
        if not are_texts or table[names[0]].null_count:
            raise self.foreign(file)
        return table

    def foreign(self, file: str) -> ValueError:
        return ValueError(f"{file} of `--output` {self.shown} is not what this command writes there: remove it.")

    def rows(self) -> Iterator[tuple[str, str, str | None]]:
        """
        The file, the id and the error of every row.

        Raises:
            ValueError: a file cannot be read, or was not made as the others.
        """
        record = self.record() or {}
        for file in self.files():
            table = self.texts(file, "id", "error")
            for name in MADE_WITH:
                value = (table.schema.metadata or {}).get(f"aimv2_packing.{name}".encode(), b"").decode()
                if value and value != record.get(name, value):
                    raise ValueError(
                        f"{file} of `--output` {self.shown} was made with something else ({name} {value[:12]} rather "
                        f"than {record[name][:12]}): remove it."
                    )
            for id_, error in zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True):
                yield file, id_, error

    def content_of(self, name: str) -> bytes:
        """
        Raises:
            ValueError: it is a pipe or a folder.
        """
        file = f"{self.path}/{name}"
        if self.is_local and not os.path.isfile(file):
            raise ValueError(f"{name} of `--output` {self.shown} is no regular file: remove it.")
        return self.fs.cat_file(file)

    def record(self) -> dict[str, Any] | None:
        """
        What the output was begun with.

        Raises:
            ValueError: the record is none of this command's.
        """
        if not self.fs.exists(f"{self.path}/{SETTINGS}"):
            return None
        try:
            record = json.loads(self.content_of(SETTINGS))
            if {"model", "commit", "input", "code"} <= record["begun"].keys() and "weights" in record:
                return record
        # What is nested too deep ends in RecursionError.
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError, KeyError, AttributeError):
            pass
        raise ValueError(
            f"{SETTINGS} of `--output` {self.shown} is not what this command writes: put it back, or give another "
            "output."
        )

    def write_record(self, record: dict[str, Any]) -> None:
        self.write_bytes(SETTINGS, json.dumps(record, indent=2).encode())

    def stamps(self) -> dict[str, str] | None:
        """Size and time of each file of the input as it was when its rows were made, where they were recorded."""
        if not self.fs.exists(f"{self.path}/{INPUTS}"):
            return None
        table = self.texts(INPUTS, "file", "stamp")
        return dict(zip(table["file"].to_pylist(), table["stamp"].to_pylist(), strict=True))

    def write_stamps(self, stamps: dict[str, str]) -> None:
        self.move(self.write(pa.table({"file": list(stamps), "stamp": list(stamps.values())}), INPUTS))

    def write_skipped(self, skipped: list[tuple[str, str]]) -> None:
        if skipped:
            self.write_bytes(SKIPPED, "".join(f"{printable(name)}\t{reason}\n" for name, reason in skipped).encode())
        elif self.fs.exists(f"{self.path}/{SKIPPED}"):
            self.fs.rm_file(f"{self.path}/{SKIPPED}")

    def write_bytes(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.path}/{UNFINISHED}/{name}", data)
        self.move(name)

    def write(self, table: pa.Table, name: str | None = None) -> str:
        """Writes a file that is not yet part of the output."""
        name = name or f"{uuid.uuid4().hex}.parquet"
        with self.fs.open(f"{self.path}/{UNFINISHED}/{name}", "wb") as file:
            # No value comes twice: a dictionary of them takes an eighth more.
            pq.write_table(table, file, use_dictionary=False)
        return name

    def move(self, name: str) -> None:
        """Makes an unfinished file part of the output, or puts it in the place of the one of the same name."""
        source, target = f"{self.path}/{UNFINISHED}/{name}", f"{self.path}/{name}"
        if self.is_local:
            # Or after a power cut the name may be there, and the content not.
            sync(Path(source))
            os.replace(source, target)
            sync(Path(self.path))
        else:
            self.fs.cp_file(source, target)
            self.fs.rm_file(source)

    def write_rows(self, table: pa.Table) -> str:
        """As `write`. An output that was begun with lists of a fixed size keeps them: readers want one schema."""
        if self.schema is not None:
            # One of before error_detail has no such column.
            table = table.select(self.schema.names).cast(self.schema)
        return self.write(table)

    def publish(self, name: str, retried: dict[str, str]) -> None:
        """
        Makes an unfinished file part of the output. Rows that were done again, `{id: file}`, take the place of the old
        ones in their own files, one rename each, and leave `retried`; `failed` gets the ids of those with an error.
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
            self.replace(file, ids, replacing)
            for id_ in ids:
                del retried[id_]
        self.failed |= set(table.filter(table["error"].is_valid())["id"].to_pylist())

    def replace(self, file: str, ids: set[str], rows: pa.Table | None = None) -> None:
        """Puts rows in the place of those with some ids, or nothing."""
        old = self.read(file)
        table = old.filter(pa.array([id_ not in ids for id_ in old["id"].to_pylist()]))
        if rows is not None:
            table = pa.concat_tables([table, rows.cast(old.schema)])
        if len(table):
            self.move(self.write(table, file))
        else:
            self.fs.rm_file(f"{self.path}/{file}")

    def remove(self, ids: dict[str, str]) -> None:
        """Removes rows, `{id: file}`."""
        for file in sorted(set(ids.values())):
            self.replace(file, {id_ for id_, of in ids.items() if of == file})

    def remove_unfinished(self, name: str) -> None:
        """Removes the files in a folder of unfinished ones: of what a link leads to, nothing."""
        folder = f"{self.path}/{name}"
        self.fs.invalidate_cache()
        if not self.fs.exists(folder):
            return
        if not self.is_local:
            for file in self.fs.find(folder):
                self.fs.rm_file(file)
        elif not os.path.islink(folder):
            for entry in os.scandir(folder):
                if not entry.is_dir(follow_symlinks=False):
                    self.fs.rm_file(entry.path)
            self.fs.rmdir(folder)


def counts_of(table: pa.Table) -> Counts:
    grids = np.array(table["grid_thw"].drop_null().to_pylist(), dtype=np.int64).reshape(-1, 3)
    failed = table.filter(table["error"].is_valid())
    errors: dict[str, tuple[int, list[str]]] = {}
    for id_, error in zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True):
        add_errors(errors, {error: (1, [id_])})
    return Counts(len(table), int(grids.prod(1).sum()), errors, table["id"][-1].as_py() if len(table) else "")


def add_errors(errors: dict[str, tuple[int, list[str]]], more: dict[str, tuple[int, list[str]]]) -> None:
    for text, (count, ids) in more.items():
        before, first = errors.get(text, (0, []))
        errors[text] = (before + count, (first + ids)[:FIRST_IDS])
