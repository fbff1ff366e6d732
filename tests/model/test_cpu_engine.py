# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine gives the features of the plain model, and keeps its promises of memory and of kernels."""

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ODD_GRIDS,
    apple_forward,
    hub_module,
    pack,
    packing_model,
    random_images,
    reference_model,
)
from torch.utils._python_dispatch import TorchDispatchMode


engine = hub_module("cpu_engine")

# More than one block, in order and ordered by length, and a segment larger than a block.
MIXES = {
    "in_order": [(30, 40), (20, 30), (30, 40), (1, 1)],
    "by_length": [(16, 16), (3, 5), (20, 20), (3, 5)] * 5,
    "one_block": ODD_GRIDS,
    "longer_than_a_block": [(3, 3), (46, 46), (2, 5)],
}


class Operators(TorchDispatchMode):
    """Counts the fused linear layers that ran, and keeps the size of the largest tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.fused, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.fused += func._schema.name == "mkldnn::_linear_pointwise"
        self.largest = max(self.largest, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def observed_encode(packed, inputs) -> Operators:
    """The engine's own work under a dispatch mode, which would keep a whole forward out of it."""
    layout = hub_module("layout").packed_layout(inputs["grid_thw"], packed.config)
    with torch.inference_mode(), Operators() as operators:
        _, operators.features = engine.encode(packed, inputs["hidden_states"], layout, None, (), last=True)
    return operators


def fused_layers(packed) -> int:
    return observed_encode(packed, pack(random_images([(3, 4), (2, 2)]))).fused


def by_engine_and_plain(packed, inputs, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        ours = packed(**inputs, **kwargs).last_hidden_state
        assert packed.last_engine == "cpu"
        packed.use_engines = False
        plain = packed(**inputs, **kwargs).last_hidden_state
        assert packed.engine_refusal == "`use_engines` is false"
    del packed.use_engines
    return ours, plain


@pytest.mark.parametrize("config", [{"qkv_bias": True, "mlp_bias": True}, {"is_native": False}, {"hidden_act": "gelu"}])
@pytest.mark.parametrize("mix", MIXES)
def test_features_are_those_of_the_plain_model(mix, config):
    ours, plain = by_engine_and_plain(packing_model(reference_model(**config)), pack(random_images(MIXES[mix])))
    assert (ours - plain).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mix", MIXES)
def test_patches_of_any_floating_point_dtype_go_through_blocks(mix, dtype):
    packed = packing_model(reference_model(num_hidden_layers=1))
    inputs = pack(random_images(MIXES[mix]))
    patches = inputs["hidden_states"].abs().to(dtype)
    with torch.inference_mode():
        ours = packed(patches, inputs["grid_thw"]).last_hidden_state
        assert packed.last_engine == "cpu"
        expected = packed(patches.float(), inputs["grid_thw"]).last_hidden_state
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_the_original(dtype):
    reference = reference_model(dtype, hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    images = [image.to(dtype).float() for image in random_images(MIXES["by_length"])]
    packed = packing_model(reference)
    with torch.inference_mode():
        exact = torch.cat([apple_forward(reference, image) for image in images])
        ours = packed(**pack(images)).last_hidden_state
        theirs = torch.cat([reference(image[None].to(dtype)).last_hidden_state[0] for image in images])
    assert packed.last_engine == "cpu"
    error, allowed = ((features.double() - exact).norm().item() for features in (ours, theirs))
    assert error <= 1.05 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_is_as_exact_as_one_operation_after_the_other(dtype, bias):
    module = torch.nn.Linear(48, 80, bias=bias, dtype=dtype)
    inputs, factor = torch.randn(33, 48, dtype=dtype), torch.randn(33, 80, dtype=dtype)
    exact = F.linear(inputs.double(), module.weight.double(), module.bias.double() if bias else None)
    with torch.inference_mode(), Operators() as operators:
        fused = [
            engine.linear(module, inputs),
            engine.linear(module, inputs.T.contiguous().T, "swish"),
            engine.linear(module, inputs, times=factor),
        ]
    assert operators.fused == 3 * onednn_takes(dtype)
    stepwise = [module(inputs), F.silu(module(inputs)), module(inputs) * factor]
    for ours, theirs, expected in zip(fused, stepwise, [exact, F.silu(exact), exact * factor.double()], strict=True):
        assert ours.dtype == dtype
        assert (ours - expected).norm() <= 1.01 * (theirs - expected).norm() + 1e-6 * expected.norm()


def test_every_linear_layer_is_fused():
    reference = reference_model()
    assert fused_layers(packing_model(reference)) == 7 * reference.config.num_hidden_layers


def test_what_switches_fusion_off():
    with torch.backends.mkldnn.flags(enabled=False):
        assert fused_layers(packing_model(reference_model())) == 0
    assert fused_layers(packing_model(reference_model(torch.float64))) == 0


def test_without_the_fused_operator_the_features_are_the_same(monkeypatch):
    """A torch that lacks the private name."""
    packed, inputs = packing_model(reference_model()), pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = packed(**inputs).last_hidden_state
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        engine.onednn_kernel.cache_clear()
        ours = packed(**inputs).last_hidden_state
    engine.onednn_kernel.cache_clear()
    assert packed.last_engine == "cpu"
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_do_not_grow_with_the_batch(dtype):
    """The output of a long batch is the largest tensor of its forward."""
    packed = packing_model(reference_model(dtype, num_hidden_layers=1))
    operators = observed_encode(packed, pack(random_images([(16, 16)] * 160)))
    assert operators.largest == operators.features.numel()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(3, 400, 400), (1, 1100, 1100), (5, 1, 700)])
def test_parts_of_scores_add_up(batch, queries, keys, monkeypatch):
    """Lengths at which a part holds some heads, or a part of one head's queries; against float64."""
    monkeypatch.setattr(engine, "SCORES_PER_PART", 1 << 19)
    query = torch.randn(batch, 3, queries, 16).bfloat16()
    key, value = (torch.randn(batch, 3, keys, 16).bfloat16() for _ in range(2))
    ours = engine.attention_in_parts(query, key, value, scaling=0.25)
    weights = (query.double() @ key.double().transpose(2, 3) * 0.25).softmax(-1)
    expected = weights @ value.double()
    assert ours.shape == expected.shape
    assert (ours - expected).norm() < 0.01 * expected.norm()


def test_blocks_by_hand():
    """Whole segments up to 2048 patches; ordered by length where lengths alternate; padded to sizes that recur."""
    first, second, third = engine.plan_blocks([1200, 600, 1200, 2500])
    assert (first.rows, first.padding, first.runs) == (slice(0, 1800), 24, ((1, 1200), (1, 600), (1, 24)))
    assert (second.rows, second.padding, second.runs) == (slice(1800, 3000), 16, ((1, 1200), (1, 16)))
    assert (third.rows, third.padding, third.runs) == (slice(3000, 5500), 60, ((1, 2500), (1, 60)))

    (block,) = engine.plan_blocks([2, 1] * 3)
    assert block.rows.tolist() == [2, 5, 8, 0, 1, 3, 4, 6, 7]
    assert block.runs == ((3, 1), (3, 2))


def test_few_sizes_of_blocks():
    """Each at most 3 % larger than it has to be."""
    sizes = set()
    for patches in range(1, 2049):
        (block,) = engine.plan_blocks([patches])
        assert block.padding <= 0.032 * patches
        sizes.add(patches + block.padding)
    assert len(sizes) == 64 + 32 * 5
