# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Which kernel attention reaches, and with what; the flash-attention contract on a reference kernel."""

import ast
import dataclasses
import inspect
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import (
    ODD_GRIDS,
    REPO,
    Aimv2PackingConfig,
    hub_module,
    pack,
    packed_layout,
    packing_model,
    random_images,
    reference_model,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.aimv2 import modeling_aimv2


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Plain-torch flash_attn_varlen_func, as strict about its arguments as the CUDA kernel."""
    for cu_seqlens, max_seqlen, packed in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert cu_seqlens.dtype == torch.int32
        assert type(max_seqlen) is int
        assert packed.ndim == 3
        assert packed.stride(-1) == 1
        lengths = cu_seqlens.diff()
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == len(packed)
        assert lengths.min() > 0
        assert lengths.max() == max_seqlen
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    assert not causal
    assert dropout_p == 0.0
    outputs = []
    for index in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[index] : cu_seqlens_q[index + 1]].transpose(0, 1)
        key, value = (x[cu_seqlens_k[index] : cu_seqlens_k[index + 1]].transpose(0, 1) for x in (k, v))
        weights = (query @ key.transpose(1, 2) * softmax_scale).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def flash_kernel(monkeypatch):
    """Puts the reference kernel where transformers would load flash-attn; returns the calls that reach it."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return flash_attn_varlen_func(*args, **kwargs)

    # transformers reads from the signature what a kernel supports.
    recorded.__signature__ = inspect.signature(flash_attn_varlen_func)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (None, recorded, None, None, None)
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return calls


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_flash_attention_gets_one_varlen_call_per_layer(flash_kernel, implementation):
    reference = reference_model(use_head=True)
    expected_model, packed = packing_model(reference), packing_model(reference)
    packed.config._attn_implementation = implementation
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected, ours = expected_model(**inputs), packed(**inputs)
    assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
    assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5
    assert len(flash_kernel) == reference.config.num_hidden_layers + 1
    assert all(call["max_seqlen_k"] == 13 * 11 for call in flash_kernel)
    assert flash_kernel[-1]["max_seqlen_q"] == 1, "the pooling head has one query per image"


def test_flash_attention_gets_no_longer_bound_than_there_are_patches(flash_kernel):
    """A kernel holds it in 32 bits."""
    packed = packing_model(reference_model(use_head=True))
    packed.config._attn_implementation = "flash_attention_2"
    inputs = pack(random_images(ODD_GRIDS))
    layout = packed_layout(inputs["grid_thw"], packed.config)
    with torch.inference_mode():
        for bound in (2**40, np.int64(1000), torch.tensor(143)):
            packed(**inputs, cu_seqlens=layout.cu_seqlens, max_seqlen=bound)
            packed(inputs["hidden_states"], layout=dataclasses.replace(layout, max_seqlen=bound))
    assert len(flash_kernel) == 6 * 3


def test_flash_attention_on_an_empty_batch(flash_kernel):
    packed = packing_model(reference_model(use_head=True)).train()
    packed.config._attn_implementation = "flash_attention_2"
    outputs = packed(torch.zeros(0, 588), torch.zeros(0, 3, dtype=torch.int64))
    (outputs.last_hidden_state.sum() + outputs.pooler_output.sum()).backward()
    assert all(parameter.grad is not None for parameter in packed.parameters())
    assert not flash_kernel


def test_neighbours_of_equal_length_share_a_call(monkeypatch):
    packed = packing_model(reference_model(num_hidden_layers=1))
    batches = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, *args, **kwargs):
        batches.append(tuple(query.shape[::2]))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    packed(**pack(random_images([(2, 3), (3, 2), (1, 6), (5, 5), (2, 3)])))
    assert batches == [(3, 6), (1, 25), (1, 6)]


def test_more_segments_than_a_cuda_grid_holds_go_in_several_calls(flash_kernel, monkeypatch):
    reference = reference_model(use_head=True)
    packed, inputs = packing_model(reference), pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = packed(**inputs)
    packed.config._attn_implementation = "flash_attention_2"
    modeling = hub_module("modeling")
    monkeypatch.setattr(modeling, "MAX_SEGMENTS_PER_CALL", 4)
    monkeypatch.setattr(hub_module("layout"), "MAX_SEGMENTS_PER_CALL", 4)
    monkeypatch.setattr(modeling, "in_several_calls", lambda query, layout: len(layout.cu_seqlens) - 1 > 4)
    with torch.inference_mode():
        ours = packed(**inputs)
    assert len(flash_kernel) == 3 * (reference.config.num_hidden_layers + 1)
    assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
    assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5


def test_torchs_varlen_kernel_gets_what_it_can_take(monkeypatch):
    """Segments of any lengths, but no dropout, which it is not told of, and where another kernel was asked for none."""
    reference = reference_model(use_head=True)
    mixed, alike = pack(random_images(ODD_GRIDS)), pack(random_images([(3, 4), (2, 6), (4, 3)]))
    with torch.inference_mode():
        expected = [packing_model(reference, plain=True)(**inputs) for inputs in (mixed, alike)]
    asked, calls = [], []

    def has_varlen_kernel(device, dtype, head_dim):
        asked.append((device.type, dtype, head_dim))
        return True

    def varlen_attention(query, *args):
        calls.append(len(query))
        return flash_attn_varlen_func(query, *args, softmax_scale=query.shape[-1] ** -0.5)

    modeling = hub_module("modeling")
    monkeypatch.setattr(modeling, "has_varlen_kernel", has_varlen_kernel)
    monkeypatch.setattr(modeling, "varlen_attention", varlen_attention)
    packed = packing_model(reference, plain=True, attention_dropout=0.5)
    with torch.inference_mode():
        for inputs, theirs in zip((mixed, alike), expected, strict=True):
            ours = packed(**inputs)
            assert (ours.last_hidden_state - theirs.last_hidden_state).abs().max() < 1e-5
            assert (ours.pooler_output - theirs.pooler_output).abs().max() < 1e-5
        assert calls[:3] == [217, 217, 10]
        layout = dataclasses.replace(packed_layout(mixed["grid_thw"], packed.config), runs=None)
        ours = packed(mixed["hidden_states"], layout=layout)
        assert (ours.last_hidden_state - expected[0].last_hidden_state).abs().max() < 1e-5
        calls.clear()
        assert not torch.equal(packed.train()(**mixed).last_hidden_state, packed(**mixed).last_hidden_state)
        packed.eval().set_attn_implementation("eager")
        packed(**mixed)
    assert not calls
    assert set(asked) == {("cpu", torch.float32, 32)}


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), True),
        ("cuda", torch.float16, 256, (8, 0), True),
        ("cuda", torch.float16, 8, (8, 6), True),
        ("cuda", torch.float32, 128, (9, 0), False),
        ("cuda", torch.bfloat16, 60, (9, 0), False),
        ("cuda", torch.bfloat16, 264, (9, 0), False),
        ("cuda", torch.bfloat16, 128, (7, 5), False),
        ("cpu", torch.bfloat16, 128, (9, 0), False),
    ],
)
def test_torchs_varlen_kernel_has_limits(device, dtype, head_dim, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_varlen_kernel = hub_module("modeling").has_varlen_kernel
    assert has_varlen_kernel(torch.device(device), dtype, head_dim) is expected
    with sdpa_kernel(SDPBackend.MATH):
        assert not has_varlen_kernel(torch.device(device), dtype, head_dim)


@pytest.mark.parametrize(
    ("is_cuda", "segments", "expected"), [(True, 65535, False), (True, 65536, True), (False, 65536, False)]
)
def test_a_cuda_grid_holds_65535_segments(is_cuda, segments, expected):
    layout = packed_layout(torch.tensor([[1, 1, 1]]), Aimv2PackingConfig())
    layout = dataclasses.replace(layout, cu_seqlens=torch.arange(segments + 1, dtype=torch.int32))
    in_several_calls, query = hub_module("modeling").in_several_calls, SimpleNamespace(is_cuda=is_cuda)
    assert in_several_calls(query, layout) is expected
    assert not in_several_calls(query, dataclasses.replace(layout, runs=None)), "a program for any mix"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_attention_is_that_of_transformers(dtype):
    """With its softmax in float32, whatever the dtype of the model."""
    states = torch.randn(3, 5, 2, 70, 32).mul(2).to(dtype)
    caller, options = torch.nn.Module().eval(), {"attention_mask": None, "scaling": 32**-0.5, "dropout": 0.0}
    ours = hub_module("modeling").eager_attention_forward(caller, *states, **options)
    theirs = modeling_aimv2.eager_attention_forward(caller, *states, **options)
    assert all(map(torch.equal, ours, theirs))


def test_attention_of_ones_own_gets_what_transformers_models_give(monkeypatch):
    given = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        given.append((module.is_causal, attention_mask, kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", attention)
    packed, inputs = packing_model(reference_model(use_head=True)), pack(random_images([(2, 3)]))
    with torch.inference_mode():
        expected = packed(**inputs).pooler_output
        packed.set_attn_implementation("mine")
        torch.testing.assert_close(packed(**inputs).pooler_output, expected)
    options = {"scaling": 32**-0.5, "dropout": 0.0, "is_causal": False}
    assert given == [(False, None, options)] * (packed.config.num_hidden_layers + 1)


def test_attention_can_be_set_later():
    packed = packing_model(reference_model())
    packed.set_attn_implementation("eager")
    assert packed.config._attn_implementation == "eager"
    assert packed.is_backend_compatible()
    with pytest.raises(ValueError, match="telepathy"):
        packed.set_attn_implementation("telepathy")
    with suppress(ImportError):
        # Not installed, perhaps; that the model has none would be a ValueError.
        packed.set_attn_implementation("flash_attention_2")


def test_memory_grows_with_the_patches_not_with_their_square():
    """Ten times the images may not need the scores of one large sequence: none are ever allocated."""
    packed = packing_model(reference_model(num_hidden_layers=1), attn="eager")
    inputs = pack(random_images([(2, 2)] * 400))
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with torch.inference_mode(), Allocations():
        packed(**inputs)
    assert max(sizes) < 1600 * 1600


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        packing_model(reference_model(), attn="telepathy")


def test_flash_attention_is_never_imported_by_the_repo():
    for path in REPO.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "flash_attn" for name in names), path.name
    assert "flash_attn" not in sys.modules
