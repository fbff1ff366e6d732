# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of the command."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """As the command explains them."""

    model: str
    input: list[str]
    output: str
    revision: str | None = None
    pooling: str | None = None
    patch_features: str | None = None
    embedding_dtype: str = "float32"
    keep: tuple[str, ...] = ()
    dtype: str = "float32"
    max_patches: int | None = None
    image_size: int | None = None
    image_column: str = "image"
    id_column: str | None = None
    retry_errors: bool = False
    redo_changed: bool = False
    limit: int | None = None
    num_shards: int | None = None
    shard_index: int | None = None
    max_image_bytes: int = 2**29
    max_image_pixels: int = 160_000_000
    device: str | None = None
    address: str | None = None
    num_workers: int | None = None
    patches_per_batch: int | None = None
    rows_per_file: int = 16384
    flush_minutes: float = 2.0
