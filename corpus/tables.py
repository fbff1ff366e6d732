# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Parquet files of the input: their columns, ids and row groups, and their rows to images."""

import os
import stat
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from conversion.messages import printable
from corpus.inputs import Corpus, InputError, Part, bare, file_system, is_manifest
from corpus.rows import TOO_LARGE, IdSet, Image, detail_of, stable_text
from corpus.settings import Job


# Of the values that are decoded together. Fewer than 4 at once take longer, more do not take less.
BYTES_AT_ONCE = 2**28
ROWS_AT_ONCE = 64
IDS_AT_ONCE = 1024
LONGEST_ID = 4096

# Of a manifest, whose lines must be shorter.
BYTES_OF_BLOCK = 2**26

# Images are compressed already.
MOST_COMPRESSED = 100


class Table(NamedTuple):
    """
    A Parquet file: the rows of each of its row groups, the digests of its ids where a column holds them, and the fields
    of what is kept.
    """

    groups: list[int]
    digests: bytes
    keep: pa.Schema


def is_binary(kind: pa.DataType) -> bool:
    is_any = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_one(kind) for is_one in is_any)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_image_type(kind: pa.DataType) -> bool:
    """Bytes, a path or URL, or the `{"bytes", "path"}` of the datasets library."""
    if pa.types.is_struct(kind):
        fields = [field for field in kind if field.name in ("bytes", "path") and not pa.types.is_null(field.type)]
        return bool(fields) and all((is_binary if field.name == "bytes" else is_text)(field.type) for field in fields)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_binary(kind) or is_text(kind)


def check_columns(
    name: str, schema: pa.Schema, image_column: str, id_column: str | None, keep: tuple[str, ...]
) -> None:
    """
    Raises:
        ValueError: a column is missing, comes twice, or holds no images or no ids.
    """
    for column in (image_column, id_column, *keep):
        if column and (number := schema.names.count(column)) != 1:
            article = "one" if number else "a"
            raise ValueError(f"{printable(name)} must have {article} column {column!r}, got {schema.names}.")
    kind = schema.field(image_column).type
    if not is_image_type(kind):
        raise ValueError(
            f"`--image-column` {image_column!r} must hold bytes, paths or {{'bytes', 'path'}}, got {kind} in "
            f"{printable(name)}."
        )
    if id_column and (pa.types.is_nested(kind := schema.field(id_column).type) or pa.types.is_null(kind)):
        raise ValueError(f"`--id-column` {id_column!r} must hold text or numbers, got {kind} in {printable(name)}.")
    # Of JSON's whole numbers the longer ones become such, without their last digits.
    if id_column and is_manifest(name) and pa.types.is_floating(kind):
        raise ValueError(
            f"`--id-column` {id_column!r} must hold text or whole numbers below 2**63, got {kind} in {printable(name)}."
        )


@lru_cache(maxsize=1)
def parquet_of(path: str, fs: fsspec.AbstractFileSystem, key: str, columns: tuple[str, ...]) -> bytes:
    """
    A manifest, CSV with a head or a JSON object a line, as a Parquet file, which a worker reads many times; `key` is
    another where the manifest has changed.
    """
    with fs.open(path, "rb") as opened:
        if path.lower().endswith(".csv"):
            # 0001 is an id, no number.
            options = pa.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
            lines = pa.csv.ParseOptions(newlines_in_values=True)
            blocks = pa.csv.ReadOptions(block_size=BYTES_OF_BLOCK)
            table = pa.csv.read_csv(opened, read_options=blocks, parse_options=lines, convert_options=options)
        else:
            blocks = pa.json.ReadOptions(block_size=BYTES_OF_BLOCK)
            table = pa.json.read_json(opened, read_options=blocks)
            # 2024-01-01 is text, no time.
            schema = pa.schema([field.with_type(without_times(field.type)) for field in table.schema])
            if schema != table.schema:
                opened.seek(0)
                texts = pa.json.ParseOptions(explicit_schema=schema)
                table = pa.json.read_json(opened, read_options=blocks, parse_options=texts)
    buffer = pa.BufferOutputStream()
    are_there = all(table.column_names.count(column) == 1 for column in columns)
    pq.write_table(table.select(columns) if are_there else table, buffer, row_group_size=1024)
    return buffer.getvalue().to_pybytes()


def without_times(kind: pa.DataType) -> pa.DataType:
    """The type of JSON whose texts stay texts, also those that Arrow takes for times."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(without_times(field.type)) for field in kind])
    return kind


@contextmanager
def opened_parquet(
    fs: fsspec.AbstractFileSystem, path: str, image_column: str, id_column: str | None, keep: tuple[str, ...]
) -> Iterator[pq.ParquetFile]:
    with ExitStack() as stack:
        if is_manifest(bare(fs, path)):
            columns = tuple(column for column in dict.fromkeys((image_column, id_column, *keep)) if column)
            opened: Any = pa.BufferReader(parquet_of(path, fs, fs.ukey(path), columns))
        else:
            opened = stack.enter_context(fs.open(path, "rb"))
        parquet = stack.enter_context(pq.ParquetFile(opened))
        if id_column in parquet.schema_arrow.names and is_text(parquet.schema_arrow.field(id_column).type):
            # A value that is written once for many rows stays one in memory.
            parquet = stack.enter_context(pq.ParquetFile(opened, read_dictionary=[id_column]))
        yield parquet


def ids_of(parquet: pq.ParquetFile, name: str, group: int, id_column: str) -> Iterator[str]:
    """
    Raises:
        ValueError: an id is missing, is longer than any name, or no text.
    """
    metadata = parquet.metadata.row_group(group)
    chunk = next(chunk for chunk in chunks_of(metadata, id_column))
    where = f"`--id-column` {id_column!r} of {printable(name)}"
    if chunk.total_uncompressed_size > LONGEST_ID * metadata.num_rows + 2**20:
        raise ValueError(f"{where} must hold at most {LONGEST_ID} bytes in a row, got more in row group {group}.")
    for batch in parquet.iter_batches(IDS_AT_ONCE, row_groups=[group], columns=[id_column]):
        for scalar in batch.column(0):
            try:
                value = scalar.as_py()
                text = value.decode() if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} must hold text, got bytes that are not UTF-8 ({error}).") from error
            if value is None:
                raise ValueError(f"{where} must hold a value in each row, got none in a row.")
            if len(text) > LONGEST_ID:
                raise ValueError(f"{where} must hold at most {LONGEST_ID} letters in a row, got {len(text)}.")
            yield text


def chunks_of(metadata: pq.RowGroupMetaData, column: str) -> Iterator[pq.ColumnChunkMetaData]:
    """Those of a column and of its fields."""
    for index in range(metadata.num_columns):
        chunk = metadata.column(index)
        if chunk.path_in_schema.split(".")[0] == column or chunk.path_in_schema == column:
            yield chunk


def kept_fields(schema: pa.Schema, keep: tuple[str, ...]) -> pa.Schema:
    kinds = [schema.field(name).type for name in keep]
    # Values of a dictionary are written as any.
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return pa.schema(list(zip(keep, kinds, strict=True)))


def common_schema(keep: tuple[str, ...], tables: dict[str, pa.Schema]) -> pa.Schema:
    """
    The types that hold the kept columns of all files.

    Raises:
        ValueError: there is none.
    """
    schema = pa.schema([(name, pa.null()) for name in keep])
    for file, of_file in tables.items():
        try:
            schema = pa.unify_schemas([schema, of_file], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(
                f"`--keep` needs columns of one type, got another in {printable(file)}: {error}"
            ) from error
    return pa.schema([(field.name, pa.string() if pa.types.is_null(field.type) else field.type) for field in schema])


def add_rows(
    corpus: Corpus, inputs: tuple[str, ...], image_column: str, id_column: str | None, keep: tuple[str, ...] = ()
) -> pa.Schema:
    """
    Looks into the Parquet files of a corpus: its parts become their row groups.

    Returns:
        `pyarrow.Schema`: Of the columns in `keep`.

    Raises:
        ValueError: a file cannot be read, a column is missing, or an id is missing or comes twice.
    """

    def table_of(file: Part) -> Table:
        fs, _ = file_system(inputs[file.source])
        try:
            with opened_parquet(fs, file.path, image_column, id_column, keep) as parquet:
                check_columns(file.name, parquet.schema_arrow, image_column, id_column, keep)
                groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                digests = bytearray()
                if id_column:
                    for index in range(len(groups)):
                        for id_ in ids_of(parquet, file.name, index, id_column):
                            digests += IdSet.digest(id_)
                return Table(groups, bytes(digests), kept_fields(parquet.schema_arrow, keep))
        except (OSError, pa.ArrowException) as error:
            kind = "a table" if is_manifest(file.name) else "Parquet"
            raise ValueError(f"{printable(file.name)} of `--input` cannot be read as {kind}: {error}") from error

    files = corpus.parts
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(table_of, files))
    corpus.parts = []
    for file, table in zip(files, tables, strict=True):
        first = 0
        for index, count in enumerate(table.groups):
            corpus.parts.append(file._replace(row_group=index, first_row=first))
            first += count
        corpus.rows[file.name] = first
        corpus.digests[file.name] = table.digests
    corpus.total = sum(corpus.rows.values())
    if id_column:
        corpus.ids = IdSet(digests=b"".join(corpus.digests.values()))
        if corpus.ids.has_duplicates():
            raise ValueError(f"`--id-column` {id_column!r} must hold a different value in each row.")
    return common_schema(keep, {file.name: table.keep for file, table in zip(files, tables, strict=True)})


def read_row_group(part: Part, job: Job, done: Container[str]) -> Iterator[Image]:
    """
    The images of a row group that are not done; where it cannot be read, each of its rows has the error.

    Raises:
        InputError: the file is not what it was when the run began.
    """
    fs, _ = file_system(job.inputs[part.source])
    image_column, id_column = str(job.settings.image_column), job.settings.id_column
    keep = tuple(job.keep.names) if job.keep is not None else ()

    def ids() -> Iterator[str]:
        if id_column:
            return ids_of(parquet, part.name, part.row_group, id_column)
        return (f"{part.name}#{part.first_row + row}" for row in range(metadata.num_rows))

    try:
        with opened_parquet(fs, part.path, image_column, id_column, keep) as parquet:
            metadata = parquet.metadata.row_group(part.row_group)
            if all(id_ in done for id_ in ids()):
                return
            remaining = ids()
            try:
                for values in values_of(parquet, part.row_group, (image_column, *keep), job.max_image_bytes):
                    id_ = next(remaining)
                    if id_ not in done:
                        image = image_of(id_, values[0], part, fs, job.max_image_bytes)
                        yield with_columns(image, dict(zip(keep, values[1:], strict=True)))
            # What decompresses and parses raises more than OSError.
            except Exception as error:
                text = detail_of(error)
                yield from (Image(id_, text, None) for id_ in remaining if id_ not in done)
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        raise InputError(f"{printable(part.name)} of `--input` can no longer be read: {stable_text(error)}.") from error


def with_columns(image: Image, columns: dict[str, pa.Scalar]) -> Image:
    """An image with what is kept of its row; where that cannot be read, the error."""
    if not columns:
        return image
    try:
        return image._replace(kept={name: value_of(scalar) for name, scalar in columns.items()})
    except Exception as error:
        return Image(image.id, detail_of(error), None)


def value_of(scalar: pa.Scalar) -> Any:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if scalar is not None and scalar.is_valid and is_text(scalar.type):
        # Parquet does not promise UTF-8.
        return scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return None if scalar is None else scalar.as_py()


def values_of(
    parquet: pq.ParquetFile, group: int, columns: tuple[str, ...], max_image_bytes: int
) -> Iterator[tuple[pa.Scalar, ...]]:
    """
    The values of some columns, row by row, of which no more than `BYTES_AT_ONCE` are decoded at once, or one.

    Raises:
        ValueError: what is compressed can hold no images.
    """
    metadata = parquet.metadata.row_group(group)
    chunks = [chunk for column in dict.fromkeys(columns) for chunk in chunks_of(metadata, column)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if size > max_image_bytes:
        if size > max_image_bytes * metadata.num_rows:
            raise ValueError(TOO_LARGE)
        if size > MOST_COMPRESSED * sum(chunk.total_compressed_size for chunk in chunks):
            raise ValueError(f"the row group is compressed more than {MOST_COMPRESSED} times, as no images are")
    # Of a dictionary each value may be all of it.
    largest = sum(
        chunk.total_uncompressed_size // (1 if chunk.has_dictionary_page else max(1, metadata.num_rows))
        for chunk in chunks
    )
    rows = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, largest)))
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=list(dict.fromkeys(columns))):
        yield from zip(*(batch.column(name) for name in columns), strict=True)


def image_of(id_: str, value: pa.Scalar, part: Part, fs: fsspec.AbstractFileSystem, max_image_bytes: int) -> Image:
    """The bytes of a binary value, of a file by its path, or of the `{"bytes", "path"}` of the datasets library."""
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    path = None
    if isinstance(value, pa.StructScalar):
        fields = dict(value) if value.is_valid else {}
        value, path = fields.get("bytes"), fields.get("path")
        path = path.as_py() if path is not None else None
    try:
        if value is not None and value.is_valid:
            if value.as_buffer().size > max_image_bytes:
                raise ValueError(TOO_LARGE)
            data = value.as_py()
            return Image(id_, None, data if isinstance(data, bytes) else file_at(data, part, fs, max_image_bytes))
        if path is None:
            raise ValueError("the image must be bytes or a path, got NoneType")
        return Image(id_, None, file_at(path, part, fs, max_image_bytes))
    except Exception as error:
        return Image(id_, detail_of(error), None)


def file_at(path: str, part: Part, fs: fsspec.AbstractFileSystem, max_image_bytes: int) -> bytes:
    """
    The bytes of a file of which a table holds the path, relative to the table, or the URL.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no regular file.
    """
    if "://" in path:
        fs, path = file_system(path)
    elif not path.startswith("/"):
        path = f"{os.path.dirname(bare(fs, part.path))}/{path}"
    # Opening a pipe would wait for its other end.
    if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("the path leads to no regular file")
    data = fs.cat_file(path, start=0, end=max_image_bytes + 1)
    if len(data) > max_image_bytes:
        raise ValueError(TOO_LARGE)
    return data
