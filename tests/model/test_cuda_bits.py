# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""An image's features are the same bits in the first call and the hundredth, alone and in any batch, at any place."""

from dataclasses import replace

import pytest
import torch
from cuda_models import (
    HALF,
    SHALLOW,
    VARIANTS,
    cuda_engine,
    engine_of,
    features,
    gpu,
    interpreted_loops,
    kernels,
    model_of,
    needs_hopper,
    needs_kernels,
)


@pytest.fixture(autouse=True)
def loops():
    with interpreted_loops():
        yield


needs_descriptors = pytest.mark.skipif(kernels.TensorDescriptor is None, reason="needs Triton's tensor descriptors")


@needs_kernels
@needs_descriptors
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="for Hopper")
@pytest.mark.parametrize("shape", [(131, 72, 200), (3, 40, 24)])
@pytest.mark.parametrize("kind", ["alone", "bias", "columns"])
def test_the_product_is_close_to_float64_and_writes_its_own_values_only(kind, shape):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patches, hidden_size, size = shape
    states = torch.randn(patches, hidden_size, device=device).half()
    weight = (torch.randn(size, hidden_size, device=device) * hidden_size**-0.5).half()
    bias = torch.randn(size, device=device).half() if kind == "bias" else None
    width = 2 * size if kind == "columns" else size
    for tile in kernels.PRODUCT_TILES:
        memory = torch.full((patches + 2, width), float("nan"), device=device, dtype=torch.half)
        out = memory[1:-1, width - size :]
        exact = states.double() @ weight.double().T + (0 if bias is None else bias.double())
        kernels.product_in_order(states, weight, bias, out, tile)
        assert memory[[0, -1]].isnan().all() and memory[:, : width - size].isnan().all()
        # Little more than what rounding the exact values costs.
        assert (out - exact).norm() < 1.02 * (exact.half() - exact).norm()


@pytest.mark.parametrize("keeps_order", [True, False])
def test_cublas_multiplies_only_where_it_keeps_the_order(monkeypatch, keeps_order):
    calls = []
    monkeypatch.setattr(kernels, "kind_keeps_order", lambda *kind: keeps_order)
    monkeypatch.setattr(kernels, "product_in_order", lambda *args: calls.append(args))
    states, weight, out = torch.randn(3, 8), torch.randn(4, 8), torch.zeros(3, 4)
    kernels.multiply(states, weight, None, out, numerics=("some",))
    assert bool(calls) != keeps_order and torch.equal(out, states @ weight.T) == keeps_order
    kernels.multiply(states, weight, None, out, numerics=None)
    assert len(calls) == (not keeps_order) and torch.equal(out, states @ weight.T)


GRIDS = [(16, 16), (7, 9), (32, 32), (1, 1), (3, 43)]
ORDERS = [
    [0],
    [1, 0],
    [0] * 7,
    [2, 0, 1],
    [0] * 64,
    [1] * 30 + [0],
    [2] * 20 + [0] * 3 + [4],
    [3] * 63 + [0],
    [3] * 100 + [4, 1, 2],
    [4, 3, 4, 3, 1, 0, 2],
]


@gpu
@needs_hopper
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_in_every_call_batch_and_place(variant, dtype):
    """With graphs and without, above the largest of them and in pieces of products."""
    packed = model_of(dtype, **SHALLOW, **VARIANTS[variant])
    images = [torch.randn(height * width, 588, device="cuda") for height, width in GRIDS]

    def run(order: list[int]) -> tuple[torch.Tensor, ...]:
        inputs = {
            "hidden_states": torch.cat([images[index] for index in order]),
            "grid_thw": torch.tensor([(1, *GRIDS[index]) for index in order]),
        }
        return features(packed, inputs).split([len(images[index]) for index in order])

    alone = [run([index])[0] for index in range(len(GRIDS))]
    for order in [*ORDERS, ORDERS[0], [2] * 21, [2] * 70 + [0, 3, 0]]:
        for _ in range(3):
            for index, own in zip(order, run(order), strict=True):
                assert torch.equal(own, alone[index])
    assert all(graph.inputs.budget.same_bits for graph in engine_of(packed).graphs.by_key.values())
    packed.cuda_graph_settings = replace(packed.cuda_graph_settings, max_graph_patches=0)
    for order in ORDERS:
        assert all(torch.equal(own, alone[index]) for index, own in zip(order, run(order), strict=True))


@gpu
@needs_hopper
def test_an_image_is_the_same_at_every_place_of_a_tile():
    packed = model_of(torch.bfloat16, **SHALLOW)
    image, filler = torch.randn(20, 588, device="cuda"), torch.randn(300, 588, device="cuda")
    grid = torch.tensor([(1, 4, 5)])
    alone = features(packed, {"hidden_states": image, "grid_thw": grid})
    for before in range(1, 300):
        hidden_states = torch.cat([filler[:before], image, filler[before:]])
        grid_thw = torch.tensor([(1, 1, before), (1, 4, 5), (1, 1, 300 - before)][: 3 if before < 300 else 2])
        ours = features(packed, {"hidden_states": hidden_states, "grid_thw": grid_thw})
        assert torch.equal(ours[before : before + 20], alone)


@gpu
@needs_hopper
def test_products_at_every_padded_size_give_the_bits_of_their_rows():
    """What takes cuBLAS's place and what does not, at all sizes there are, each row against the same rows alone."""
    sizes = sorted({cuda_engine.padded_size(patches) for patches in range(1, cuda_engine.PATCHES_PER_PRODUCT + 1)})
    numerics = kernels.blas_numerics()
    for hidden_size, size, has_bias in [
        (592, 1024, True),
        (1024, 3072, False),
        (1024, 1024, False),
        (2816, 1024, False),
    ]:
        states = torch.randn(sizes[-1], hidden_size, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(size, hidden_size, device="cuda", dtype=torch.bfloat16) * hidden_size**-0.5
        bias = torch.randn(size, device="cuda", dtype=torch.bfloat16) if has_bias else None
        every = states.new_empty(len(states), size)
        start = torch.randn_like(every)
        kernels.product_in_order(states, weight, bias, every)
        for patches in sizes:
            for rows in (slice(patches), slice(len(states) - patches, None)):
                out = torch.empty_like(every[rows])
                kernels.multiply(states[rows], weight, bias, out, numerics)
                assert torch.equal(out, every[rows])
                shape = (patches, hidden_size)
                if not has_bias and kernels.blas_keeps_order(shape, size, False, out, numerics, adds=True):
                    assert torch.equal(start[rows].clone().addmm_(states[rows], weight.t()), start[rows] + every[rows])
