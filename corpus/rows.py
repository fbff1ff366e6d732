# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows of an output, those that go from stage to stage on Ray, and the ids of both."""

import base64
import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from conversion.messages import without_credentials


IMAGE_SCHEMA = pa.schema({"id": pa.string(), "error": pa.string(), "image": pa.large_binary()})
PATCH_SCHEMA = pa.schema(
    {"id": pa.string(), "error": pa.string(), "grid_thw": pa.list_(pa.int64()), "patches": pa.large_binary()}
)

# Of the output; `shard` is what readers of shards add.
OUR_COLUMNS = ("id", "error", "error_detail", "grid_thw", "embedding", "patch_features", "shard")

TOO_LARGE = "the file is larger than --max-image-bytes"


class Image(NamedTuple):
    """The bytes of a file, or why there are none, and what goes along."""

    id: str
    error: str | None
    data: bytes | None
    kept: dict[str, Any] | None = None


class IdSet:
    """A set of ids as 16 bytes each, which all workers of a machine share: the ids of a corpus fill its memory."""

    def __init__(self, ids: Iterable[str] = (), digests: bytes = b""):
        """`digests` are those of more ids, end to end."""
        joined = bytearray(digests)
        for id_ in ids:
            joined += self.digest(id_)
        self.sorted = np.sort(np.frombuffer(joined, dtype="S16"))

    @staticmethod
    def digest(id_: str) -> bytes:
        """96 bits, as text: NumPy drops zeros at the end of bytes."""
        return base64.b64encode(hashlib.blake2b(id_.encode(), digest_size=12).digest())

    @staticmethod
    def split(digests: bytes) -> list[bytes]:
        """The digests of ids, which are given end to end."""
        return [digests[start : start + 16] for start in range(0, len(digests), 16)]

    def __contains__(self, id_: object) -> bool:
        digest = self.digest(str(id_))
        index = np.searchsorted(self.sorted, digest)
        return bool(index < len(self.sorted) and self.sorted[index] == digest)

    def __len__(self) -> int:
        return len(self.sorted)

    def has_duplicates(self) -> bool:
        return bool(len(self.duplicates()))

    def duplicates(self) -> "IdSet":
        """Those that come twice or more, once."""
        again = self.sorted[1:][self.sorted[1:] == self.sorted[:-1]]
        return IdSet(digests=np.unique(again).tobytes()) if len(again) else IdSet()


def with_kept(schema: pa.Schema, keep: pa.Schema | None) -> pa.Schema:
    """Of rows on their way on Ray, where what is kept is one column: its names may be any."""
    return schema if keep is None else schema.append(pa.field("kept", pa.struct(keep)))


def output_schema(
    embedding_size: int,
    embedding_dtype: str,
    patch_features: str | None,
    hidden_size: int,
    keep: pa.Schema | None,
    metadata: dict[str, str],
) -> pa.Schema:
    """`metadata` is what a file says of how its rows were made."""
    number = pa.float16() if embedding_dtype == "float16" else pa.float32()
    fields = [
        pa.field("id", pa.string()),
        pa.field("error", pa.string()),
        pa.field("error_detail", pa.string()),
        pa.field("grid_thw", pa.list_(pa.int64())),
        # Of any length: readers before pyarrow 26 take no null among lists of a fixed size.
        pa.field("embedding", pa.list_(number), metadata={"shape": f"({embedding_size},)"}),
    ]
    if patch_features:
        # Arrow has no bfloat16, and lists of half floats are slow to read and write.
        of_patches = {"dtype": patch_features, "shape": f"(t, h, w, {hidden_size})"}
        fields.append(pa.field("patch_features", pa.large_binary(), metadata=of_patches))
    fields += keep or []
    return pa.schema(fields, {f"aimv2_packing.{name}": value for name, value in metadata.items()})


def table_of(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def detail_of(error: BaseException) -> str:
    """The kind and the message of an error, without paths, addresses in memory and what is secret in URLs."""
    message = getattr(error, "strerror", None) or str(error)
    message = re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", message)
    message = without_credentials(" ".join(message.split()))
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()


def groupable(detail: str) -> str:
    """A text with N for each number, so that a query of the Parquet files groups what differs from image to image."""
    return re.sub(r"\b\d+", "N", detail)


def stable_text(error: BaseException) -> str:
    return groupable(detail_of(error))
