# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
CUDA graphs that leave no trace outside themselves, whatever it is that they run.

What a capture allocates, cuBLAS's workspaces among it, comes from one memory pool of a GPU, which is never given back;
and it is captured on a stream that nobody else has, by which PyTorch tells workspaces apart. So no graph of others
shares one with these, and others may clear all workspaces: the memory stays in the pool. All graphs of a GPU run one
after the other, in the order of the calls, so they may share that memory.
"""

import ctypes
import gc
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch


logger = logging.getLogger(__name__)

# A graph that so many calls per graph have not used is dropped for another; sooner, captures would chase each other.
PATIENCE = 16

# How many keys that have no graph are remembered.
MAX_SEEN = 4096


class GraphDevice:
    """
    What all graphs of one GPU share.

    Attributes:
        lock: Held from the first write to a graph's inputs to the last read of its outputs.
        done (`torch.cuda.Event`): The graph that ran last, and the reads of its outputs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.RLock()
        with torch.cuda.device(device):
            self.done = torch.cuda.Event()
            self.stream, self.pool = own_stream(device), torch.cuda.graph_pool_handle()
            # As long as this graph lives, the pool does.
            self.keeper = torch.cuda.CUDAGraph()
            one = torch.ones(16, 16, device=device)
            torch.mm(one, one)  # loads what may not be loaded during a capture
            self.kept = self.capture(self.keeper, lambda: torch.mm(one, one))

    def capture(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> Any:
        """
        What `run` returns, its tensors to be written by each replay. By hand, because `torch.cuda.graph` waits for the
        whole GPU and empties everyone's caches.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), without_garbage_collection():
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                output = run()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return output


@cache
def graph_device(index: int) -> GraphDevice:
    with torch.inference_mode(False), torch.no_grad():
        return GraphDevice(torch.device("cuda", index))


def own_stream(device: torch.device) -> torch.cuda.ExternalStream:
    """A stream that is not of PyTorch's 32, which everyone takes turns with; never destroyed, as those are."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    handle, without_default_stream = ctypes.c_void_p(), 1
    status = driver.cuStreamCreate(ctypes.byref(handle), without_default_stream)
    if status or handle.value is None:
        raise RuntimeError(f"CUDA made no stream: cuStreamCreate returned {status}.")
    return torch.cuda.ExternalStream(handle.value, device=device)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection during a capture could destroy CUDA objects, which ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """
    A captured function of static tensors.

    Attributes:
        inputs: What its caller writes to before each replay.
    """

    def __init__(self, shared: GraphDevice, inputs: Any, run: Callable[[], Any]):
        self.shared, self.inputs, self.last_call = shared, inputs, 0
        self.graph = torch.cuda.CUDAGraph()
        self.outputs = shared.capture(self.graph, run)

    def __call__(self, load: Callable[[], None], take: Callable[[Any], Any]) -> Any:
        """Replays between `load`, which writes the inputs, and `take`, whose result of the outputs is returned."""
        shared = self.shared
        with shared.lock:
            stream = torch.cuda.current_stream(shared.device)
            stream.wait_event(shared.done)
            load()
            self.graph.replay()
            taken = take(self.outputs)
            shared.done.record(stream)
        return taken


class Graphs:
    """
    The graphs of one caller, by key; those least recently used go first.

    Attributes:
        failure (`str`, or `None`): Why none can be captured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.by_key: OrderedDict[Hashable, Graph] = OrderedDict()
        self.seen: Counter[Hashable] = Counter()
        self.calls = 0
        self.failure: str | None = None

    def find(self, key: Hashable) -> Graph | None:
        self.calls += 1
        graph = self.by_key.get(key)
        if graph is not None:
            graph.last_call = self.calls
            self.by_key.move_to_end(key)
        return graph

    def should_capture(self, key: Hashable, most: int, at_once: bool = False) -> bool:
        """Whether this key has come before, unless `at_once`, and may have a graph where there may be `most`."""
        if self.failure is not None or most < 1:
            return False
        if len(self.seen) >= MAX_SEEN:
            self.seen.clear()
        self.seen[key] += 1
        if self.seen[key] < 2 and not at_once:
            return False
        oldest = next(iter(self.by_key.values()), None)
        return len(self.by_key) < most or oldest is None or self.calls - oldest.last_call >= PATIENCE * most

    def capture(self, key: Hashable, most: int, inputs: Any, run: Callable[[], Any]) -> Graph | None:
        """A new graph; `run` runs once before: compiling kernels is no part of it. `None` where that fails."""
        try:
            shared = graph_device(self.device.index)
            with shared.lock, torch.inference_mode(False), torch.no_grad():
                while len(self.by_key) >= most:
                    shared.done.synchronize()
                    self.by_key.popitem(last=False)
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(shared.done)
                run()
                graph = self.by_key[key] = Graph(shared, inputs, run)
                shared.done.record(stream)
        except (RuntimeError, OSError) as error:
            # Out of memory, say, or a kernel of the user's choice that cannot be captured.
            self.failure = str(error)
            self.clear()
            logger.warning("No CUDA graph could be captured, this model runs without: %s", self.failure)
            return None
        graph.last_call = self.calls
        return graph

    def clear(self) -> None:
        """Drops all, once the last has run: what it reads is freed with it."""
        graph = next(iter(self.by_key.values()), None)
        if graph is not None and not torch.cuda.is_current_stream_capturing():
            graph.shared.done.synchronize()
        self.by_key.clear()

    def __del__(self) -> None:
        self.clear()
