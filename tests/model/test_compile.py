# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` and `torch.export`: equal outputs, and how often the encoder compiles."""

import dataclasses
import importlib

import pytest
import torch
import torch._dynamo.testing
import transformers
from packaging.version import Version
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_compiled_model_gives_the_same(attn):
    packed = packing_model(reference_model(use_head=True), attn=attn)
    compiled = torch.compile(packed, backend="aot_eager")
    for grids in (ODD_GRIDS, ODD_GRIDS[:3]):
        inputs = pack(random_images(grids))
        with torch.no_grad():
            ours, expected = compiled(**inputs), packed(**inputs)
        assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
        assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5


def test_the_varlen_path_compiles_whole_and_at_most_twice(monkeypatch):
    """One graph serves every mix; PyTorch's kernel, which needs a GPU, is replaced by one of the same signature."""
    packed = packing_model(reference_model())

    def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return query + key * cu_seqlens_q[-1] + value * max_seqlen_k

    monkeypatch.setattr(hub_module("modeling"), "has_varlen_kernel", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(hub_module("modeling"), "varlen_attention", varlen_attention)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    encoder = torch.compile(packed.encoder, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for inputs in random_mixes(20):
            layout = dataclasses.replace(packed_layout(inputs["grid_thw"], packed.config), runs=None)
            embedded = packed.embeddings(inputs["hidden_states"], layout)
            ours = encoder(embedded, layout).last_hidden_state
            expected = packed.encoder(embedded, layout).last_hidden_state
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert counter.frame_count <= 2


def test_the_question_for_the_varlen_kernel_compiles(monkeypatch):
    """What it asks torch for on a GPU is no part of a program."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    has_varlen_kernel = hub_module("modeling").has_varlen_kernel

    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + has_varlen_kernel(torch.device("cuda"), torch.bfloat16, 64)

    assert torch.compile(asked, fullgraph=True, dynamic=True, backend="eager")(torch.ones(1)).item() == 2


def test_compiled_layers_serve_every_mix_with_two_programs(monkeypatch):
    """One for images of different sizes and one for those of one size, forward and backward."""
    modeling = hub_module("modeling")
    monkeypatch.setattr(modeling, "has_varlen_kernel", lambda device, dtype, head_dim: True)

    def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return query + key * cu_seqlens_q[-1] + value * max_seqlen_k

    monkeypatch.setattr(modeling, "varlen_attention", varlen_attention)
    packed = packing_model(reference_model(num_hidden_layers=3)).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in packed.encoder.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=counter)
    of_one_size = [pack(random_images([size] * count)) for size, count in (((4, 4), 3), ((2, 7), 5), ((3, 3), 9))]
    for inputs in [*random_mixes(12), *of_one_size]:
        packed(**inputs).last_hidden_state.square().sum().backward()
    programs = [graph for graph in counter.graphs if any(node.op == "call_function" for node in graph.graph.nodes)]
    assert len(programs) == 2


MODELS = {"native": {"use_head": True}, "learned": {"use_head": True, "is_native": False}}


def computed_ahead(packed, grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layout, as transformers' exporters would give them."""
    tensors = with_positions(packed_layout(grid_thw, packed.config), packed.config).tensors()
    return {name: value for name, value in tensors.items() if name != "frame_sizes"}


class Explicit(torch.nn.Module):
    """`torch.export` describes the shapes of positional arguments; a `**kwargs` it cannot name."""

    def __init__(self, packed, names: list[str]):
        super().__init__()
        self.packed, self.names = packed, names

    def forward(self, *values):
        outputs = self.packed(**dict(zip(self.names, values, strict=True)))
        return outputs.last_hidden_state, outputs.pooler_output


def one_size(packed, count: int) -> dict[str, torch.Tensor]:
    inputs = pack(random_images([(4, 5)] * count))
    return inputs | computed_ahead(packed, inputs["grid_thw"])


@pytest.mark.parametrize("name", MODELS)
def test_the_model_exports_for_any_number_of_images_of_one_size(name):
    packed = packing_model(reference_model(**MODELS[name]))
    given = one_size(packed, 3)
    any_number = {"values": ({0: torch.export.Dim.AUTO},) * len(given)}
    explicit = Explicit(packed, list(given))
    exported = torch.export.export(explicit, tuple(given.values()), dynamic_shapes=any_number).module()
    for count in (2, 5, 40):
        given = one_size(packed, count)
        with torch.no_grad():
            expected = packed(given["hidden_states"], given["grid_thw"])
            for ours, theirs in zip(exported(*given.values()), expected.to_tuple(), strict=True):
                assert (ours - theirs).abs().max() < 1e-5


def test_a_program_for_one_size_takes_no_memory_with_the_square_of_a_batch():
    packed = packing_model(reference_model(use_head=True))
    exported, given = export_values(packed, one_size(packed, 3)).module(), one_size(packed, 60)
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor))
            return result

    with torch.no_grad(), Allocations():
        exported(*given.values())
    assert max(sizes) < len(given["hidden_states"]) ** 2


def export_values(packed, given: dict[str, torch.Tensor]):
    """A program that takes the values by their names, of any number of patches and segments."""
    explicit, any_number = Explicit(packed, list(given)), {"values": ({0: torch.export.Dim.AUTO},) * len(given)}
    return torch.export.export(explicit, tuple(given.values()), dynamic_shapes=any_number)


def to_onnx(packed, given: dict[str, torch.Tensor], path):
    """The same in onnxruntime, as a function of the values to the outputs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    explicit, any_number = Explicit(packed, list(given)), {"values": ({0: torch.export.Dim.AUTO},) * len(given)}
    program = torch.onnx.export(
        explicit, tuple(given.values()), dynamo=True, dynamic_shapes=any_number, input_names=list(given), verbose=False
    )
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}
    return lambda given: session.run(None, {key: value.numpy() for key, value in given.items() if key in used})


def values_of(packed, grids) -> dict[str, torch.Tensor]:
    inputs = pack(random_images(grids))
    return {"hidden_states": inputs["hidden_states"], **computed_ahead(packed, inputs["grid_thw"])}


MIXED = [(2, 3), (3, 4), (4, 6)]


@pytest.mark.parametrize("name", MODELS)
def test_a_program_for_one_size_refuses_other_batches(name):
    """And so does one that was exported with them, as a trace by `torch.jit` does."""
    packed = packing_model(reference_model(**MODELS[name]))
    given, mixed = values_of(packed, [(4, 5)] * 3), values_of(packed, MIXED)
    exported = export_values(packed, given).module()
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="index out of range"):
        exported(*mixed.values())
    exported = export_values(packed, mixed).module()
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="index out of range"):
        exported(*mixed.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_for_one_size_refuses_other_batches():
    packed = packing_model(reference_model(use_head=True))
    given, mixed = values_of(packed, [(4, 5)] * 3), values_of(packed, MIXED)
    explicit = Explicit(packed, list(given))
    with torch.no_grad():
        traced = torch.jit.trace(explicit, tuple(given.values()))
        other = values_of(packed, [(4, 5)] * 3)
        for ours, expected in zip(traced(*other.values()), explicit(*other.values()), strict=True):
            assert (ours - expected).abs().max() < 1e-5
        with pytest.raises((IndexError, RuntimeError), match=r"index out of range|unflatten"):
            traced(*mixed.values())


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
def test_onnxruntime_refuses_mixed_sizes_in_a_model_for_one(tmp_path):
    packed = packing_model(reference_model(use_head=True))
    run = to_onnx(packed, values_of(packed, [(4, 5)] * 3), tmp_path / "model.onnx")
    with pytest.raises(Exception, match=r"out of (the )?(range|data bounds)"):
        run(values_of(packed, MIXED))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_eager_attention_exports_for_any_mix(name, tmp_path):
    """By `torch.export` and in onnxruntime, on random mixes; one image alone, too."""
    packed = packing_model(reference_model(**MODELS[name]), attn="eager")
    given = values_of(packed, MIXED)
    exported, in_onnx = export_values(packed, given).module(), to_onnx(packed, given, tmp_path / "model.onnx")
    mixes = [[tuple(row[1:]) for row in inputs["grid_thw"].tolist()] for inputs in random_mixes(4)]
    for grids in (MIXED, [(5, 7)], [(1, 1), (9, 1)], *mixes):
        given = values_of(packed, grids)
        with torch.no_grad():
            expected = packed(**given).to_tuple()
            # To torch.export a batch of one is a program of its own.
            for ours, theirs in zip(exported(*given.values()), expected, strict=True) if len(grids) > 1 else ():
                assert (ours - theirs).abs().max() < 1e-5
        for ours, theirs in zip(in_onnx(given), expected, strict=True):
            assert (torch.from_numpy(ours) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_compiled_model_takes_values_computed_before(attn):
    """Lengths that a graph does not know are not taken for equal ones; outputs and gradients."""
    packed = packing_model(reference_model(use_head=True, num_hidden_layers=1), attn=attn)
    compiled = torch.compile(packed, backend="aot_eager")

    def run(model, given):
        packed.zero_grad()
        outputs = model(**given)
        (outputs.last_hidden_state.square().sum() + outputs.pooler_output.sum()).backward()
        weight = packed.encoder.layers[0].attention.k_proj.weight
        return outputs.last_hidden_state.detach(), outputs.pooler_output.detach(), weight.grad.clone()

    for grids in (MIXED, ODD_GRIDS, [(4, 5)] * 3):
        given = values_of(packed, grids)
        for ours, expected in zip(run(compiled, given), run(packed, given), strict=True):
            assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_a_whole_layout_compiles_into_one_graph():
    packed = packing_model(reference_model(use_head=True))
    inputs = pack(random_images(MIXED))
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours, expected = (model(inputs["hidden_states"], layout=layout) for model in (compiled, packed))
    assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
    assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5
    assert packed.engine_refusal is None
    with torch.no_grad():
        compiled(inputs["hidden_states"], layout=layout)
    assert (packed.last_engine, packed.engine_refusal) == (None, "the model is being compiled")


def test_the_whole_model_compiles_at_most_twice_where_a_varlen_kernel_is(monkeypatch):
    """For one size, and for any sizes; each part of it between the reads of `grid_thw`."""
    packed = packing_model(reference_model(), plain=True)
    modeling = hub_module("modeling")
    monkeypatch.setattr(modeling, "has_varlen_kernel", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(modeling, "varlen_attention", lambda q, k, v, cu_q, cu_k, max_q, max_k: q + k * cu_q[-1] + v)
    with_layers = []

    def backend(graph, example_inputs):
        linears = sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)
        if linears:
            with_layers.append(linears)
        return graph.forward

    compiled = torch.compile(packed, backend=backend)
    with torch.no_grad():
        for inputs in random_mixes(8):
            ours, expected = compiled(**inputs).last_hidden_state, packed(**inputs).last_hidden_state
            assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert with_layers == [7 * packed.config.num_hidden_layers + 1] * 2


def test_values_computed_before_compile_into_one_graph_where_a_varlen_kernel_is(monkeypatch):
    packed = packing_model(reference_model(), plain=True)
    modeling = hub_module("modeling")
    monkeypatch.setattr(modeling, "has_varlen_kernel", lambda device, dtype, head_dim: head_dim == 32)
    monkeypatch.setattr(modeling, "varlen_attention", lambda q, k, v, cu_q, cu_k, max_q, max_k: q + k * cu_q[-1] + v)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    given = values_of(packed, MIXED)
    with torch.no_grad():
        ours, expected = compiled(**given).last_hidden_state, packed(**given).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_model_runs_in_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    packed = packing_model(reference_model(**MODELS[name]))
    given = one_size(packed, 3)
    explicit, any_number = Explicit(packed, list(given)), {"values": ({0: torch.export.Dim.AUTO},) * len(given)}
    program = torch.onnx.export(
        explicit, tuple(given.values()), dynamo=True, dynamic_shapes=any_number, input_names=list(given), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}
    for count in (2, 5):
        given = one_size(packed, count)
        with torch.no_grad():
            expected = packed(given["hidden_states"], given["grid_thw"]).to_tuple()
        results = session.run(None, {key: value.numpy() for key, value in given.items() if key in used})
        for ours, theirs in zip(results, expected, strict=True):
            assert (torch.from_numpy(ours) - theirs).abs().max() < 1e-4


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="its exporters are of transformers 5.23"
)
@pytest.mark.parametrize("config", [{}, {"is_native": False}, {"merge_temporal": True}])
def test_what_transformers_exporters_compute_is_what_the_model_computes(config):
    exporters = importlib.import_module("transformers.exporters.utils")
    reference = reference_model(use_head=True, is_native=config.get("is_native", True))
    packed = packing_model(reference, **{name: value for name, value in config.items() if name != "is_native"})
    grid_thw = torch.tensor([[2, 3, 4], [1, 5, 5], [2, 1, 7]])
    inputs = {"hidden_states": torch.randn(int(grid_thw.prod(1).sum()), 588), "grid_thw": grid_thw}
    _, prepared, _ = exporters.prepare_for_export(packed, dict(inputs))
    assert "cu_seqlens" in prepared
    with torch.no_grad():
        for ours, expected in zip(packed(**prepared).to_tuple(), packed(**inputs).to_tuple(), strict=True):
            assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_model_exports_for_one_mixed_layout(name):
    """The layout is part of the exported program: batches of the same grids run through it."""
    packed = packing_model(reference_model(**MODELS[name]))
    inputs = pack(random_images(ODD_GRIDS))
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)

    class OfOneLayout(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = packed

        def forward(self, hidden_states):
            return self.packed(hidden_states, layout=layout).last_hidden_state

    exported = torch.export.export(OfOneLayout(), (inputs["hidden_states"],)).module()
    other = pack(random_images(ODD_GRIDS))
    with torch.no_grad():
        assert (exported(other["hidden_states"]) - packed(**other).last_hidden_state).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_the_model_traces_for_one_mixed_layout():
    packed = packing_model(reference_model(use_head=True))
    inputs = pack(random_images(ODD_GRIDS))
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(packed, tuple(inputs.values()), strict=False)
        other = pack(random_images(ODD_GRIDS))
        ours, expected = traced(**other), packed(**other)
    assert (ours["last_hidden_state"] - expected.last_hidden_state).abs().max() < 1e-5


def test_a_compiled_model_refuses_a_layout_of_other_patches():
    packed = packing_model(reference_model(), plain=True)
    layout = packed_layout(torch.tensor([[1, 1, 1]]), packed.config)
    with torch.no_grad(), pytest.raises(RuntimeError):
        torch.compile(packed, backend="eager")(torch.randn(8, 588), layout=layout)


def test_learned_positions_that_were_never_computed_are_exported():
    packed = packing_model(reference_model(is_native=False), plain=True)
    layout = packed_layout(torch.tensor([[1, 2, 3], [1, 4, 4]]), packed.config)
    patches = torch.randn(22, 588)
    hub_module("layout").axis_taps.cache_clear()
    program = torch.export.export(packed, (patches,), {"layout": layout}, strict=False).module()
    with torch.no_grad():
        ours, expected = (model(patches, layout=layout).last_hidden_state for model in (program, packed))
    torch.testing.assert_close(ours, expected)
