# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Patches on their way from the processes that decode to a device: written once, copied once."""

import mmap
import multiprocessing
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from corpus.stages import Batch, Prepared, packed


# More do not make it faster: a worker that waits has its next batch decoded.
BUFFERS = 8
SECONDS_TO_LOOK = 1

# Workers have the buffers, and the ids that are done, as they were when they began.
START_METHOD = "fork"


class Filled(NamedTuple):
    """A batch whose patches are in a buffer; `grids` is no tensor, which would be shared memory of its own."""

    ids: list[str]
    grids: np.ndarray
    failed: list[tuple[str, str]]
    kept: pa.StructArray | None
    buffer: int | None


class Ring:
    """
    Buffers of packed patches that all processes share: workers fill them, the device copies out of them.

    Args:
        patches (`int`): The most of one batch.
        patch_dim (`int`): Values of a patch.
        dtype (`torch.dtype`): Of the patches.
    """

    def __init__(self, patches: int, patch_dim: int, dtype: torch.dtype):
        # Without a name: of memory with one, containers have little.
        memory = mmap.mmap(-1, BUFFERS * patches * patch_dim * dtype.itemsize)
        self.buffers = torch.frombuffer(memory, dtype=dtype).view(BUFFERS, patches, patch_dim)
        self.free = multiprocessing.get_context(START_METHOD).Queue()
        for index in range(BUFFERS):
            self.free.put(index)

    def fill(self, group: list[Prepared], keep: pa.Schema | None) -> Filled | None:
        """In a worker: a batch, or None where the run has ended."""
        index = None
        if any(image.error is None for image in group):
            index = self.take()
            if index is None:
                return None
        batch = packed(group, keep, None if index is None else self.buffers[index])
        return Filled(batch.ids, batch.grids.numpy(), batch.failed, batch.kept, index)

    def take(self) -> int | None:
        while True:
            try:
                return self.free.get(timeout=SECONDS_TO_LOOK)
            except queue.Empty:
                parent = multiprocessing.parent_process()
                # A command that was killed gives nothing back.
                if parent is not None and not parent.is_alive():
                    return None

    def batch_of(self, filled: Filled) -> Batch:
        """Where batches are encoded: one that gives its buffer back when it is released."""
        grids = torch.from_numpy(filled.grids)
        if filled.buffer is None:
            return Batch(filled.ids, grids, torch.empty(0, 0), filled.failed, filled.kept)
        patches = self.buffers[filled.buffer, : int(grids.prod(1).sum())]
        release = partial(self.free.put, filled.buffer)
        return Batch(filled.ids, grids, patches, filled.failed, filled.kept, release)

    @contextmanager
    def served(self, workers: int, device: torch.device) -> Iterator[None]:
        """
        While batches are encoded, and after the workers have begun. For a GPU the memory is pinned. In the end workers
        that wait for a buffer are told so.

        Raises:
            RuntimeError: the memory cannot be pinned.
        """
        is_pinned = device.type == "cuda"
        try:
            if is_pinned:
                # 1: for all devices.
                with torch.cuda.device(device):
                    torch.cuda.check_error(
                        self.cudart.cudaHostRegister(self.buffers.data_ptr(), self.buffers.nbytes, 1)
                    )
            yield
        finally:
            for _ in range(workers):
                self.free.put(None)
            if is_pinned:
                torch.cuda.synchronize(device)
                self.cudart.cudaHostUnregister(self.buffers.data_ptr())

    @property
    def cudart(self):
        return torch.cuda.cudart()
