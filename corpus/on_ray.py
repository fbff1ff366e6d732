# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine for several devices and machines: the same stages on Ray Data."""

import logging
import os
import queue
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import ray
import ray.data
import torch

from conversion.local_code import CODE_FOLDER, local_class
from corpus.inputs import Part, table_of_parts
from corpus.interrupts import Interrupts
from corpus.options import Options
from corpus.rows import PATCH_SCHEMA, Image, table_of
from corpus.settings import Job
from corpus.sink import Sink
from corpus.stages import Batch, Encoder, Preparer
from corpus.tasks import FILES_PER_BLOCK, count, read_stage, write


# Files that are being written while more is encoded.
WRITES_AT_ONCE = 4


class PrepareStage:
    """`IMAGE_SCHEMA` to `PATCH_SCHEMA`, patches as bytes in the dtype of the model."""

    def __init__(self, job: Job):
        torch.set_num_threads(1)
        self.prepare = Preparer(job)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        images = (Image(row["id"], row["error"], row["image"], row.get("kept")) for row in table.to_pylist())
        for batch in self.prepare(images):
            lengths = batch.grids.prod(1).tolist()
            parts = batch.patches.split(lengths) if lengths else ()
            rows = [
                (id_, None, grid, patches.view(torch.uint8).numpy().tobytes())
                for id_, grid, patches in zip(batch.ids, batch.grids.tolist(), parts, strict=True)
            ]
            made = table_of([*rows, *((id_, error, None, None) for id_, error in batch.failed)], PATCH_SCHEMA)
            yield made if batch.kept is None else made.append_column("kept", batch.kept)


class EncodeStage:
    """`PATCH_SCHEMA` to rows of the output, one copy of the model per GPU or share of the CPUs."""

    def __init__(self, job: Job, device: str, num_threads: int):
        torch.set_num_threads(num_threads)
        self.encode = Encoder(job, device)
        self.sampler_class = local_class("batching_aimv2_packing.PatchBudgetBatchSampler")
        self.dtype = getattr(torch, job.settings.dtype)
        self.patches_per_batch = job.patches_per_batch

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self.encode(self.batches(table))

    def batches(self, table: pa.Table) -> Iterator[Batch]:
        failed = table.filter(table["error"].is_valid())
        if len(failed):
            pairs = list(zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True))
            yield Batch([], torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 0), pairs, kept_of(failed))
        table = table.filter(table["error"].is_null())
        if not len(table):
            return
        # Arrow lays binary values end to end: the column is packed already.
        patches = pa.concat_arrays(table["patches"].chunks)
        offsets = torch.frombuffer(patches.buffers()[1], dtype=torch.int64)[patches.offset :]
        values = torch.frombuffer(patches.buffers()[2], dtype=self.dtype)
        ids, grids = table["id"].to_pylist(), torch.tensor(table["grid_thw"].to_pylist())
        lengths, all_kept = grids.prod(1), kept_of(table)
        for indices in self.sampler_class(lengths.tolist(), self.patches_per_batch):
            batch = slice(indices[0], indices[-1] + 1)
            start, stop = (int(offsets[i]) // values.element_size() for i in (batch.start, batch.stop))
            packed = values[start:stop].view(int(lengths[batch].sum()), -1)
            kept = None if all_kept is None else all_kept[batch]
            yield Batch(ids[batch], grids[batch], packed, [], kept)


def kept_of(table: pa.Table) -> pa.StructArray | None:
    return pa.concat_arrays(table["kept"].chunks) if "kept" in table.column_names else None


def check_address(address: str) -> None:
    """
    Ray asks an address where nothing answers for two minutes, without a word.

    Raises:
        ConnectionError: nothing answers.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.port is None or parts.hostname is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"Nothing answers at `--address` {address} ({error.strerror or error}).") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Ray's own processes print while they start; what goes wrong is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def started(address: str | None) -> Iterator[None]:
    """Connects to the cluster, or starts Ray here, and gives the workers this repo's code."""
    if address:
        check_address(address)
    # What is below warns of how Ray Data makes its own actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with tempfile.TemporaryDirectory() as flat:
        for file in Path(CODE_FOLDER).glob("*_aimv2_packing.py"):
            shutil.copy(file, flat)
        packages = Path(__file__).resolve().parent.parent
        runtime_env = {"working_dir": flat, "py_modules": [str(packages / name) for name in ("corpus", "conversion")]}
        cpus: dict[str, Any] = {"address": "local", "num_cpus": max(2, os.cpu_count() or 1), "include_dashboard": False}
        options = {"address": address} if address else cpus
        with quiet():
            ray.init(**options, runtime_env=runtime_env, logging_level="error", log_to_driver=False)
    try:
        # An error is raised here too, and without pages of Ray's.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
    finally:
        ray.shutdown()


def gpus_of(resources: dict[str, float], device: str | None) -> int:
    """
    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    gpus = int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise ValueError("`--device` cuda needs a GPU, and Ray has none: give cpu, or leave it out.")
    return 0 if device == "cpu" else gpus


def encoded(job: Job, kind: str, parts: list[Part], done: Container[str], options: Options) -> ray.data.Dataset:
    """
    The stages as a dataset of rows of the output.

    Raises:
        ValueError: there are fewer GPUs than workers, or none for `--device cuda`.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources["CPU"]), gpus_of(resources, options.device)
    num_workers = options.num_workers or gpus or 1
    if gpus and num_workers > gpus:
        raise ValueError(f"`--num-workers` must be at most the number of GPUs, {gpus}, got {num_workers}.")
    # Actors keep their shares of the CPUs. The shares only guide Ray: they limit no threads.
    share = min(1.0, cpus / 8)
    encoder = {"num_gpus": 1, "num_cpus": share} if gpus else {"num_cpus": cpus / 4 / num_workers}
    preparers = max(1, int((cpus - num_workers * encoder["num_cpus"] - 2 * share) / share))

    per_block = max(1, min(FILES_PER_BLOCK, len(parts) // (4 * num_workers))) if kind == "image" else 1
    blocks = [table_of_parts(parts[i : i + per_block]) for i in range(0, len(parts), per_block)]
    device, threads = ("cuda" if gpus else "cpu"), max(1, cpus // num_workers)
    whole = {"batch_size": None, "batch_format": "pyarrow"}
    return (
        ray.data.from_arrow(blocks)
        .map_batches(read_stage, **whole, fn_kwargs={"kind": kind, "job": job, "done": done}, num_cpus=share / 2)
        .map_batches(
            PrepareStage,
            **whole,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=preparers),
            num_cpus=share,
        )
        .map_batches(
            EncodeStage,
            **whole,
            fn_constructor_args=(job, device, threads),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            **encoder,
        )
    )


class Feed(threading.Thread):
    """Puts (reference, rows, bytes) of each block of encoded rows into a queue, then None or what went wrong."""

    def __init__(self, dataset: ray.data.Dataset):
        super().__init__(daemon=True)
        self.dataset = dataset
        self.blocks: queue.Queue = queue.Queue(maxsize=WRITES_AT_ONCE)
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        end = None
        try:
            for bundle in self.dataset.iter_internal_ref_bundles():
                for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
                    if metadata.num_rows:
                        self.put((ref, metadata.num_rows, metadata.size_bytes))
                if self.stopped.is_set():
                    return
        except Exception as error:
            end = error
        self.put(end)

    def put(self, item: Any) -> None:
        while not self.stopped.is_set():
            with suppress(queue.Full):
                return self.blocks.put(item, timeout=0.1)

    def stop(self) -> None:
        """Ends the stages, unless they do not react."""
        self.stopped.set()
        self.join(timeout=10)


def encode(
    job: Job, kind: str, parts: list[Part], done: Container[str], options: Options, sink: Sink, interrupts: Interrupts
) -> None:
    """
    Encodes what is not done. Rows that are encoded when something fails, or is interrupted, are written first.

    Raises:
        ConnectionError: there is no cluster at the address.
        KeyboardInterrupt: the run was interrupted.
        RuntimeError: a stage failed.
        ValueError: there are fewer GPUs than workers.
    """
    try:
        with started(options.address):
            feed = Feed(encoded(job, kind, parts, done, options))
            try:
                publish_all(feed, sink, interrupts)
            finally:
                feed.stop()
    except ray.exceptions.RayError as error:
        raise plain(error) from error


def publish_all(feed: Feed, sink: Sink, interrupts: Interrupts) -> None:
    # Without a share of the CPUs, which the stages hold.
    write_task, count_task = (ray.remote(num_cpus=0)(function) for function in (write, count))
    location = sink.output.fs.unstrip_protocol(sink.output.path)
    # The counts of the rows of each file that is being written.
    writes: dict[ray.ObjectRef, list[ray.ObjectRef]] = {}
    counts: dict[ray.ObjectRef, None] = {}

    def start_write() -> None:
        taken, rows = sink.take()
        if rows:
            blocks, block_counts = zip(*taken, strict=True)
            writes[write_task.remote(location, rows, *blocks)] = list(block_counts)

    def settle(timeout: float | None) -> None:
        """Counts what is encoded and publishes what is written by then."""
        for count_ref in finished(counts, timeout):
            del counts[count_ref]
            sink.progress.add(ray.get(count_ref))
        for write_ref in finished(writes, timeout):
            sink.publish(ray.get(write_ref), ray.get(writes.pop(write_ref)))

    end: BaseException | None = None
    while not sink.is_full():
        try:
            with interrupts.allowed():
                block = feed.blocks.get(timeout=0.5)
        except queue.Empty:
            block = ()
        except KeyboardInterrupt as interrupt:
            block = interrupt
        if block is None or isinstance(block, BaseException):
            end = block
            break
        if block:
            ref, rows, size = block
            rows = sink.room_for(rows)
            count_ref = count_task.remote(rows, ref)
            counts[count_ref] = None
            sink.add((ref, count_ref), rows, size)
        if sink.is_due():
            start_write()
        settle(timeout=0)
        if len(writes) > WRITES_AT_ONCE:
            ray.wait(list(writes))
    start_write()
    settle(timeout=None)
    if end:
        raise end


def finished(tasks: Iterable[ray.ObjectRef], timeout: float | None) -> list[ray.ObjectRef]:
    """The tasks that have ended by then."""
    refs = list(tasks)
    return ray.wait(refs, num_returns=len(refs), timeout=timeout)[0] if refs else []


def plain(error: BaseException) -> Exception:
    """What was raised in a worker, without Ray's account of the way it came."""
    cause: Any = error
    while deeper := getattr(cause, "cause", None) or cause.__cause__:
        cause = deeper
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    if isinstance(cause, ray.exceptions.RayError):
        return RuntimeError(f"A worker failed: {lines[-1]}")
    # Ray Data appends advice on its settings.
    return RuntimeError(lines[0])


__all__ = ["encode"]
