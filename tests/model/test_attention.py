# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Which kernel attention reaches, and with what; the flash-attention contract on a reference kernel."""

import ast
import inspect
import sys

import pytest
import torch
from reference import ODD_GRIDS, REPO, hub_module, pack, packing_model, random_images, reference_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils


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


def test_attention_can_be_set_later():
    packed = packing_model(reference_model())
    packed.set_attn_implementation("eager")
    assert packed.config._attn_implementation == "eager"
    assert packed.is_backend_compatible()
    with pytest.raises(ValueError, match="telepathy"):
        packed.set_attn_implementation("telepathy")


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
