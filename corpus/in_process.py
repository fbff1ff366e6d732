# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine for one device: workers decode, this process encodes and writes."""

import gc
import os
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from corpus.inputs import InputError, Part, parts_of, table_of_parts
from corpus.interrupts import Interrupts
from corpus.models import device_of
from corpus.options import Options
from corpus.output import counts_of
from corpus.readers import FILES_AT_ONCE, read
from corpus.ring import START_METHOD, Filled, Ring
from corpus.settings import Job
from corpus.sink import Sink
from corpus.stages import Batch, Encoder, Preparer, packed
from corpus.writer import Writer


class PackedBatches(IterableDataset):
    """The packed batches of the parts, divided among the workers of a data loader, which need a ring."""

    def __init__(self, job: Job, kind: str, parts: list[Part], done: Container[str], ring: Ring | None):
        self.job, self.kind, self.done, self.ring = job, kind, done, ring
        self.parts = table_of_parts(parts)

    def __iter__(self) -> Iterator[Batch | Filled | InputError]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for group in Preparer(self.job).groups(read(self.mine(index, workers), self.kind, self.job, self.done)):
                batch = self.ring.fill(group, self.job.keep) if self.ring else packed(group, self.job.keep)
                if batch is None:
                    return
                yield batch
        # Raised here, it would arrive with a traceback in its message.
        except InputError as error:
            yield error

    def mine(self, index: int, workers: int) -> Iterator[Part]:
        at_once = FILES_AT_ONCE if self.kind == "image" else 1
        for start in range(index * at_once, len(self.parts), workers * at_once):
            yield from parts_of(self.parts[start : start + at_once])


def unchanged(value: Any) -> Any:
    return value


def decoders(device: str) -> int:
    """Processes that decode. On a CPU that encodes they take a part of it, and none of a small one."""
    cpus = len(os.sched_getaffinity(0))
    return cpus // 8 if device == "cpu" else max(1, min(16, cpus - 1))


def encode(
    job: Job, kind: str, parts: list[Part], done: Container[str], options: Options, sink: Sink, interrupts: Interrupts
) -> None:
    """
    Encodes what is not done. Rows that are encoded when something fails, or is interrupted, are written first.

    Raises:
        InputError: an input is no longer there.
        KeyboardInterrupt: the run was interrupted.
        OSError: the output cannot be written.
        RuntimeError: a worker died, or the device has not enough memory.
    """
    device = device_of(options.device)
    encoder = Encoder(job, device)
    workers = decoders(device)
    if device == "cpu" and workers:
        torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    ring = Ring(job.patches_per_batch, encoder.patch_dim, encoder.model.dtype) if workers else None
    loader = DataLoader(
        PackedBatches(job, kind, parts, done, ring),
        batch_size=None,
        num_workers=workers,
        collate_fn=unchanged,
        in_order=False,
        multiprocessing_context=START_METHOD if workers else None,
    )
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        writer = Writer(sink, pool)
        # What a worker's collector looks at would be copied.
        gc.freeze()
        try:
            loaded = iter(loader)
        finally:
            gc.unfreeze()
        if ring:
            stack.enter_context(ring.served(workers, encoder.device))
        tables = encoder(received(loaded, ring.batch_of if ring else unchanged))
        try:
            while not sink.is_full():
                with interrupts.allowed():
                    table = next(tables, None)
                if table is None:
                    break
                table = table[: sink.room_for(len(table))]
                counts = counts_of(table)
                sink.progress.add(counts)
                sink.add((table, counts), len(table), table.nbytes)
                if sink.is_due():
                    writer.start()
                writer.publish(wait=False)
        finally:
            writer.finish()


def received(loaded: Iterator[Any], batch_of: Callable[[Any], Batch]) -> Iterator[Batch]:
    for batch in loaded:
        if isinstance(batch, InputError):
            raise batch
        yield batch_of(batch)
