# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine: features of the plain model or closer to float32, from kernels, merged products and graphs."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cuda_models import (
    DEVICE,
    HALF,
    LARGE,
    VARIANTS,
    accelerated,
    cuda_engine,
    cuda_graphs,
    distance,
    engine_of,
    features,
    gpu,
    graphs_of,
    inputs_of,
    interpreted_loops,
    kernels,
    model_of,
    needs_kernels,
    on_device,
    plain_features,
)
from reference import (
    ODD_GRIDS,
    pack,
    packed_layout,
    packing_model,
    random_images,
    random_mixes,
    reference_model,
    with_positions,
)

from conversion.local_code import hub_module


MIXED = [*ODD_GRIDS, (16, 16), (16, 16), (40, 30), (64, 64)]


@pytest.fixture(autouse=True)
def loops():
    with interpreted_loops():
        yield


# What needs no GPU


def refusal_of(packed) -> str | None:
    state = accelerated.ModelState(packed)
    layout = packed_layout(torch.tensor([(1, 4, 5)]), packed.config)
    return cuda_engine.refusal(packed, torch.zeros(20, 588), layout, state)


def test_without_triton_or_cuda_the_engine_says_so(monkeypatch):
    packed = packing_model(reference_model())
    monkeypatch.setattr(cuda_engine, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert "Triton is not installed" in refusal_of(packed)
    monkeypatch.setattr(cuda_engine, "triton", object())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this PyTorch is not built for CUDA" in refusal_of(packed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda packed: packed.set_attn_implementation("eager"), "the attention implementation is eager"),
        (lambda packed: setattr(packed.encoder.layers[1].ffn, "act_fn", torch.nn.GELU()), "the activation is GELU"),
        (lambda packed: packed.double(), "the weights are torch.float64"),
        (lambda packed: setattr(packed.encoder, "layers", torch.nn.ModuleList()), "the model has no layers"),
        (lambda packed: setattr(packed.encoder.layers[0].attention, "head_dim", 4), "heads of size 4"),
    ],
    ids=["attention", "activation", "dtype", "layers", "heads"],
)
def test_what_it_does_not_compute_is_refused(monkeypatch, change, reason):
    packed = packing_model(reference_model())
    monkeypatch.setattr(cuda_engine, "triton", object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    change(packed)
    assert reason in refusal_of(packed)


def test_heads_are_those_that_the_layers_were_made_with():
    packed = packing_model(reference_model(num_attention_heads=2))
    packed.config.num_attention_heads = 4
    assert cuda_engine.Engine(packed, list(packed.parameters())).head_dim == 32


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_graphs_of_no_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="`lengths` must hold"):
        packing_model(reference_model()).capture_cuda_graphs(lengths)


@pytest.mark.skipif(DEVICE == "cuda", reason="for a model that is not on a GPU")
def test_graphs_of_a_model_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="No CUDA graph can be captured: the weights are on cpu"):
        packing_model(reference_model()).capture_cuda_graphs([256])


def test_padded_sizes_recur_and_cost_little():
    sizes = [cuda_engine.padded_size(patches) for patches in range(1, cuda_engine.PATCHES_PER_PRODUCT + 1)]
    assert all(patches <= size for patches, size in enumerate(sizes, start=1))
    assert all(size - patches < max(64, size / 16) for patches, size in enumerate(sizes, start=1))
    assert all(cuda_engine.padded_size(size) == size for size in set(sizes))
    # The rest of a batch that runs in pieces is of one of these sizes, too.
    rests = {cuda_engine.padded_size(patches) % cuda_engine.PATCHES_PER_PRODUCT for patches in range(20481, 50000)}
    assert rests - {0} <= set(sizes)
    assert len({size for size in sizes if 4096 < size <= 8192}) == 16
    assert len(set(sizes)) < 128


def torch_add_rms_norm(residual, delta, weight, eps, out):
    if delta is not None:
        residual += delta
    out.copy_(F.rms_norm(residual, residual.shape[1:], weight, eps))


def torch_silu_mul(gate_up, out):
    gate, up = gate_up.chunk(2, dim=1)
    out.copy_(F.silu(gate) * up)


def torch_locate_patches(segments, patches, has_frames):
    return torch.empty(6, patches)


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
def test_products_and_what_lies_between_them_are_the_models(monkeypatch, patch_layout, variant, side_by_side):
    """The engine's own forward in float32, its kernels replaced by PyTorch's operations, in pieces of few patches."""
    monkeypatch.setattr(cuda_engine, "add_rms_norm", torch_add_rms_norm)
    monkeypatch.setattr(cuda_engine, "silu_mul", torch_silu_mul)
    monkeypatch.setattr(cuda_engine, "locate_patches", torch_locate_patches)
    monkeypatch.setattr(cuda_engine, "PATCHES_PER_PRODUCT", 96)
    packed = packing_model(reference_model(**VARIANTS[variant]), patch_layout=patch_layout)
    inputs = pack(random_images(ODD_GRIDS))
    layout = packed_layout(inputs["grid_thw"], packed.config)
    for parameters in cuda_engine.merged_parameters(packed) if side_by_side else ():
        assert cuda_graphs.lay_side_by_side(parameters) is None
    engine = cuda_engine.Engine(packed, list(packed.parameters()))
    full = with_positions(layout, packed.config)

    def positions(inputs, located, out):
        embeddings = packed.embeddings
        known = embeddings.native_positions if packed.config.is_native else embeddings.learned_positions
        out.zero_()[: len(inputs.patches_given)] = known(full)

    def attend(module, qkv):
        segments = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in qkv.unbind(1)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=1).transpose(0, 1)

    monkeypatch.setattr(engine, "positions", positions)
    monkeypatch.setattr(engine, "attention", lambda inputs, located, lengths: attend)
    own = len(inputs["hidden_states"])
    budget = engine.budget_of((own, 10, 143), True, (0, 1), True, same_bits=True)
    lengths = [*layout.lengths, budget.patches - own]
    with torch.inference_mode():
        graph_inputs = cuda_engine.Inputs(budget, engine.new_buffers(budget.patches), packed.config.is_native)
        graph_inputs.patches_given = inputs["hidden_states"]
        graph_inputs.load(inputs["hidden_states"], layout)
        states, ours = engine.run(graph_inputs)
        expected = packed(**inputs, output_hidden_states=True)
    for state, theirs in zip((*states, ours), (*expected.hidden_states[:2], expected.last_hidden_state), strict=True):
        assert (state[:own] - theirs).abs().max() < 1e-5


def test_only_the_blocks_that_are_needed_run(monkeypatch):
    monkeypatch.setattr(cuda_engine, "add_rms_norm", torch_add_rms_norm)
    monkeypatch.setattr(cuda_engine, "locate_patches", torch_locate_patches)
    calls = []
    monkeypatch.setattr(cuda_engine, "silu_mul", lambda gate_up, out: calls.append(torch_silu_mul(gate_up, out)))
    packed = packing_model(reference_model(num_hidden_layers=4))
    engine = cuda_engine.Engine(packed, list(packed.parameters()))
    monkeypatch.setattr(engine, "positions", lambda inputs, located, out: out.zero_())
    monkeypatch.setattr(engine, "attention", lambda *args: lambda module, qkv: qkv[:, 2])
    for depths, last, blocks in [((0,), False, 0), ((1, 3), False, 3), ((), True, 4), ((2,), True, 4), ((), False, 0)]:
        calls.clear()
        budget = engine.budget_of((20, 1, 20), True, depths, last, same_bits=True)
        with torch.inference_mode():
            states, _ = engine.run(cuda_engine.Inputs(budget, engine.new_buffers(64), True))
        assert len(states) == len(depths) and len(calls) == blocks


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: setattr(packed.encoder.layers[0].rms_norm2, "eps", 1e-3),
        lambda packed: setattr(packed.config, "patch_layout", "channels_last"),
        lambda packed: setattr(packed.config, "_attn_implementation", "flash_attention_2"),
        lambda packed: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["eps", "patch_layout", "attention", "precision"],
)
def test_a_graph_is_not_that_of_other_numbers(change):
    packed = packing_model(reference_model())
    engine = cuda_engine.Engine(packed, list(packed.parameters()))
    engine.has_own_attention = True

    def budget():
        return engine.budget_of((20, 1, 20), True, (), True, same_bits=True)

    before, precision = budget(), torch.get_float32_matmul_precision()
    assert budget() == before
    try:
        change(packed)
        assert budget() != before
    finally:
        torch.set_float32_matmul_precision(precision)


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


def segments_of(cu_seqlens: torch.Tensor, frame_sizes: torch.Tensor | None = None) -> torch.Tensor:
    """What `locate_patches` reads, with values behind that it must not."""
    parts = [torch.tensor([len(cu_seqlens) - 1]), cu_seqlens, torch.full((9,), 7)]
    if frame_sizes is not None:
        parts.insert(2, frame_sizes.flatten())
    return torch.cat(parts).to(DEVICE, torch.int32)


@needs_kernels
@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_attention_stays_inside_a_segment(segments, padding):
    lengths = SEGMENTS[segments]
    # Empty segments at the end are of no matter; padding is a segment of its own.
    ends = torch.tensor([0, *lengths, 0, 0]).cumsum(0)
    patches = sum(lengths) + padding
    qkv = torch.randn(patches, 3, 2, 32, device=DEVICE).half()
    located = kernels.locate_patches(segments_of(ends), patches, has_frames=False)
    lengths = lengths + [padding] * (padding > 0)
    own = torch.tensor(lengths)
    bounds = torch.stack([own.cumsum(0) - own, own.cumsum(0)]).repeat_interleave(own, 1)
    assert torch.equal(located[:2].cpu().long(), bounds)

    def attended() -> torch.Tensor:
        out = torch.full((patches, 2, 32), float("nan"), device=DEVICE, dtype=torch.half)
        return kernels.segment_attention(qkv, located, out)

    ours = attended()
    parts = zip(*(x.double().transpose(0, 1).split(lengths, dim=1) for x in qkv.unbind(1)), strict=True)
    exact = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1).transpose(0, 1)
    assert (ours - exact).norm() < 1e-3 * exact.norm()

    poisoned = len(lengths) // 2
    stranger = torch.arange(len(lengths)).repeat_interleave(own).to(DEVICE) == poisoned
    qkv[stranger] = float("nan")
    assert torch.equal(attended()[~stranger], ours[~stranger])


@needs_kernels
@pytest.mark.parametrize("merge_temporal", [False, True])
def test_positions_are_those_of_the_plain_model(merge_temporal):
    """From the sizes of frames, with padding behind; and from positions that were given."""
    grid_thw = torch.tensor([(1, h, w) for h, w in ODD_GRIDS] + [(3, 2, 5), (2, 5, 3), (1, 16, 16), (1, 40, 7)])
    for kind in ({"is_native": True}, {"is_native": False, "image_size": 224}):
        packed = packing_model(reference_model(**kind), merge_temporal=merge_temporal)
        layout = packed_layout(grid_thw, packed.config)
        full = with_positions(layout, packed.config)
        own = int(layout.cu_seqlens[-1])
        patches = own + 9
        located = kernels.locate_patches(segments_of(layout.cu_seqlens, layout.frame_sizes), patches, has_frames=True)
        frequencies = 10000 ** -(torch.arange(16, dtype=torch.float64, device=DEVICE) / 16)
        ours, given = torch.full((2, patches, 64), float("nan"), device=DEVICE)
        with torch.no_grad():
            if packed.config.is_native:
                assert torch.equal(located[2:4, :own].T.cpu().long(), full.position_ids)
                kernels.native_positions(located[2], located[3], frequencies, ours)
                rows, columns = full.position_ids.to(DEVICE).unbind(1)
                kernels.native_positions(rows, columns, frequencies, given[:own])
                expected = packed.embeddings.native_positions(full)
            else:
                table = packed.embeddings.position_embedding.weight.to(DEVICE)
                kernels.learned_positions(located, (), table, ours)
                indices, weights = full.interp_indices.to(DEVICE), full.interp_weights.to(DEVICE)
                kernels.learned_positions(located, (indices, weights), table, given[:own])
                expected = packed.embeddings.learned_positions(full)
        assert (ours[:own].cpu() - expected).abs().max() < 1e-6
        assert (given[:own].cpu() - expected).abs().max() < 1e-6
        assert ours.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_native_positions_are_rounded_as_the_plain_models(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off")
    ids = torch.stack([torch.arange(0, 4000, 7), torch.arange(0, 4000, 7).flip(0)], dim=1)
    frequencies = 10000 ** -(torch.arange(16, dtype=torch.float64, device=DEVICE) / 16)
    ours = torch.empty(len(ids), 64, device=DEVICE, dtype=dtype)
    kernels.native_positions(*ids.to(DEVICE).unbind(1), frequencies, ours)
    expected = hub_module("layout").sincos(ids.to(DEVICE).flip(1), 16).flatten(1)
    assert torch.equal(ours, expected.to(dtype))


@needs_kernels
def test_a_position_outside_the_table_is_nan():
    table = torch.randn(16, 64, device=DEVICE)
    indices = torch.zeros(3, 16, dtype=torch.int64, device=DEVICE)
    indices[1, 3], indices[2, 5] = 16, -1
    out = torch.zeros(3, 64, device=DEVICE)
    located = torch.zeros(6, 3, dtype=torch.int32, device=DEVICE)
    kernels.learned_positions(located, (indices, torch.ones(3, 16, device=DEVICE)), table, out)
    assert out[0].isfinite().all() and out[1:].isnan().all()


# On a GPU


@gpu
@pytest.mark.parametrize(("dtype", "is_native"), [(torch.bfloat16, True), (torch.float16, False)])
def test_small_models_run_without_and_with_graphs(dtype, is_native):
    """Every kernel in little time: for compute-sanitizer, docs/kernels.md."""
    packed = model_of(dtype, num_hidden_layers=1, is_native=is_native)
    inputs = inputs_of([(1, 1), (9, 13), (3, 3), (16, 16)])
    assert torch.equal(features(packed, inputs, times=1), features(packed, inputs, times=3))


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "grids", [MIXED, [(16, 16)] * 4, [(16, 16)], [(32, 32)] * 3], ids=lambda grids: str(len(grids))
)
def test_features_are_as_close_to_float32_as_the_original(grids, dtype):
    """AIMv2-L at full depth, without a graph and with one."""
    with torch.device("cuda"):
        exact_reference = reference_model(**LARGE)
        reference = copy.deepcopy(exact_reference).to(dtype)
        packed = packing_model(reference)
    images = [image.cuda() for image in random_images(grids)]
    with torch.inference_mode():
        exact = torch.cat([exact_reference(image[None]).last_hidden_state[0] for image in images])
        theirs = torch.cat([reference(image[None].to(dtype)).last_hidden_state[0] for image in images])
    for times in (1, 4):
        assert distance(features(packed, pack(images), times), exact) <= 1.05 * distance(theirs, exact)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_plain_model(variant, dtype):
    exact = model_of(**VARIANTS[variant])
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
    packed = model_of(dtype)
    inputs = inputs_of(MIXED)
    own = len(inputs["hidden_states"])
    ours = features(packed, inputs, times=3)
    engine, (graph,) = engine_of(packed), graphs_of(packed)
    budget, buffers = graph.inputs.budget, graph.inputs.buffers
    with torch.inference_mode():
        buffers.patches[:own, :588] = inputs["hidden_states"]
        padded = engine.run(graph.inputs)[1][:own].clone()
        assert torch.equal(ours, padded)
        buffers.patches[own:, :588].fill_(float("nan"))
        graph.graph.replay()
        assert torch.equal(graph.outputs[1][:own], ours)
    assert budget.patches > own


@gpu
def test_the_same_patches_divided_otherwise_share_a_graph():
    packed = model_of(torch.bfloat16)
    inputs = inputs_of([(8, 9), (3, 4), (20, 10)])
    features(packed, inputs, times=3)
    for grids in ([(3, 4), (20, 10), (8, 9)], [(1, 284)], [(1, 1)] * 284):
        other = {**inputs, "grid_thw": torch.tensor([(1, height, width) for height, width in grids])}
        ours, theirs = features(packed, other), plain_features(packed, other)
        assert distance(ours, theirs) < 0.02
    assert len(graphs_of(packed)) <= 2


@gpu
@pytest.mark.parametrize(
    "grids", [ODD_GRIDS, [(10, 10)] * 12, [(32, 32)] * 3, MIXED], ids=lambda grids: str(len(grids))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_neighbour_leaves_no_trace_and_none_for_the_next_batch(poison, dtype, grids):
    packed = model_of(dtype)
    images = random_images(grids)
    clean = features(packed, inputs := on_device(pack(images)), times=5)
    images[2] = torch.full_like(images[2], poison)
    others = (torch.arange(len(images)) != 2).repeat_interleave(inputs["grid_thw"].prod(1)).cuda()
    assert torch.equal(features(packed, on_device(pack(images)))[others], clean[others])
    assert torch.equal(features(packed, inputs), clean)


@gpu
def test_five_hundred_mixes_keep_memory_bounded_and_outputs_apart():
    packed = model_of(torch.bfloat16)
    packed.cuda_graph_settings = replace(packed.cuda_graph_settings, max_graphs=8)
    kept = []
    for index, mix in enumerate(random_mixes(500)):
        inputs = on_device(mix)
        ours = features(packed, inputs)
        if index % 50 == 0:
            kept.append((inputs, ours, ours.clone()))
        if index == 300:
            torch.cuda.synchronize()
            reserved = torch.cuda.memory_reserved()
    assert all(torch.equal(ours, then) for _, ours, then in kept)
    assert all(distance(ours, plain_features(packed, inputs)) < 0.02 for inputs, ours, _ in kept)
    assert len(graphs_of(packed)) <= 8
    assert torch.cuda.memory_reserved() <= reserved + (32 << 20)


@gpu
def test_threads_on_streams_of_their_own_get_their_own_features():
    """Of two models, whose graphs share memory."""
    models = [model_of(torch.bfloat16), model_of(torch.bfloat16)]
    batches = [on_device(mix) for mix in random_mixes(8)]
    expected = [[features(packed, batch, times=3) for batch in batches] for packed in models]
    wrong: list[int] = []

    def run(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for index in [*range(first, 8), *range(first)] * 10:
                for packed, own in zip(models, expected, strict=True):
                    if not torch.equal(features(packed, batches[index]), own[index]):
                        wrong.append(index)

    for packed in models:
        packed.release_cuda_graphs()
    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_a_caller_captures_a_graph_of_its_own():
    packed = model_of(torch.bfloat16)
    inputs = inputs_of([(5, 7)] * 3)
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config).to("cuda")
    expected = features(packed, inputs, times=3)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        plain_features(packed, inputs)
        with torch.cuda.graph(graph):
            ours = packed(inputs["hidden_states"], layout=layout).last_hidden_state
        assert packed.last_engine is None and "captures" in packed.engine_refusal
        graph.replay()
    assert distance(ours, expected) < 0.02


@gpu
def test_graphs_can_be_captured_before_bounded_and_done_without():
    packed = model_of(torch.bfloat16)
    inputs = inputs_of(ODD_GRIDS)
    packed.capture_cuda_graphs([height * width for height, width in ODD_GRIDS])
    assert len(graphs_of(packed)) == 1
    with_graph = features(packed, inputs)
    assert len(graphs_of(packed)) == 1
    packed.release_cuda_graphs()
    packed.cuda_graph_settings = replace(packed.cuda_graph_settings, max_graph_patches=0)
    without = features(packed, inputs, times=3)
    assert not graphs_of(packed)
    assert distance(with_graph, without) < 0.02
    with pytest.raises(RuntimeError, match="max_graph_patches=0"):
        packed.capture_cuda_graphs([256])


@gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_layers_are_those_of_the_plain_model(variant, dtype):
    packed = model_of(dtype, num_hidden_layers=3, **VARIANTS[variant])
    inputs = inputs_of(MIXED)
    expected = packing_states(packed, inputs, engines=False)
    last = features(packed, inputs, times=3)
    for _ in range(3):
        ours = packing_states(packed, inputs, engines=True)
        assert packed.last_engine == "cuda"
        assert all(
            distance(own, theirs) < (0.02 if dtype != torch.float32 else 1e-5)
            for own, theirs in zip(*(ours, expected), strict=True)
        )
        assert torch.equal(ours[-1], last)
        layout = packed_layout(inputs["grid_thw"], packed.config)
        with torch.inference_mode():
            (state,), none = packed.encode(inputs["hidden_states"], layout, (2,), last=False)
        assert none is None and torch.equal(state, ours[2])
    assert len({state.data_ptr() for state in ours}) == len(ours)


def packing_states(packed, inputs, engines: bool) -> list[torch.Tensor]:
    """Hidden states of every layer, and the features."""
    packed.use_engines = engines
    with torch.inference_mode():
        outputs = packed(**inputs, output_hidden_states=True)
    packed.use_engines = True
    return [*outputs.hidden_states, outputs.last_hidden_state]


@gpu
@pytest.mark.parametrize("variant", ["native", "learned"])
def test_pruned_patches_run_in_graphs_that_serve_every_subset(variant):
    """Of each image a part of the patches, at their own positions."""
    packed = model_of(torch.bfloat16, **VARIANTS[variant])
    inputs = inputs_of([(16, 16), (9, 30), (20, 7)])
    full = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        masks = [torch.rand(length, generator=generator) < 0.5 for length in full.lengths]
        kept = torch.cat(masks)
        lengths = torch.tensor([0, *(int(mask.sum()) for mask in masks)])
        given = {"cu_seqlens": lengths.cumsum(0).to("cuda", torch.int32)}
        for name in ("position_ids", "interp_indices", "interp_weights"):
            value = getattr(full, name)
            given |= {} if value is None else {name: value[kept].cuda()}
        some = {"hidden_states": inputs["hidden_states"][kept.cuda()], **given}
        ours = features(packed, some, times=3)
        assert distance(ours, plain_features(packed, some)) < 0.02
    graphs = graphs_of(packed)
    assert len(graphs) <= 3 and not any(graph.inputs.budget.has_frames for graph in graphs)


@gpu
def test_segments_of_the_callers_own_run():
    packed = model_of(torch.bfloat16)
    inputs = inputs_of([(4, 5), (4, 5), (3, 6)])
    segments = {**inputs, "cu_seqlens": torch.tensor([0, 40, 58], dtype=torch.int32)}
    ours = features(packed, segments, times=3)
    assert distance(ours, plain_features(packed, segments)) < 0.02
    assert distance(ours, features(packed, inputs)) > 0.05


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_segments_than_a_grid_holds(dtype):
    packed = model_of(dtype, num_hidden_layers=1)
    patches = torch.randn(70_012, 588, device="cuda")
    grid_thw = torch.tensor([(1, 1, 1)] * 70_000 + [(1, 2, 2)] * 3)
    ours = features(packed, {"hidden_states": patches, "grid_thw": grid_thw})
    last = features(packed, {"hidden_states": patches[-112:], "grid_thw": grid_thw[-103:]})
    assert distance(ours[-112:], last) < 0.01


@gpu
def test_a_pruned_layer_has_its_own_sizes():
    packed = model_of(torch.bfloat16)
    ffn, attention = packed.encoder.layers[1].ffn, packed.encoder.layers[1].attention
    for linear, rows in (
        (ffn.gate_proj, 48),
        (ffn.up_proj, 48),
        *((attention.get_submodule(f"{x}_proj"), 32) for x in "qkv"),
    ):
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:rows].clone())
    for linear, columns in ((ffn.down_proj, 48), (attention.out_proj, 32)):
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:, :columns].clone())
    inputs = inputs_of(MIXED)
    assert distance(features(packed, inputs, times=3), plain_features(packed, inputs)) < 0.02


@gpu
def test_a_model_in_training_takes_the_plain_path():
    packed = model_of(torch.bfloat16).train()
    packed(**inputs_of(ODD_GRIDS)).last_hidden_state.float().square().mean().backward()
    assert packed.last_engine is None
    assert all(parameter.grad is not None for parameter in packed.parameters())
