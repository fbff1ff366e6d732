# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The gate's product as one kernel: close to float64, each row by itself."""

import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from reference import hub_module


kernels = hub_module("triton_kernels")

# On a CPU the kernel runs under Triton's interpreter, which has to be asked for before Triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs_here() -> bool:
    if kernels.triton is None or kernels.TensorDescriptor is None:
        return False
    if DEVICE == "cuda":
        return torch.cuda.get_device_capability() >= (9, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


pytestmark = pytest.mark.skipif(
    not runs_here(), reason="needs Triton's tensor descriptors and a Hopper GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def interpreted_loops(monkeypatch):
    """NumPy 2.4 makes no number of an array of one element; Triton 3.6's interpreter asks for one in loops."""
    if DEVICE == "cuda":
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)


# The interpreter cuts bfloat16 off.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
SHAPES = {
    "whole_tiles": (256, 128, 256),
    "remainders": (131, 72, 200),
    "less_than_a_tile": (3, 40, 24),
}
if DEVICE == "cuda":
    # More tiles than the GPU runs at once.
    SHAPES |= {"large": (4096, 1024, 2816), "large_remainders": (2111, 1048, 2824), "3B": (700, 3072, 8192)}


def inputs_of(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """States and weights; gate and up are of about unit variance."""
    patches, hidden_size, size = shape
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(patches, hidden_size, generator=generator)
    weight = torch.randn(2 * size, hidden_size, generator=generator) * hidden_size**-0.5
    return states.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def swiglu(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # What the kernel leaves out stays NaN, and what it writes beside its own shows.
    patches, size = len(states), len(weight) // 2
    memory = torch.full((patches + 2, size), float("nan"), device=DEVICE, dtype=states.dtype)
    kernels.swiglu(states, weight, out=memory[1:-1])
    assert memory[[0, -1]].isnan().all()
    return memory[1:-1]


def gated(products: torch.Tensor) -> torch.Tensor:
    gate, up = products.chunk(2, dim=1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_closer_to_float64_than_a_rounded_product(shape, dtype):
    states, weight = inputs_of(shape, dtype)
    exact = gated(states.double() @ weight.double().T)
    rounded = gated((states @ weight.T).float()).to(dtype)
    error = (swiglu(states, weight) - exact).norm()
    assert error < (rounded - exact).norm()
    # Little more than what rounding the exact values costs.
    assert error < 1.01 * (exact.to(dtype) - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_of_either_sign(dtype):
    states = torch.eye(16, device=DEVICE, dtype=dtype)
    gates = torch.tensor([-6e4, -200.0, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 200.0, 6e4], device=DEVICE)
    gate = torch.zeros(16, 16, device=DEVICE)
    gate[: len(gates), 0] = gates
    up = torch.full((16, 16), 0.5, device=DEVICE)
    weight = torch.cat([gate.T, up]).to(dtype)
    exact = gated(states.double() @ weight.double().T)
    ours = swiglu(states, weight).double()
    # As in PyTorch, a sigmoid below the inverse of the largest float32 is 0.
    smallest = max(torch.finfo(dtype).tiny, 100 / torch.finfo(torch.float32).max)
    assert ((ours - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + smallest).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone(value):
    states, weight = inputs_of((150, 72, 200), torch.float16)
    clean = swiglu(states, weight)
    poisoned = states.clone()
    poisoned[[5, 140]] = value
    others = torch.ones(len(states), dtype=torch.bool, device=DEVICE)
    others[[5, 140]] = False
    ours = swiglu(poisoned, weight)
    assert torch.equal(ours[others], clean[others])
    assert not ours[~others].isfinite().all(dim=1).any()


def test_rows_of_zeros_give_zeros():
    states, weight = inputs_of((130, 72, 200), torch.float16)
    states[[0, 129]] = 0
    assert (swiglu(states, weight)[[0, 129]] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rows_bits_depend_neither_on_its_place_nor_on_the_number_of_rows(dtype):
    states, weight = inputs_of((5000, 1024, 2816), dtype)
    every = swiglu(states, weight)
    for patches in [1, 77, 128, 1000, 4999]:
        assert torch.equal(swiglu(states[-patches:], weight), every[-patches:])


@pytest.mark.gpu
def test_a_graph_reads_its_tensors_anew():
    states, weight = inputs_of((2048, 1024, 2816), torch.bfloat16)
    other = states.flip(0).contiguous()
    expected = swiglu(other, weight)
    out = torch.empty_like(expected)
    kernels.swiglu(states, weight, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.swiglu(states, weight, out=out)
    states.copy_(other)
    graph.replay()
    assert torch.equal(out, expected)
