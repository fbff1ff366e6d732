# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine's graphs change nothing of others, and others nothing of theirs."""

import gc
import threading

import pytest
import torch
from cuda_models import SHALLOW, cuda_graphs, distance, features, gpu, graphs_of, inputs_of, model_of, plain_features


SIZES = [1 << 16, 1 << 20, 1 << 22, 8_519_680, 32 << 20, 33 << 20]


def canaries() -> list[torch.Tensor]:
    """Memory in which nobody has anything to write, of the sizes that workspaces have."""
    return [torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda") for size in SIZES * 3]


def overwritten(memory: list[torch.Tensor]) -> int:
    torch.cuda.synchronize()
    return sum(int((own != 0x5A).sum()) for own in memory)


class Product:
    """A graph of someone else's: products on a stream that has been used before, captured as PyTorch's docs say."""

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self.states = torch.randn(256, 2816, device="cuda", dtype=torch.bfloat16)
        self.weight = torch.randn(2816, 1024, device="cuda", dtype=torch.bfloat16)
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.expected = self.states @ self.weight
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.output = self.states @ self.weight

    def is_right(self) -> bool:
        self.output.zero_()
        self.graph.replay()
        return torch.equal(self.output, self.expected)


def first_deleted() -> list[Product]:
    products = [Product(), Product()]
    del products[0]
    gc.collect()
    return products


BEFORE = {
    "none": list,
    "one": lambda: [Product()],
    "first deleted": first_deleted,
    "every stream": lambda: [Product() for _ in range(33)],
}


@gpu
@pytest.mark.parametrize("clears", [False, True], ids=["", "others clear workspaces"])
@pytest.mark.parametrize("setup", BEFORE)
def test_graphs_beside_each_other_write_to_their_own_memory_only(setup, clears):
    products = BEFORE[setup]()
    packed = model_of(torch.bfloat16, **SHALLOW)
    batches = [inputs_of([(16, 16)] * count) for count in (1, 3, 8)]
    expected = []
    for inputs in batches:
        expected.append(features(packed, inputs, times=3))
        products.append(Product())
    del products[0]
    if clears:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    memory = canaries()
    for _ in range(3):
        assert all(product.is_right() for product in products)
        for inputs, own in zip(batches, expected, strict=True):
            assert torch.equal(features(packed, inputs), own)
    assert overwritten(memory) == 0
    # Graphs that are captured after others have cleared, and before these are gone.
    inputs = inputs_of([(9, 9)])
    last = features(packed, inputs, times=3)
    assert all(torch.equal(features(packed, own), theirs) for own, theirs in zip(batches, expected, strict=True))
    assert torch.equal(features(packed, inputs), last) and all(product.is_right() for product in products)
    del packed
    gc.collect()
    torch.cuda.empty_cache()
    assert all(product.is_right() for product in products)
    assert overwritten(memory) == 0


@gpu
def test_a_model_compiled_into_graphs_runs_beside_it():
    torch._dynamo.reset()
    layer = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).cuda().bfloat16()
    states = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
    packed = model_of(torch.bfloat16, **SHALLOW)
    inputs = inputs_of([(16, 16)] * 3)
    with torch.inference_mode():
        ours = features(packed, inputs, times=3)
        compiled = torch.compile(layer, mode="reduce-overhead")
        for _ in range(4):
            theirs = compiled(states).clone()
        memory = canaries()
        for _ in range(3):
            assert torch.equal(features(packed, inputs), ours)
            assert torch.equal(compiled(states), theirs)
        other = features(packed, inputs_of([(9, 9)]), times=3)
        assert torch.equal(compiled(states), theirs) and torch.equal(features(packed, inputs), ours)
        assert other.isfinite().all()
    assert overwritten(memory) == 0
    torch._dynamo.reset()


@gpu
def test_a_capture_empties_no_cache_and_waits_for_nobody():
    packed = model_of(torch.bfloat16)
    inputs = inputs_of([(16, 16)])
    features(packed, inputs, times=2)
    cached = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del cached
    reserved = torch.cuda.memory_reserved()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)
    packed.capture_cuda_graphs([100])
    assert not stream.query()
    assert torch.cuda.memory_reserved() >= reserved
    torch.cuda.synchronize()
    assert len(graphs_of(packed)) == 2


@gpu
def test_other_threads_use_the_default_stream_during_a_capture():
    packed = model_of(torch.bfloat16)
    stop, failures = threading.Event(), []

    def work() -> None:
        states = torch.randn(64, 64, device="cuda")
        while not stop.is_set():
            try:
                states = (states @ states).clamp(-1, 1)
            except RuntimeError as error:
                failures.append(str(error))
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for patches in range(64, 1025, 64):
            packed.capture_cuda_graphs([patches])
    finally:
        stop.set()
        thread.join()
    assert not failures
    inputs = inputs_of([(16, 16)])
    assert distance(features(packed, inputs), plain_features(packed, inputs)) < 0.02


@gpu
def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(monkeypatch, caplog):
    packed = model_of(torch.bfloat16)
    inputs = inputs_of([(5, 7)])
    expected = features(packed, inputs)

    def fail(self, graph, run):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(cuda_graphs.GraphDevice, "capture", fail)
    assert torch.equal(features(packed, inputs, times=3), expected)
    assert "no graphs today" in caplog.text


class Captured:
    """Stands for a graph where there is no GPU."""

    def __init__(self):
        self.last_call = 0


def test_a_key_has_a_graph_from_its_second_call_on_and_the_least_used_goes():
    graphs = cuda_graphs.Graphs(torch.device("cpu"))
    assert graphs.find("a") is None and not graphs.should_capture("a", most=2)
    assert graphs.find("a") is None and graphs.should_capture("a", most=2)
    assert graphs.should_capture("b", most=2, after=0) and not graphs.should_capture("c", most=0, after=0)
    for key in "ab":
        graphs.by_key[key] = Captured()
        graphs.find(key)
    graphs.find("a")
    assert list(graphs.by_key) == ["b", "a"]
    # Full: nothing is dropped that was used of late.
    assert not graphs.should_capture("c", most=2, after=0)
    for _ in range(2 * cuda_graphs.PATIENCE):
        graphs.find("a")
    assert graphs.should_capture("c", most=2, after=0)
    graphs.by_key.clear()
    graphs.failure = "out of memory"
    assert not graphs.should_capture("c", most=2, after=0)
