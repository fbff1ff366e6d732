# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Images to packed batches, and packed batches to rows of the output."""

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow as pa
import torch

from conversion.local_code import local_class
from corpus.models import load_model, load_processor, model_folder
from corpus.rows import Image, detail_of, groupable, output_schema
from corpus.settings import Job, config_of, processor_of, weights_of


# So that a flood of errors is seen while it comes.
IMAGES_PER_BATCH = 1024

TOO_MANY_PIXELS = "ValueError: the image has more pixels than --max-image-pixels"


def nothing() -> None:
    pass


class Batch(NamedTuple):
    """
    `patches` is (N, patch_dim), `grids` int64 (len(ids), 3); `failed` has (id, error) of images without features, and
    `kept` a struct of what goes along for each of `ids` and then of `failed`. `release` is called when `patches` are no
    longer read.
    """

    ids: list[str]
    grids: torch.Tensor
    patches: torch.Tensor
    failed: list[tuple[str, str]]
    kept: pa.StructArray | None = None
    release: Callable[[], None] = nothing


class Prepared(NamedTuple):
    """One image: `patches` is (n, patch_dim) and `grid` int64 (3,), or `error` says why there are none."""

    id: str
    error: str | None
    patches: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    kept: dict[str, Any] | None = None


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
        self.pack_in_order = local_class("batching_aimv2_packing.pack_in_order")
        self.dtype = getattr(torch, job.settings.dtype)
        self.job = job

    def __call__(self, images: Iterable[Image]) -> Iterator[Batch]:
        for group in self.groups(images):
            yield packed(group, self.job.keep)

    def groups(self, images: Iterable[Image]) -> Iterator[list[Prepared]]:
        """Of the images of one batch each."""

        def length(image: Prepared) -> int:
            return 0 if image.patches is None else len(image.patches)

        return self.pack_in_order(map(self.prepare, images), length, self.job.patches_per_batch, IMAGES_PER_BATCH)

    def prepare(self, image: Image) -> Prepared:
        """The patches of one image, in the dtype of the model."""
        if image.error is not None:
            return Prepared(image.id, image.error, kept=image.kept)
        try:
            with warnings.catch_warnings(), pixel_limit(self.job.max_image_pixels):
                # On files that are odd and still decoded: one line each would bury the progress.
                warnings.filterwarnings("ignore", module="PIL")
                opened = self.open_image(io.BytesIO(image.data or b""), max_pixels=self.job.max_image_pixels)
                features = self.processor(opened, return_tensors="pt")
        # The decoders of PIL raise anything on a broken file.
        except Exception as failure:
            too_large = isinstance(failure.__cause__, PIL.Image.DecompressionBombError)
            error = TOO_MANY_PIXELS if too_large else detail_of(failure)
            return Prepared(image.id, error, kept=image.kept)
        patches = features["hidden_states"].to(self.dtype)
        return Prepared(image.id, None, patches, features["grid_thw"][0], image.kept)


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """The most pixels of an image that PIL opens, which it checks before it decodes."""
    before = PIL.Image.MAX_IMAGE_PIXELS
    # It warns above its limit, and raises above twice of it.
    PIL.Image.MAX_IMAGE_PIXELS = pixels / 2  # type: ignore[assignment]
    try:
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


def packed(group: list[Prepared], keep: pa.Schema | None, out: torch.Tensor | None = None) -> Batch:
    """A batch of some images, its patches the first rows of `out` where that is given."""
    good = [image for image in group if image.error is None]
    grids = torch.stack([image.grid for image in good]) if good else torch.empty(0, 3, dtype=torch.int64)
    parts = [image.patches for image in good if image.patches is not None]
    own = None if out is None else out[: sum(map(len, parts))]
    patches = torch.cat(parts, out=own) if parts else torch.empty(0, 0)
    failed = [image for image in group if image.error is not None]
    kept = None if keep is None else pa.array([image.kept for image in good + failed], pa.struct(keep))
    errors = [(image.id, str(image.error)) for image in failed]
    return Batch([image.id for image in good], grids, patches, errors, kept)


def head(model: Any, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(hidden_states, grids)
    return output.pooler_output, output.last_hidden_state


def mean(model: Any, hidden_states: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = model(hidden_states, grids).last_hidden_state
    cu_seqlens = torch.nn.functional.pad(grids.prod(1).cumsum(0), (1, 0)).to(features.device, non_blocking=True)
    mean_over_segments = local_class("layout_aimv2_packing.mean_over_segments")
    return mean_over_segments(features.float(), cu_seqlens), features


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
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # On a GPU one is computed and one is ready, whatever this process does meanwhile.
        self.batches_at_once = 0 if self.device.type == "cpu" else 2
        config = self.model.config
        vision = getattr(config, "vision_config", config)
        hidden_size = vision.hidden_size
        self.patch_dim = vision.num_channels * vision.patch_size**2
        embedding_size = config.projection_dim if job.settings.pooling == "projection" else hidden_size
        metadata = {
            # Paths are of one machine.
            "model": job.model if job.revision else os.path.basename(job.model),
            "commit": job.revision or "",
            "weights": job.settings.weights,
            "pooling": job.settings.pooling,
            "dtype": job.settings.dtype,
            "patch_size": str(vision.patch_size),
        }
        self.schema = output_schema(
            embedding_size,
            job.settings.embedding_dtype,
            job.settings.patch_features,
            hidden_size,
            job.keep,
            metadata,
        )

    def __call__(self, batches: Iterable[Batch]) -> Iterator[pa.Table]:
        started: deque[tuple] = deque()
        for batch in batches:
            started.append((batch, *self.fetch(self.encode(batch))))
            if len(started) > self.batches_at_once:
                yield self.finish(*started.popleft())
        while started:
            yield self.finish(*started.popleft())

    def finish(self, batch: Batch, encoded: "Encoded | None", done: torch.cuda.Event | None) -> pa.Table:
        if done is not None:
            done.synchronize()
        batch.release()
        return self.table_of(batch, encoded)

    def fetch(self, encoded: "Encoded | None") -> tuple["Encoded | None", torch.cuda.Event | None]:
        """What is encoded on the host, once the event has come where there is one: later batches are not waited for."""
        if encoded is None or self.device.type == "cpu":
            return encoded, None
        is_cuda = self.device.type == "cuda"
        # Into pinned memory, which is PyTorch's own.
        fetched = [value if value is None else value.to("cpu", non_blocking=is_cuda) for value in encoded]
        done = None
        if is_cuda:
            # A core that waits is a decoder's.
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self.device))
        return Encoded(*fetched), done

    def to_device(self, patches: torch.Tensor) -> torch.Tensor:
        """While the batch before is computed."""
        if self.copies is None:
            return patches.to(self.device)
        with torch.cuda.stream(self.copies):
            moved = patches.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        moved.record_stream(current)
        return moved

    @torch.inference_mode()
    def encode(self, batch: Batch) -> "Encoded | None":
        if not batch.ids:
            return None
        hidden_states = self.to_device(batch.patches)
        try:
            embeddings, features = POOLINGS[self.settings.pooling](self.model, hidden_states, batch.grids)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"The device has no memory for {len(hidden_states)} patches at once: give a smaller "
                "--patches-per-batch and run again."
            ) from error
        embeddings = embeddings.to(getattr(torch, self.settings.embedding_dtype))
        are_finite = embeddings.isfinite().all(1)
        if self.settings.patch_features is None:
            return Encoded(embeddings, are_finite)
        features = features.to(getattr(torch, self.settings.patch_features))
        return Encoded(embeddings, are_finite, features, features.isfinite().all(1))

    def table_of(self, batch: Batch, encoded: "Encoded | None") -> pa.Table:
        errors: list[str | None] = []
        columns: dict[str, pa.Array] = {}
        if encoded is not None:
            lengths = batch.grids.prod(1).tolist()
            setting = "dtype" if self.settings.dtype == "float16" else "embedding_dtype"
            errors = [None if is_finite else self.not_finite(setting) for is_finite in encoded.are_finite.tolist()]
            if encoded.features is not None and encoded.patches_are_finite is not None:
                for index, part in enumerate(encoded.patches_are_finite.split(lengths)):
                    if errors[index] is None and not part.all():
                        errors[index] = self.not_finite("patch_features")
            good = [index for index, error in enumerate(errors) if error is None]
            columns["grid_thw"] = pa.array(batch.grids[good].tolist(), self.schema.field("grid_thw").type)
            embeddings = encoded.embeddings[good].numpy()
            offsets = np.arange(len(good) + 1, dtype=np.int32) * embeddings.shape[1]
            columns["embedding"] = pa.ListArray.from_arrays(offsets, embeddings.reshape(-1))
            if encoded.features is not None:
                parts = encoded.features.view(torch.uint8).split(lengths)
                columns["patch_features"] = pa.array([parts[i].numpy().tobytes() for i in good], pa.large_binary())
        ids = [*batch.ids, *(id_ for id_, _ in batch.failed)]
        details = [*errors, *(error for _, error in batch.failed)]
        # Those with features first.
        order = sorted(range(len(ids)), key=lambda index: details[index] is not None)
        details = [details[index] for index in order]
        columns["id"] = pa.array([ids[index] for index in order], pa.string())
        if batch.kept is not None:
            kept = batch.kept.take(pa.array(order, pa.int64()))
            columns |= zip((field.name for field in kept.type), kept.flatten(), strict=True)
        columns["error_detail"] = pa.array(details, pa.string())
        columns["error"] = pa.array([detail and groupable(detail) for detail in details], pa.string())
        arrays = []
        for field in self.schema:
            column = columns.get(field.name, pa.nulls(0, field.type))
            missing = len(columns["id"]) - len(column)
            arrays.append(pa.concat_arrays([column, pa.nulls(missing, field.type)]) if missing else column)
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def not_finite(self, setting: str) -> str:
        """Why features that are infinite or NaN are none, and what to do."""
        dtype = getattr(self.settings, setting)
        other = "float32" if setting == "embedding_dtype" else "bfloat16"
        step = f": give --{setting.replace('_', '-')} {other} and another output" if dtype == "float16" else ""
        return f"ValueError: the features are not finite in {dtype}{step}"


class Encoded(NamedTuple):
    """
    `embeddings` (num_images, embedding_size), `are_finite` bool (num_images,), `features` of all patches
    (num_patches, hidden_size) with `patches_are_finite` bool (num_patches,).
    """

    embeddings: torch.Tensor
    are_finite: torch.Tensor
    features: torch.Tensor | None = None
    patches_are_finite: torch.Tensor | None = None


def check(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"A worker found a model whose {name} is not that of the run: it must be the same everywhere.")
