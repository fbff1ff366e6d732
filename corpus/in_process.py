# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine for one device: workers decode, this process encodes and writes."""

import os
from collections.abc import Container, Iterator
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from corpus.inputs import InputError, Part
from corpus.interrupts import Interrupts
from corpus.models import device_of
from corpus.options import Options
from corpus.output import counts_of
from corpus.readers import FILES_AT_ONCE, read
from corpus.rows import IdSet
from corpus.settings import Job
from corpus.sink import Sink
from corpus.stages import Batch, Encoder, Preparer


class PackedBatches(IterableDataset):
    """The packed batches of the parts, divided among the workers of a data loader."""

    def __init__(self, job: Job, kind: str, parts: list[Part], done: Container[str]):
        self.job, self.kind, self.parts, self.done = job, kind, parts, done

    def __iter__(self) -> Iterator[Batch | InputError]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        at_once = FILES_AT_ONCE if self.kind == "image" else 1
        mine = [part for i, part in enumerate(self.parts) if i // at_once % workers == index]
        try:
            yield from Preparer(self.job)(read(mine, self.kind, self.job, self.done))
        # Raised here, it would arrive with a traceback in its message.
        except InputError as error:
            yield error


def unchanged(value: Any) -> Any:
    return value


def decoders(device: str) -> int:
    """Processes that decode. On a CPU that encodes they take a part of it, and none of a small one."""
    cpus = len(os.sched_getaffinity(0))
    return cpus // 8 if device == "cpu" else max(1, min(16, cpus - 1))


def encode(
    job: Job, kind: str, parts: list[Part], done: IdSet, options: Options, sink: Sink, interrupts: Interrupts
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
    loader = DataLoader(
        PackedBatches(job, kind, parts, done),
        batch_size=None,
        num_workers=workers,
        collate_fn=unchanged,
        pin_memory=device.startswith("cuda"),
        in_order=False,
    )
    tables = encoder(raise_errors(loader))
    while not sink.is_full():
        try:
            with interrupts.allowed():
                table = next(tables, None)
        except BaseException:
            write(sink)
            raise
        if table is None:
            break
        table = table[: sink.room_for(len(table))]
        counts = counts_of(table)
        sink.progress.add(counts)
        sink.add((table, counts), len(table), table.nbytes)
        if sink.is_due():
            write(sink)
    write(sink)


def raise_errors(loader: DataLoader) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def write(sink: Sink) -> None:
    taken, rows = sink.take()
    if rows:
        tables, counts = zip(*taken, strict=True)
        sink.publish(sink.output.write_rows(pa.concat_tables(tables)), counts)
