# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a corpus: which are images, archives or Parquet files, and which are left out and why."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from corpus.rows import IdSet


# All that PIL looks at to tell one format from another.
SIGNATURE_BYTES = 16


class Part(NamedTuple):
    """A file of the input, or one row group of a Parquet file. `name` is the path below `inputs[source]`."""

    source: int
    path: str
    name: str
    row_group: int = 0
    first_row: int = 0


class InputError(OSError):
    """The input as a whole cannot be read, which is no error of one image."""


@dataclass
class Corpus:
    """
    `kind` is `"image"`, `"archive"` or `"parquet"`; `parts` are sorted by name; `skipped` has (name, reason).
    `ids` are the names of the files, or the ids of all rows of Parquet files where a column holds them.
    """

    kind: str
    parts: list[Part]
    skipped: list[tuple[str, str]]
    ids: Any
    total: int | None = None
    rows: dict[str, int] = field(default_factory=dict)

    def holds(self, id_: str) -> bool:
        """Whether this input has an image of that id; of an archive's member, whether it has the archive."""
        if self.kind == "image" or isinstance(self.ids, IdSet):
            return id_ in self.ids
        if self.kind == "parquet":
            name, _, row = id_.rpartition("#")
            return id_ in self.rows or (row.isdecimal() and int(row) < self.rows.get(name, 0))
        return id_ in self.ids or any(str(parent) in self.ids for parent in PurePosixPath(id_).parents)


def utf8_name(name: str) -> str:
    """A file name as valid UTF-8, which Linux and tar do not promise."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def file_system(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """
    Raises:
        ValueError: fsspec does not know the protocol, or lacks a package for it.
    """
    try:
        return fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{location} cannot be opened: {error}") from error


@cache
def register_openers() -> None:
    """All that PIL opens here. Each process has to: PIL's plugins are found on first use, pillow-heif is no plugin."""
    PIL.Image.init()
    if find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()


@cache
def image_suffixes(formats: tuple[str, ...]) -> frozenset[str]:
    register_openers()
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats)


def has_image_name(name: str, formats: tuple[str, ...]) -> bool:
    return name[name.rfind(".") :].lower() in image_suffixes(formats)


def has_image_signature(start: bytes, formats: Iterable[str]) -> bool:
    """Whether a file that begins with these bytes, `SIGNATURE_BYTES` or more, is of one of the formats."""
    register_openers()
    accepts = (PIL.Image.OPEN[name][1] for name in formats if name in PIL.Image.OPEN)
    # A string is PIL's reason why it cannot read what it knows.
    return any(accept is not None and accept(start) is True for accept in accepts)


def corpus_of(
    inputs: tuple[str, ...], output: str, image_formats: tuple[str, ...], image_column: str, id_column: str | None
) -> Corpus:
    """
    Lists all inputs. What lies in `output` is no input.

    Raises:
        FileNotFoundError: an input does not exist, or there is no image, archive or Parquet file in any.
        ValueError: there is more than one kind, a name or an id comes twice, or a column is missing.
    """
    kinds: dict[str, list[Part]] = {}
    skipped: list[tuple[str, str]] = []
    for source, location in enumerate(inputs):
        fs, path = file_system(location)
        output_fs, output_path = file_system(output)
        below = f"{output_path.rstrip('/')}/" if output_fs == fs else None
        root, found = files_of(fs, path, skipped)
        for file in found:
            if below and file.startswith(below):
                continue
            name = utf8_name(os.path.relpath(file, root))
            kind, reason = kind_of(fs, file, image_formats)
            if kind:
                kinds.setdefault(kind, []).append(Part(source, file, name))
            else:
                skipped.append((name, reason))
    if not kinds:
        counted = (
            f"; {len(skipped)} other files were found, such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        )
        raise FileNotFoundError(f"`--input` must hold images, .parquet or .tar files, got {shown(inputs)}{counted}.")
    if len(kinds) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        raise ValueError(f"`--input` must hold one kind of file, got {counts} files in {shown(inputs)}: give a glob.")
    kind, parts = kinds.popitem()
    parts.sort(key=lambda part: part.name)
    for part, following in pairwise(parts):
        if part.name == following.name:
            raise ValueError(
                f"Ids are paths below `--input`, and {part.name!r} comes twice, from {inputs[part.source]} and "
                f"{inputs[following.source]}: give a folder above both."
            )
    skipped.sort()
    if kind == "parquet":
        return parquet_corpus(parts, skipped, inputs, image_column, id_column)
    total = len(parts) if kind == "image" else None
    return Corpus(kind, parts, skipped, {part.name for part in parts}, total)


def shown(inputs: tuple[str, ...]) -> str:
    return ", ".join(inputs)


def files_of(fs: fsspec.AbstractFileSystem, path: str, skipped: list[tuple[str, str]]) -> tuple[str, Iterator[str]]:
    """
    The folder that ids are relative to, and the files of one input.

    Raises:
        FileNotFoundError: the input does not exist.
    """
    if fs.isdir(path):
        found = walk(path, path, skipped) if isinstance(fs, LocalFileSystem) else iter(fs.find(path))
        return path, found
    if fs.exists(path):
        return os.path.dirname(path), iter([path])
    if not re.search(r"[*?\[]", path):
        raise FileNotFoundError(f"`--input` {path} does not exist.")
    root = os.path.dirname(re.split(r"[*?\[]", path)[0])
    matches = fs.glob(path, detail=True)
    if "**" not in path:
        reason = "a folder: give it as an input, or ** in the pattern"
        skipped += [
            (utf8_name(os.path.relpath(name, root)), reason)
            for name, info in matches.items()
            if info["type"] == "directory"
        ]
    return root, (name for name, info in matches.items() if info["type"] != "directory")


def walk(root: str, folder: str, skipped: list[tuple[str, str]], above: tuple = ()) -> Iterator[str]:
    """All files below a local folder, through symbolic links, but for those that lead to a folder above them."""
    name = utf8_name(os.path.relpath(folder, root))
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append((name, f"a folder that cannot be read: {error.strerror}"))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        skipped.append((name, "a symbolic link to a folder above it"))
        return
    for entry in entries:
        if entry.is_dir():
            yield from walk(root, entry.path, skipped, (*above, identity))
        else:
            yield entry.path


def kind_of(fs: fsspec.AbstractFileSystem, file: str, formats: tuple[str, ...]) -> tuple[str | None, str]:
    """The kind of a file by its name, or else by its first bytes; of one that is left out, why."""
    name = PurePosixPath(file.lower()).name
    suffixes = PurePosixPath(name).suffixes
    if isinstance(fs, LocalFileSystem):
        # Opening a pipe would wait for its other end.
        try:
            mode = os.stat(file).st_mode
        except OSError as error:
            return ("image", "") if has_image_name(name, formats) else (None, f"cannot be read: {error.strerror}")
        if not stat.S_ISREG(mode):
            return None, "no regular file"
    if suffixes[-1:] == [".parquet"]:
        return "parquet", ""
    if suffixes[-1:] in ([".tar"], [".tgz"]) or suffixes[-2:-1] == [".tar"]:
        return "archive", ""
    if has_image_name(name, formats):
        return "image", ""
    try:
        start = fs.cat_file(file, start=0, end=SIGNATURE_BYTES)
    except OSError as error:
        return None, f"cannot be read: {error.strerror or error}"
    if not start:
        return None, "empty"
    if has_image_signature(start, formats):
        return "image", ""
    return None, f"none of {', '.join(formats)}"


def parquet_corpus(
    files: list[Part],
    skipped: list[tuple[str, str]],
    inputs: tuple[str, ...],
    image_column: str,
    id_column: str | None,
) -> Corpus:
    """
    Raises:
        ValueError: a file cannot be read, a column is missing, or an id is missing or comes twice.
    """

    def metadata_of(file: Part) -> tuple[list[int], list[str]]:
        fs, _ = file_system(inputs[file.source])
        try:
            with fs.open(file.path, "rb") as opened, pq.ParquetFile(opened) as parquet:
                groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                names = parquet.schema_arrow.names
                for column in (image_column, id_column):
                    if column and column not in names:
                        raise ValueError(f"{file.name} must have a column {column!r}, got {names}.")
                values = parquet.read(columns=[id_column])[id_column] if id_column else None
        except pa.ArrowException as error:
            raise ValueError(f"{file.name} of `--input` cannot be read as Parquet: {error}") from error
        if values is not None and values.null_count:
            raise ValueError(f"`--id-column` {id_column!r} must have a value in each row, got none in {file.name}.")
        return groups, [] if values is None else [str(value) for value in values.to_pylist()]

    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(metadata_of, files))
    parts = []
    rows = {}
    for file, (groups, _) in zip(files, read, strict=True):
        first = 0
        for index, count in enumerate(groups):
            parts.append(file._replace(row_group=index, first_row=first))
            first += count
        rows[file.name] = first
    ids = None
    if id_column:
        ids = IdSet(value for _, values in read for value in values)
        if ids.has_duplicates():
            raise ValueError(f"`--id-column` {id_column!r} must hold a different value in each row.")
    return Corpus("parquet", parts, skipped, ids, sum(rows.values()), rows)
