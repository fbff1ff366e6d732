# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a corpus: which are images, archives or Parquet files, and which are left out and why."""

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
from fsspec.implementations.local import LocalFileSystem

from conversion.messages import printable, without_credentials
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
    # -1 where the file system does not tell.
    size: int = -1


def table_of_parts(parts: list[Part]) -> pa.Table:
    """Parts on their way to processes: Arrow's memory stays shared, of Python's objects each that is seen is copied."""
    columns: list = [*zip(*parts, strict=True)] if parts else [()] * len(Part._fields)
    # Linux does not promise UTF-8.
    columns[Part._fields.index("path")] = map(os.fsencode, columns[Part._fields.index("path")])
    kinds = {"path": pa.large_binary(), "name": pa.large_string()}
    return pa.table(
        {
            name: pa.array(column, kinds.get(name, pa.int64()))
            for name, column in zip(Part._fields, columns, strict=True)
        }
    )


def parts_of(table: pa.Table) -> list[Part]:
    return [Part(**{**row, "path": os.fsdecode(row["path"])}) for row in table.to_pylist()]


class InputError(OSError):
    """The input as a whole cannot be read, which is no error of one image."""


@dataclass
class Corpus:
    """
    `kind` is `"image"`, `"archive"` or `"parquet"`; `parts` are sorted by name; `skipped` has (name, reason).
    `stamps` tell whether a file has changed: its size with its ETag or time, by its name. `rows` is the number of rows
    of each Parquet file, `ids` those of a column, and `digests` those of each file.
    """

    kind: str
    parts: list[Part]
    skipped: list[tuple[str, str]]
    stamps: dict[str, str]
    total: int | None = None
    rows: dict[str, int] = field(default_factory=dict)
    ids: IdSet | None = None
    digests: dict[str, bytes] = field(default_factory=dict)

    def file_of(self, id_: str) -> str | None:
        """The file of the input that an id of its images comes from, but for ids of a column."""
        if id_ in self.stamps:
            return id_
        if self.kind == "parquet":
            name = id_.rpartition("#")[0]
            return name if name in self.stamps else None
        parents = (str(parent) for parent in PurePosixPath(id_).parents)
        return next((parent for parent in parents if parent in self.stamps), None)

    def position(self) -> Callable[[str], str] | None:
        """Says of an id which of the archives or Parquet files it comes from, such as "archive 3 of 6"."""
        if self.kind == "image" or self.ids is not None:
            return None
        numbers = {name: number for number, name in enumerate(sorted(self.stamps), start=1)}
        kind = "archive" if self.kind == "archive" else "file"
        return lambda id_: f"{kind} {numbers.get(self.file_of(id_) or '', 0)} of {len(numbers)}"

    def holds(self, id_: str) -> bool:
        """Whether this input has an image of that id; of an archive's member, whether it has the archive."""
        if self.ids is not None:
            return id_ in self.ids
        name = self.file_of(id_)
        if name is None or self.kind != "parquet":
            return name is not None
        row = id_.rpartition("#")[2]
        return id_ == name or (row.isdecimal() and int(row) < self.rows[name])


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


def corpus_of(inputs: tuple[str, ...], output: str, image_formats: tuple[str, ...]) -> Corpus:
    """
    Lists all inputs, Parquet files without their rows. What lies in `output` is no input.

    Raises:
        FileNotFoundError: an input does not exist, or there is no image, archive or Parquet file in any.
        ValueError: there is more than one kind, or a name comes twice.
    """
    kinds: dict[str, list[Part]] = {}
    skipped: list[tuple[str, str]] = []
    stamps: dict[str, str] = {}
    real_folder = cache(os.path.realpath)
    in_output = False
    for source, location in enumerate(inputs):
        fs, path = file_system(location)
        output_fs, output_path = file_system(output)
        is_local = isinstance(fs, LocalFileSystem)
        output_path = real_folder(output_path) if is_local else output_path.rstrip("/")
        root, found = files_of(fs, path, skipped)
        for file, listed in found:
            folder = real_folder(os.path.dirname(file)) if is_local else os.path.dirname(file)
            if output_fs == fs and f"{folder}/".startswith(f"{output_path}/"):
                in_output = True
                continue
            name = utf8_name(os.path.relpath(bare(fs, file), root))
            kind, reason, info = kind_of(fs, file, listed, image_formats)
            # In a folder it may be what somebody noted about the images there.
            if kind is None and info and is_manifest(bare(fs, path)) and is_manifest(bare(fs, file)):
                kind = "parquet"
            if kind == "parquet" and file != path and is_hidden(name):
                kind, reason = None, "hidden, as Spark and Hadoop hide what is unfinished"
            if kind:
                stamps[name] = stamp_of(info)
                kinds.setdefault(kind, []).append(Part(source, file, name, size=int(info.get("size") or -1)))
            else:
                skipped.append((name, reason))
    if not kinds:
        counted = (
            f"; {len(skipped)} other files were found, such as {printable(skipped[0][0])}: {skipped[0][1]}"
            if skipped
            else f"; what lies in `--output` {shown((output,))} is no input"
            if in_output
            else ""
        )
        raise FileNotFoundError(f"`--input` must hold images, .parquet or .tar files, got {shown(inputs)}{counted}.")
    if len(kinds) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in sorted(kinds.items()))
        raise ValueError(f"`--input` must hold one kind of file, got {counts} files in {shown(inputs)}: give a glob.")
    kind, parts = kinds.popitem()
    parts.sort(key=lambda part: part.name)
    for part, following in pairwise(parts):
        # The members of an archive have its name before theirs, as if it were a folder.
        if following.name == part.name or (kind == "archive" and following.name.startswith(f"{part.name}/")):
            raise ValueError(
                f"Ids are paths below `--input`, and {part.name!r} comes twice, from {shown((inputs[part.source],))} "
                f"and {shown((inputs[following.source],))}: give a folder above both, or of manifests a pattern."
            )
    skipped.sort()
    total = len(parts) if kind == "image" else None
    return Corpus(kind, parts, skipped, stamps, total)


def shown(inputs: tuple[str, ...]) -> str:
    return ", ".join(printable(without_credentials(location)) for location in inputs)


def is_manifest(path: str) -> bool:
    """Whether it is a table of paths in text: it counts as a Parquet file."""
    return path.lower().endswith((".csv", ".jsonl"))


def is_hidden(name: str) -> bool:
    return any(part[0] in "._" and "=" not in part for part in name.split("/"))


def bare(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The path of a URL, without a query, which is how presigned ones end."""
    return re.split(r"[?#]", path)[0] if isinstance(fs.protocol, tuple) and "http" in fs.protocol else path


def stamp_of(info: dict[str, Any]) -> str:
    """A text that differs when the file does: its size, and its ETag or else the time of its last change."""
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "mtime_ns")
    found = [str(info[name]) for name in names if info.get(name) is not None]
    return f"{info.get('size')} {found[0] if found else ''}"


def files_of(
    fs: fsspec.AbstractFileSystem, path: str, skipped: list[tuple[str, str]]
) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    """
    The folder that ids are relative to, and the files of one input with what the file system says of them.

    Raises:
        FileNotFoundError: the input does not exist.
    """
    # A server would send a file to tell that it lists none.
    if (kind_by_name(bare(fs, path), ()) and bare(fs, path) != path) or not fs.isdir(path):
        if fs.exists(path):
            return os.path.dirname(bare(fs, path)), iter([(path, fs.info(path))])
    elif isinstance(fs, LocalFileSystem):
        return path, ((file, {}) for file in walk(path, skipped))
    else:
        return path, iter(fs.find(path, detail=True).items())
    if not re.search(r"[*?\[]", bare(fs, path)):
        raise FileNotFoundError(f"`--input` {shown((path,))} does not exist.")
    root = os.path.dirname(re.split(r"[*?\[]", path)[0])
    matches = fs.glob(path, detail=True)
    if not matches:
        wanted = "`--input` must hold images, .parquet or .tar files"
        raise FileNotFoundError(f"{wanted}, and the pattern {shown((path,))} matches nothing.")
    if "**" not in path:
        reason = "a folder: give it as an input, or ** in the pattern"
        skipped += [
            (utf8_name(os.path.relpath(name, root)), reason)
            for name, info in matches.items()
            if info["type"] == "directory"
        ]
    return root, ((name, info) for name, info in matches.items() if info["type"] != "directory")


def walk(root: str, skipped: list[tuple[str, str]]) -> Iterator[str]:
    """All files below a local folder, each folder once: by its own name, or else by that of a link to it."""
    seen: set[tuple[int, int]] = set()
    folders, links = deque([root]), deque[str]()
    while folders or links:
        is_link = not folders
        folder = links.popleft() if is_link else folders.popleft()
        name = utf8_name(os.path.relpath(folder, root))
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                target, above = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
                is_above = is_link and f"{above}/".startswith(f"{target}/")
                skipped.append(
                    (
                        name,
                        "a symbolic link to a folder above it" if is_above else "a folder that is read by another name",
                    )
                )
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append((name, f"a folder that cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if not os.path.isdir(entry.path):
                yield entry.path
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                folders.append(entry.path)


def kind_by_name(path: str, formats: tuple[str, ...]) -> str | None:
    name = PurePosixPath(path.lower()).name
    suffixes = PurePosixPath(name).suffixes
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    if suffixes[-1:] in ([".tar"], [".tgz"]) or suffixes[-2:-1] == [".tar"]:
        return "archive"
    return "image" if has_image_name(name, formats) else None


def kind_of(
    fs: fsspec.AbstractFileSystem, file: str, info: dict[str, Any], formats: tuple[str, ...]
) -> tuple[str | None, str, dict[str, Any]]:
    """
    The kind of a file by its name, or else by its first bytes; of one that is left out, why; what the file system says
    of it.
    """
    kind = kind_by_name(bare(fs, file), formats)
    if isinstance(fs, LocalFileSystem):
        # Opening a pipe would wait for its other end.
        try:
            status = os.stat(file)
        except OSError as error:
            return ("image" if kind == "image" else None), f"cannot be read: {error.strerror}", {}
        if not stat.S_ISREG(status.st_mode):
            return None, "no regular file", {}
        info = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if kind:
        return kind, "", info
    try:
        start = fs.cat_file(file, start=0, end=SIGNATURE_BYTES)
    except OSError as error:
        return None, f"cannot be read: {error.strerror or without_credentials(str(error))}", info
    if not start:
        return None, "empty", info
    if has_image_signature(start, formats):
        return "image", "", info
    return None, f"none of {', '.join(formats)}", info
