# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tensors side by side in memory, and CUDA graphs that leave no trace outside themselves: of whatever model.

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
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn


logger = logging.getLogger(__name__)

# A graph that so many calls per graph have not used is dropped for another; sooner, captures would chase each other.
PATIENCE = 16

# How many keys that have no graph are remembered.
MAX_SEEN = 4096


# Tensors side by side


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> str | None:
    """Moves parameters side by side in memory, or says why they stay where they are."""
    first = parameters[0]
    for parameter in parameters:
        if type(parameter) is not nn.Parameter:
            return f"one is a {type(parameter).__name__}"
        if parameter.is_meta or parameter.layout != torch.strided or not parameter.is_contiguous():
            return "one is on the meta device, sparse or not contiguous"
        if (parameter.dtype, parameter.device, parameter.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
            return "they differ in dtype, device or shape"
        if not parameter.is_floating_point() or not parameter.nbytes or parameter.nbytes % 16:
            return "one holds no floating-point values, or the next would not begin at a multiple of 16 bytes"
        storage = parameter.untyped_storage()
        # The parameter's own, and what `storage` holds.
        if storage.nbytes() != parameter.nbytes or torch._C._storage_Use_Count(storage._cdata) > 2:
            return "one shares its storage"
        if not parameter.is_cuda and parameter.is_shared():
            return "one is shared with other processes"
    if len(set(map(id, parameters))) < len(parameters):
        return "one is used twice"
    # Tensors made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, own in zip(parameters, whole.split(list(map(len, parameters))), strict=True):
            # In a storage that begins and ends with it, and keeps the memory of all alive.
            parameter.data = torch.from_dlpack(own)
    return None


def memory_of(parameters: Sequence[nn.Parameter]) -> tuple[list[int], list[int]]:
    """Where each lies, and in how many bytes."""
    return list(map(torch.Tensor.data_ptr, parameters)), list(map(attrgetter("nbytes"), parameters))


def addresses_of(model: nn.Module) -> dict[int, int]:
    """Where parameters lie that are on a GPU, by `id`."""
    return {id(own): own.data_ptr() for own in model.parameters() if type(own) is nn.Parameter and own.is_cuda}


def are_adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each begins where the one before it ends, so that one tensor can be all of them."""
    kinds = {(tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors}
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    return len(kinds) == 1 and next(iter(kinds))[2] and ends[:-1] == [tensor.data_ptr() for tensor in tensors[1:]]


class Memory:
    """What lies at an address of a GPU, as other libraries show theirs to PyTorch."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 2}


def whole_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adjacent tensors as one along the first dimension: a view that keeps none of them alive."""
    first, size = tensors[0], sum(tensor.nbytes for tensor in tensors)
    if first.is_cuda:
        memory = torch.as_tensor(Memory(first.data_ptr(), size), device=first.device)
    else:
        memory = torch.frombuffer((ctypes.c_char * size).from_address(first.data_ptr()), dtype=torch.uint8)
    return memory.view(first.dtype).view(-1, *first.shape[1:])


class Product(NamedTuple):
    """A linear layer, and which columns of the output are its."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: slice


def products_of(*linears: nn.Linear) -> list[Product]:
    """One product where the weights lie side by side, else one each; not to be kept."""
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    known = [bias for bias in biases if bias is not None]
    if are_adjacent(weights) and (not known or (len(known) == len(biases) and are_adjacent(known))):
        return [Product(whole_of(weights), whole_of(known) if known else None, slice(None))]
    ends = list(accumulate(map(len, weights), initial=0))
    columns = [slice(start, end) for start, end in pairwise(ends)]
    return list(map(Product, weights, biases, columns))


# Graphs


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
            one = torch.ones(16, 16, device=device)
            torch.mm(one, one)  # loads what may not be loaded during a capture, and makes the context this thread's
            self.done = torch.cuda.Event()
            self.stream, self.pool = own_stream(device), torch.cuda.graph_pool_handle()
            # As long as this graph lives, the pool does.
            self.keeper = torch.cuda.CUDAGraph()
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


GRAPH_DEVICES: dict[torch.device, GraphDevice] = {}
GRAPH_DEVICES_LOCK = threading.Lock()


def graph_device(device: torch.device) -> GraphDevice:
    with GRAPH_DEVICES_LOCK, torch.inference_mode(False), torch.no_grad():
        if device not in GRAPH_DEVICES:
            GRAPH_DEVICES[device] = GraphDevice(device)
        return GRAPH_DEVICES[device]


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
        graph = self.by_key.get(key)
        if graph is not None:
            self.calls += 1
            graph.last_call = self.calls
            self.by_key.move_to_end(key)
        return graph

    def should_capture(self, key: Hashable, most: int, after: int = 1) -> bool:
        """Whether this key has come `after` times before, and may have a graph where there may be `most`."""
        self.calls += 1
        if self.failure is not None or most < 1:
            return False
        if len(self.seen) >= MAX_SEEN:
            self.seen.clear()
        self.seen[key] += 1
        if self.seen[key] <= after:
            return False
        oldest = next(iter(self.by_key.values()), None)
        return len(self.by_key) < most or oldest is None or self.calls - oldest.last_call >= PATIENCE * most

    def capture(self, key: Hashable, most: int, inputs: Any, run: Callable[[], Any]) -> Graph | None:
        """A new graph; `run` runs once before: compiling kernels is no part of it. `None` where that fails."""
        try:
            shared = graph_device(self.device)
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
