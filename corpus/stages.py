# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Images to packed batches, and packed batches to rows of the output."""

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from conversion.local_code import local_class
from corpus.job import Image, Job
from corpus.models import load_model, load_processor, model_folder
from corpus.rows import output_schema, stable_text
from corpus.settings import config_of, processor_of, weights_of


# So that a flood of errors is seen while it comes.
IMAGES_PER_BATCH = 1024


class Batch(NamedTuple):
    """`patches` is (N, patch_dim), `grids` int64 (len(ids), 3); `failed` has (id, error) of images without features."""

    ids: list[str]
    grids: torch.Tensor
    patches: torch.Tensor
    failed: list[tuple[str, str]]


class Preparer:
    """
    Images to packed batches of at most `patches_per_batch` patches.

    Raises:
        ValueError: the image processor found here is not that of the run.
    """

    def __init__(self, job: Job):
        folder, _ = model_folder(job.model, job.revision)
        self.processor = load_processor(folder, job.max_patches, job.image_size)
        check("processor", processor_of(self.processor), job.settings.processor)
        self.open_image = local_class("image_processing_aimv2_packing.open_image")
        self.dtype = getattr(torch, job.settings.dtype)
        self.patches_per_batch = job.patches_per_batch

    def __call__(self, images: Iterable[Image]) -> Iterator[Batch]:
        batch = self.empty_batch()
        room = self.patches_per_batch
        for id_, error, data in images:
            if error is None:
                try:
                    patches, grid = self.prepare(data or b"")
                # The decoders of PIL raise anything on a broken file.
                except Exception as failure:
                    batch.failed.append((id_, stable_text(failure)))
                else:
                    if len(patches) > room and batch.ids:
                        yield packed(batch)
                        batch, room = self.empty_batch(), self.patches_per_batch
                    batch.ids.append(id_)
                    batch.grids.append(grid)
                    batch.patches.append(patches)
                    room -= len(patches)
            else:
                batch.failed.append((id_, error))
            if len(batch.ids) + len(batch.failed) == IMAGES_PER_BATCH:
                yield packed(batch)
                batch, room = self.empty_batch(), self.patches_per_batch
        if batch.ids or batch.failed:
            yield packed(batch)

    @staticmethod
    def empty_batch() -> Any:
        return Batch([], [], [], [])  # type: ignore[arg-type]

    def prepare(self, data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches of one image, in the dtype of the model, and its row of `grid_thw`."""
        with warnings.catch_warnings():
            # On files that are odd and still decoded: one line each would bury the progress.
            warnings.filterwarnings("ignore", module="PIL")
            features = self.processor(self.open_image(io.BytesIO(data)), return_tensors="pt")
        return features["hidden_states"].to(self.dtype), features["grid_thw"][0]


def packed(batch: Any) -> Batch:
    grids = torch.stack(batch.grids) if batch.grids else torch.empty(0, 3, dtype=torch.int64)
    patches = torch.cat(batch.patches) if batch.patches else torch.empty(0, 0)
    return Batch(batch.ids, grids, patches, batch.failed)


def head(model: Any, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(hidden_states, grids)
    return output.pooler_output, output.last_hidden_state


def mean(model: Any, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = model(hidden_states, grids).last_hidden_state
    lengths = grids.prod(1).to(features.device, non_blocking=True)
    # Unsafe: the checks would wait for the device.
    return torch.segment_reduce(features.float(), "mean", lengths=lengths, unsafe=True), features


def projection(model: Any, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.get_image_features(hidden_states, grids)
    return output.pooler_output, output.last_hidden_state


# Each gives the embeddings (num_images, embedding_size) and the features of all patches.
POOLINGS: dict[str, Callable] = {"projection": projection, "head": head, "mean": mean}


def check_pooling(pooling: str | None, model: str, config: dict[str, Any], use_head: bool) -> str:
    """
    The pooling of a run, by default the model's own.

    Raises:
        ValueError: the model has no such pooling.
    """
    is_image_text = "text_config" in config
    if pooling == "head" and not use_head:
        raise ValueError(f"`--pooling head` needs a model with a head, got {model}, which has none: give mean.")
    if pooling == "projection" and not is_image_text:
        raise ValueError(
            f"`--pooling projection` needs an image-text model, got {model}, a vision tower: give head or mean."
        )
    return pooling or ("projection" if is_image_text else "head" if use_head else "mean")


class Encoder:
    """
    Packed batches to rows of the output.

    Raises:
        ValueError: the model found here is not that of the run.
    """

    def __init__(self, job: Job, device: str):
        # Arrow's memory is read-only, and only read.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        folder, _ = model_folder(job.model, job.revision)
        check("weights", weights_of(folder), job.settings.weights)
        check("config", config_of(folder), job.settings.config)
        self.settings = job.settings
        self.device = torch.device(device)
        self.model = load_model(folder, job.settings).to(self.device)
        config = self.model.config
        hidden_size = getattr(config, "vision_config", config).hidden_size
        embedding_size = config.projection_dim if job.settings.pooling == "projection" else hidden_size
        self.schema = output_schema(embedding_size, job.settings.patch_features, hidden_size)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[pa.Table]:
        # A device that computes on its own works on one batch while the one before becomes a table.
        ahead = 0 if self.device.type == "cpu" else 1
        started: deque[tuple] = deque()
        for batch in batches:
            started.append((batch, self.encode(batch)))
            if len(started) > ahead:
                yield self.table_of(*started.popleft())
        while started:
            yield self.table_of(*started.popleft())

    @torch.inference_mode()
    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if not batch.ids:
            return None
        hidden_states = batch.patches.to(self.device, non_blocking=True)
        try:
            embeddings, features = POOLINGS[self.settings.pooling](self.model, hidden_states, batch.grids)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"The device has no memory for {len(hidden_states)} patches at once: give a smaller "
                "--patches-per-batch and run again."
            ) from error
        if self.settings.patch_features:
            return embeddings.float(), features.to(getattr(torch, self.settings.patch_features))
        return embeddings.float(), None

    def table_of(self, batch: Batch, outputs: tuple[torch.Tensor, torch.Tensor | None] | None) -> pa.Table:
        ids, failed = batch.ids, [id_ for id_, _ in batch.failed]
        errors = [None] * len(ids) + [error for _, error in batch.failed]
        grids = batch.grids.tolist()
        columns = {
            "id": pa.array(ids + failed, pa.string()),
            "error": pa.array(errors, pa.string()),
            "grid_thw": pa.array([*grids, *([None] * len(failed))], self.schema.field("grid_thw").type),
        }
        if outputs is not None:
            embeddings, features = outputs
            values = pa.array(embeddings.cpu().numpy().reshape(-1))
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
            if features is not None:
                parts = features.cpu().view(torch.uint8).split(batch.grids.prod(1).tolist())
                columns["patch_features"] = pa.array([part.numpy().tobytes() for part in parts], pa.large_binary())
        arrays = []
        for field in self.schema:
            column = columns.get(field.name, pa.nulls(0, field.type))
            missing = len(ids) + len(failed) - len(column)
            arrays.append(pa.concat_arrays([column, pa.nulls(missing, field.type)]) if missing else column)
        return pa.Table.from_arrays(arrays, schema=self.schema)


def check(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"A worker found a model whose {name} is not that of the run: it must be the same everywhere.")
