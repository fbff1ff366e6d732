# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine: features of the plain model or closer to float32, from kernels, merged products and graphs."""

import copy
import os
import threading
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ODD_GRIDS,
    hub_module,
    pack,
    packed_layout,
    packing_model,
    random_images,
    random_mixes,
    reference_model,
    with_positions,
)


cuda_engine, kernels = hub_module("cuda_engine"), hub_module("triton_kernels")

LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8}
MIXED = [*ODD_GRIDS, (16, 16), (16, 16), (40, 30), (64, 64)]

VARIANTS = {
    "native": {},
    "learned": {"is_native": False},
    "biases": {"qkv_bias": True, "mlp_bias": True},
}

gpu = pytest.mark.gpu
# On a CPU the kernels run under Triton's interpreter, which has to be asked for before Triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    kernels.triton is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Triton and a CUDA device or TRITON_INTERPRET=1",
)
HALF = [torch.bfloat16, torch.float16]


def inputs_of(grids: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The patches on the device, `grid_thw` on the CPU."""
    inputs = pack(random_images(list(grids)))
    return {**inputs, "hidden_states": inputs["hidden_states"].to(DEVICE, dtype)}


def features(packed, inputs: dict[str, torch.Tensor], times: int = 1) -> torch.Tensor:
    """After `times` forwards of the engine: the first runs without a graph, the second captures one."""
    with torch.inference_mode():
        for _ in range(times):
            output = packed(**inputs).last_hidden_state
            assert packed.last_engine == "cuda", packed.engine_refusal
    return output


def engine_of(packed):
    engine = cuda_engine.engines[packed]
    assert engine.capture_failure is None
    return engine


def plain_features(packed, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    packed.use_engines = False
    with torch.inference_mode():
        output = packed(**inputs).last_hidden_state
    packed.use_engines = True
    return output


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.float() - exact).norm() / exact.norm()).item()


# What needs no GPU


def test_without_triton_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(cuda_engine, "triton", None)
    engine = cuda_engine.Engine(packing_model(reference_model()), cuda_engine.CudaInferenceSettings())
    assert engine.reason == "Triton is not installed"


def test_padded_sizes_recur_and_cost_little():
    sizes = [cuda_engine.padded_size(patches) for patches in range(1, 20481)]
    assert all(patches <= size for patches, size in enumerate(sizes, start=1))
    assert all(size - patches < max(64, size / 16) for patches, size in enumerate(sizes, start=1))
    assert all(cuda_engine.padded_size(size) == size for size in set(sizes))
    assert len({size for size in sizes if 4096 < size <= 8192}) == 16
    assert len(set(sizes)) < 128


def torch_add_rms_norm(residual, delta, weight, eps, out):
    if delta is not None:
        residual += delta
    out.copy_(F.rms_norm(residual, residual.shape[1:], weight, eps))


def torch_silu_mul(gate_up, out):
    gate, up = gate_up.chunk(2, dim=1)
    out.copy_(F.silu(gate) * up)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grids", [ODD_GRIDS, [(20, 15)]], ids=["few_patches", "many_patches"])
@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
def test_products_and_what_lies_between_them_are_the_models(monkeypatch, patch_layout, grids, variant, merge):
    """The engine's own forward in float32, its kernels replaced by PyTorch's operations."""
    monkeypatch.setattr(cuda_engine, "add_rms_norm", torch_add_rms_norm)
    monkeypatch.setattr(cuda_engine, "silu_mul", torch_silu_mul)
    packed = packing_model(reference_model(**VARIANTS[variant]), patch_layout=patch_layout)
    inputs = pack(random_images(grids))
    layout = packed_layout(inputs["grid_thw"], packed.config)
    settings = cuda_engine.CudaInferenceSettings(merge_weights=merge)
    engine = cuda_engine.Engine(packed, settings)
    engine.weights = cuda_engine.Weights(packed, merge)
    buffers = engine.new_buffers(len(inputs["hidden_states"]))
    buffers.patches[:, : inputs["hidden_states"].shape[1]].copy_(inputs["hidden_states"])

    def attend(module, *states):
        segments = zip(*(x.transpose(0, 1).split(layout.lengths, dim=1) for x in states), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=1).transpose(0, 1)

    with torch.inference_mode():
        embeddings, full = packed.embeddings, with_positions(layout, packed.config)
        positions = embeddings.native_positions if packed.config.is_native else embeddings.learned_positions
        ours = engine.forward(buffers, positions(full), attend)
        expected = packed(**inputs).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5


def are_current(weights, packed) -> bool:
    below = list(packed.modules())[1:]
    return weights.are_those_of(below, cuda_engine.parameters_of(below))


def test_merged_weights_follow_the_models_own():
    packed = packing_model(reference_model(qkv_bias=True))
    keys = list(packed.state_dict())
    weights = cuda_engine.Weights(packed, merge=True)
    attention = packed.encoder.layers[1].attention

    def merged() -> torch.Tensor:
        return weights.layers[1].qkv[0].weight

    def expected() -> torch.Tensor:
        return torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])

    assert torch.equal(merged(), expected())
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)
    assert are_current(weights, packed) and weights.have_changed()
    weights.refresh()
    assert torch.equal(merged(), expected()) and not weights.have_changed()
    assert list(packed.state_dict()) == keys


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed.double(),
        lambda packed: setattr(packed.rms_norm, "weight", torch.nn.Parameter(packed.rms_norm.weight.clone())),
        lambda packed: setattr(packed.encoder.layers[0].ffn, "up_proj", torch.nn.Linear(64, 96, bias=False)),
        lambda packed: setattr(packed.encoder, "layers", packed.encoder.layers[:1]),
        lambda packed: setattr(packed.encoder.layers[1].attention.q_proj, "bias", torch.nn.Parameter(torch.ones(64))),
    ],
    ids=["moved", "parameter_replaced", "module_replaced", "layers_cut", "bias_added"],
)
def test_weights_moved_or_replaced_are_noticed(change):
    packed = packing_model(reference_model())
    weights = cuda_engine.Weights(packed, merge=True)
    assert are_current(weights, packed)
    change(packed)
    assert not are_current(weights, packed)


def test_what_was_started_before_another_thread_refreshed_the_copies_is_dropped():
    packed = packing_model(reference_model())
    engine = cuda_engine.Engine(packed, cuda_engine.CudaInferenceSettings())
    engine.weights = cuda_engine.Weights(packed, merge=True)
    started = cuda_engine.Started(engine, None, torch.zeros(1), engine.weights.versions)
    assert engine.still_holds(started)
    with torch.no_grad():
        packed.encoder.layers[0].attention.q_proj.weight.mul_(2)
    assert not engine.still_holds(started)
    engine.weights.refresh()
    assert not engine.still_holds(started)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: setattr(packed.encoder.layers[0].rms_norm2, "eps", 1e-3),
        lambda packed: setattr(packed.config, "patch_layout", "channels_last"),
        lambda packed: setattr(packed.config, "_attn_implementation", "flash_attention_2"),
    ],
    ids=["eps", "patch_layout", "attention"],
)
def test_a_graph_is_not_that_of_other_numbers(change):
    packed = packing_model(reference_model())
    layout = packed_layout(torch.tensor([(1, 4, 5)]), packed.config)
    engine = cuda_engine.Engine(packed, cuda_engine.CudaInferenceSettings())
    engine.has_own_attention = True
    before = engine.key_of(engine.budget_of(20, layout))
    assert engine.key_of(engine.budget_of(20, layout)) == before
    change(packed)
    assert engine.key_of(engine.budget_of(20, layout)) != before


# Kernels


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 96, 1024])
def test_norm_and_gate_are_as_close_to_float64_as_pytorchs(size, dtype):
    residual, delta = torch.randn(2, 33, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    total, normed = residual + delta, torch.empty_like(residual)
    kernels.add_rms_norm(residual, delta, weight, 1e-5, out=normed)
    if DEVICE == "cuda" or dtype != torch.bfloat16:  # the interpreter cuts bfloat16 off
        assert torch.equal(residual, total)
        exact = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
        theirs = (F.rms_norm(total, (size,), weight, 1e-5) - exact).norm()
        assert (normed - exact).norm() <= 1.05 * theirs + 1e-7 * exact.norm()
    gate_up = torch.randn(33, 2 * size, device=DEVICE).to(dtype)
    gated = torch.empty(33, size, device=DEVICE, dtype=dtype)
    kernels.silu_mul(gate_up, out=gated)
    gate, up = gate_up.chunk(2, dim=1)
    exact = F.silu(gate.double()) * up.double()
    if DEVICE == "cuda" or dtype != torch.bfloat16:
        assert (gated - exact).norm() <= (F.silu(gate) * up - exact).norm() + 1e-7 * exact.norm()


SEGMENTS = {
    "odd": [40, 1, 1, 9, 170, 16, 16, 33],
    "one": [5],
    "whole_blocks": [64, 128, 64],
    "single_patches": [1] * 70,
}


@needs_kernels
@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_attention_stays_inside_a_segment(segments, padding):
    lengths = SEGMENTS[segments] + ([padding] if padding else [])
    # Empty segments at the end, as a graph has them.
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0)
    patches, qkv = sum(lengths), torch.randn(sum(lengths), 3, 2, 32, device=DEVICE).half()
    frame_sizes = torch.ones(2, len(ends) - 1, dtype=torch.int32, device=DEVICE)
    places = kernels.patch_places(ends.to(DEVICE, torch.int32), frame_sizes, patches)
    own = torch.tensor(lengths)
    bounds = torch.stack([ends[: len(own)], ends[1 : len(own) + 1]]).repeat_interleave(own, 1)
    assert torch.equal(places[:2].cpu().long(), bounds)
    ours = kernels.segment_attention(*qkv.unbind(1), places)
    parts = zip(*(x.double().transpose(0, 1).split(lengths, dim=1) for x in qkv.unbind(1)), strict=True)
    exact = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1).transpose(0, 1)
    assert (ours - exact).norm() < 1e-3 * exact.norm()

    poisoned = len(lengths) // 2
    stranger = torch.arange(len(lengths)).repeat_interleave(own).to(DEVICE) == poisoned
    qkv[stranger] = float("nan")
    assert torch.equal(kernels.segment_attention(*qkv.unbind(1), places)[~stranger], ours[~stranger])


@needs_kernels
@pytest.mark.parametrize("merge_temporal", [False, True])
def test_places_and_positions_are_those_of_the_plain_model(merge_temporal):
    """With segments of padding behind, whose frames are of stale sizes."""
    grid_thw = torch.tensor([(1, h, w) for h, w in ODD_GRIDS] + [(3, 2, 5), (2, 5, 3), (1, 16, 16), (1, 40, 7)])
    for kind in ({"is_native": True}, {"is_native": False, "image_size": 224}):
        packed = packing_model(reference_model(**kind), merge_temporal=merge_temporal).to(DEVICE)
        layout = packed_layout(grid_thw, packed.config)
        full = with_positions(layout, packed.config)
        own = int(layout.cu_seqlens[-1])
        patches = own + 9
        cu_seqlens = F.pad(layout.cu_seqlens, (0, 2), value=patches).to(DEVICE)
        places = kernels.patch_places(cu_seqlens, F.pad(layout.frame_sizes, (0, 2), value=7).to(DEVICE), patches)
        full = full._replace(
            **{name: value.to(DEVICE) for name, value in full._asdict().items() if isinstance(value, torch.Tensor)}
        )
        with torch.no_grad():
            if packed.config.is_native:
                assert torch.equal(places[2:4, :own].T.long(), full.position_ids)
                table = hub_module("layout").sincos(torch.arange(64, device=DEVICE), packed.config.hidden_size // 4)
                ours = kernels.native_positions(places, table.float())
                assert torch.equal(ours[:own], packed.embeddings.native_positions(full))
            else:
                ours = kernels.learned_positions(places, packed.embeddings.position_embedding.weight)
                assert (ours[:own] - packed.embeddings.learned_positions(full)).abs().max() < 1e-6
            assert ours.isfinite().all()


# On a GPU


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "grids", [MIXED, [(16, 16)] * 4, [(16, 16)], [(32, 32)] * 3], ids=lambda grids: str(len(grids))
)
def test_features_are_as_close_to_float32_as_the_original(grids, dtype):
    """AIMv2-L at full depth, without a graph and with one."""
    exact_reference = reference_model(**LARGE).cuda()
    images = [image.cuda() for image in random_images(grids)]
    reference = copy.deepcopy(exact_reference).to(dtype)
    with torch.inference_mode():
        exact = torch.cat([exact_reference(image[None]).last_hidden_state[0] for image in images])
        theirs = torch.cat([reference(image[None].to(dtype)).last_hidden_state[0] for image in images])
    packed = packing_model(reference).cuda()
    for times in (1, 4):
        assert distance(features(packed, pack(images), times), exact) <= 1.05 * distance(theirs, exact)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_plain_model(variant, dtype):
    exact = packing_model(reference_model(**VARIANTS[variant])).cuda()
    packed = copy.deepcopy(exact).to(dtype)
    # Enough patches for the two errors to be comparable.
    for grids in (MIXED, [(5, 7)] * 100, [(7, 30), (30, 7)]):
        inputs = inputs_of(grids)
        want = plain_features(exact, inputs)
        theirs = distance(plain_features(packed, inputs), want)
        for times in (1, 4):
            assert distance(features(packed, inputs, times), want) <= 1.1 * theirs + 1e-5


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_graph_gives_the_bits_of_its_padded_layout_whatever_its_padding_holds(dtype):
    packed = packing_model(reference_model(dtype)).cuda()
    inputs = inputs_of(MIXED)
    own = len(inputs["hidden_states"])
    ours = features(packed, inputs, times=3)
    engine = engine_of(packed)
    (graph,) = engine.graphs.values()
    budget = graph.budget
    with torch.inference_mode():
        places = kernels.patch_places(graph.cu_seqlens, graph.frame_sizes, budget.patches)
        attend = engine.attention(graph.cu_seqlens, places, budget.longest, budget.length)
        positions = engine.position_embeddings(places, budget.side)
        padded = engine.forward(graph.buffers, positions, attend)[:own].clone()
        assert torch.equal(ours, padded)
        graph.buffers.patches[own:, :588].fill_(float("nan"))
        graph.graph.replay()
        assert torch.equal(graph.output[:own], ours)
    assert budget.patches > own


@gpu
def test_the_same_patches_divided_otherwise_share_a_graph():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    inputs = inputs_of([(8, 9), (3, 4), (20, 10)])
    features(packed, inputs, times=3)
    for grids in ([(3, 4), (20, 10), (8, 9)], [(1, 284)], [(1, 1)] * 284):
        other = {**inputs, "grid_thw": torch.tensor([(1, height, width) for height, width in grids])}
        ours, theirs = features(packed, other), plain_features(packed, other)
        assert distance(ours, theirs.float()) < 0.02
    assert len(engine_of(packed).graphs) <= 2


@gpu
@pytest.mark.parametrize(
    "grids", [ODD_GRIDS, [(10, 10)] * 12, [(32, 32)] * 3, MIXED], ids=lambda grids: str(len(grids))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_neighbour_leaves_no_trace_and_none_for_the_next_batch(poison, dtype, grids):
    packed = packing_model(reference_model(dtype)).cuda()
    images = random_images(grids)
    clean = features(packed, inputs := inputs_of_images(images), times=5)
    images[2] = torch.full_like(images[2], poison)
    others = (torch.arange(len(images)) != 2).repeat_interleave(inputs["grid_thw"].prod(1)).cuda()
    assert torch.equal(features(packed, inputs_of_images(images))[others], clean[others])
    assert torch.equal(features(packed, inputs), clean)


def inputs_of_images(images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = pack(images)
    return {**inputs, "hidden_states": inputs["hidden_states"].to(DEVICE)}


@gpu
@pytest.mark.parametrize("merge", [True, False])
def test_weights_changed_in_place_moved_or_replaced_are_seen(merge):
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    cuda_engine.configure(packed, merge_weights=merge)
    inputs = inputs_of(ODD_GRIDS)

    def is_followed() -> bool:
        return distance(features(packed, inputs), plain_features(packed, inputs).float()) < 0.02

    features(packed, inputs, times=3)
    layer = packed.encoder.layers[1]
    for weight in (layer.attention.k_proj.weight, layer.ffn.gate_proj.weight, layer.ffn.down_proj.weight):
        before = features(packed, inputs)
        with torch.no_grad():
            weight.mul_(-2)
        assert is_followed() and not torch.equal(features(packed, inputs), before)
    layer.attention.v_proj.weight = torch.nn.Parameter(torch.randn_like(layer.attention.v_proj.weight))
    assert is_followed()
    packed.cpu().cuda()
    assert is_followed()
    packed.load_state_dict(packing_model(reference_model(torch.bfloat16)).state_dict())
    assert is_followed()
    layer.attention.q_proj.weight.data.mul_(-2)
    cuda_engine.refresh(packed)
    assert is_followed()
    assert distance(features(packed, inputs, times=3), plain_features(packed, inputs).float()) < 0.02


@gpu
def test_what_was_started_is_dropped_where_something_speaks_against_it():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    inputs = inputs_of(ODD_GRIDS)
    before = features(packed, inputs, times=4)
    handle = packed.encoder.layers[0].register_forward_hook(lambda module, args, output: output * 3)
    with torch.inference_mode():
        hooked = packed(**inputs).last_hidden_state
        assert packed.last_engine is None
        states = packed(**inputs, output_hidden_states=True).hidden_states
        assert torch.equal(packed.rms_norm(states[-1]), hooked)
    handle.remove()
    assert torch.equal(features(packed, inputs), before)


@gpu
def test_five_hundred_mixes_keep_memory_bounded_and_outputs_apart():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    cuda_engine.configure(packed, max_graphs=8)
    kept = []
    for index, mix in enumerate(random_mixes(500)):
        inputs = {**mix, "hidden_states": mix["hidden_states"].cuda()}
        ours = features(packed, inputs)
        if index % 50 == 0:
            kept.append((inputs, ours, ours.clone()))
        if index == 300:
            torch.cuda.synchronize()
            reserved = torch.cuda.memory_reserved()
    assert all(torch.equal(ours, then) for _, ours, then in kept)
    assert all(distance(ours, plain_features(packed, inputs).float()) < 0.02 for inputs, ours, _ in kept)
    assert len(engine_of(packed).graphs) <= 8
    assert torch.cuda.memory_reserved() <= reserved + (32 << 20)


@gpu
def test_threads_on_streams_of_their_own_get_their_own_features():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    batches = [{**mix, "hidden_states": mix["hidden_states"].cuda()} for mix in random_mixes(8)]
    expected = [features(packed, batch, times=3) for batch in batches]
    wrong: list[int] = []

    def run(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for index in [*range(first, 8), *range(first)] * 10:
                if not torch.equal(features(packed, batches[index]), expected[index]):
                    wrong.append(index)

    cuda_engine.release(packed)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_a_caller_captures_a_graph_of_its_own():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    inputs = inputs_of([(5, 7)] * 3)
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)
    given = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in layout._asdict().items()}
    expected = features(packed, inputs, times=3)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        plain_features(packed, inputs)
        with torch.cuda.graph(graph):
            ours = packed(inputs["hidden_states"], **given).last_hidden_state
        assert "captures" in packed.engine_refusal
        graph.replay()
    assert distance(ours, expected.float()) < 0.02


@gpu
def test_graphs_can_be_captured_ahead_bounded_and_done_without():
    packed = packing_model(reference_model(torch.bfloat16)).cuda()
    inputs = inputs_of(ODD_GRIDS)
    cuda_engine.capture(packed, [height * width for height, width in ODD_GRIDS])
    assert len(engine_of(packed).graphs) == 1
    with_graph = features(packed, inputs)
    assert len(engine_of(packed).graphs) == 1
    cuda_engine.configure(packed, max_graph_patches=0)
    without = features(packed, inputs, times=3)
    assert not engine_of(packed).graphs
    assert distance(with_graph, without.float()) < 0.02


@gpu
def test_released_models_hold_no_more_memory_than_before():
    packed = packing_model(reference_model(torch.bfloat16, **{**LARGE, "num_hidden_layers": 2})).cuda()
    inputs = inputs_of(MIXED)
    plain_features(packed, inputs)
    before = torch.cuda.memory_allocated()
    features(packed, inputs, times=3)
    assert torch.cuda.memory_allocated() > before
    cuda_engine.release(packed)
    assert torch.cuda.memory_allocated() <= before
    features(packed, inputs, times=3)
    duplicate = copy.deepcopy(packed)
    assert torch.equal(features(duplicate, inputs, times=3), features(packed, inputs))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_segments_than_a_grid_holds(dtype):
    packed = packing_model(reference_model(dtype, num_hidden_layers=1)).cuda()
    patches = torch.randn(70_012, 588, device="cuda")
    grid_thw = torch.tensor([(1, 1, 1)] * 70_000 + [(1, 2, 2)] * 3)
    ours = features(packed, {"hidden_states": patches, "grid_thw": grid_thw})
    last = features(packed, {"hidden_states": patches[-112:], "grid_thw": grid_thw[-103:]})
    assert distance(ours[-112:], last.float()) < 0.01


@gpu
def test_a_model_in_training_takes_the_plain_path():
    packed = packing_model(reference_model(torch.bfloat16)).cuda().train()
    packed(**inputs_of(ODD_GRIDS)).last_hidden_state.float().square().mean().backward()
    assert packed.last_engine is None
    assert all(parameter.grad is not None for parameter in packed.parameters())
