# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients equal the original's, with and without checkpointing."""

import pytest
import torch
from reference import ODD_GRIDS, hub_module, pack, packing_model, random_images, reference_model


CONFIGS = {"native": {"use_head": True}, "learned": {"is_native": False, "use_head": True, "qkv_bias": True}}


def images_for(reference):
    return random_images(ODD_GRIDS if reference.config.is_native else [(4, 4)] * 3)


def packed_gradients(packed, images) -> dict[str, torch.Tensor]:
    outputs = packed(**pack(images))
    (outputs.last_hidden_state.square().sum() + outputs.pooler_output.square().sum()).backward()
    return {name: parameter.grad for name, parameter in packed.named_parameters()}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_the_original(name, attn):
    reference = reference_model(torch.float64, **CONFIGS[name])
    packed = packing_model(reference, attn=attn)
    images = images_for(reference)
    ours = packed_gradients(packed, images)
    for image in images:
        outputs = reference(image[None].double())
        (outputs.last_hidden_state.square().sum() + outputs.pooler_output.square().sum()).backward()
    for parameter_name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max()
        # The original's norms compute in float32 whatever the dtype of the model: seven digits.
        assert (ours[parameter_name] - parameter.grad).abs().max() < 1e-6 * scale + 1e-9, parameter_name
        # Softmax does not change when all scores of a query shift: a key bias has no gradient.
        if not parameter_name.endswith("k_proj.bias"):
            assert scale > 1e-3, parameter_name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_and_keeps_the_gradients(use_reentrant):
    reference = reference_model(torch.float64, **CONFIGS["native"])
    images = images_for(reference)
    expected = packed_gradients(packing_model(reference).train(), images)

    packed = packing_model(reference).train()
    packed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        packed.enable_input_require_grads()
    calls = []
    packed.encoder.layers[0].rms_norm1.register_forward_hook(lambda *_: calls.append(1))
    ours = packed_gradients(packed, images)
    assert len(calls) == 2, "each layer runs once forward and once more in the backward pass"
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() < 1e-9 * gradient.abs().max(), name


def test_checkpointing_keeps_fewer_tensors():
    images = random_images(ODD_GRIDS)

    def saved_elements(packed) -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed(**pack(images))
        return sum(storages.values())

    reference = reference_model(num_hidden_layers=6)
    plain, checkpointed = packing_model(reference).train(), packing_model(reference).train()
    checkpointed.gradient_checkpointing_enable()
    assert saved_elements(checkpointed) < 0.5 * saved_elements(plain)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_dropout_applies_in_training_only(attn, plain):
    reference = reference_model(use_head=True)
    packed = packing_model(reference, attn, plain, attention_dropout=0.5)
    inputs = pack(random_images([(4, 4), (2, 3)]))
    with torch.no_grad():
        without = packing_model(reference, attn, plain)(**inputs)
        for name in ("last_hidden_state", "pooler_output"):
            assert torch.equal(packed(**inputs)[name], without[name])
        assert torch.equal(packed(**inputs).last_hidden_state, packed(**inputs).last_hidden_state)
        packed.train()
        assert not torch.equal(packed(**inputs).last_hidden_state, packed(**inputs).last_hidden_state)
        hardly_any = packing_model(reference, attn, plain, attention_dropout=1e-9).train()
        assert (hardly_any(**inputs).last_hidden_state - without.last_hidden_state).abs().max() < 1e-5


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize])
def test_learned_positions_that_were_never_computed_are_transformed(transform):
    packed = packing_model(reference_model(is_native=False), attn="eager")
    inputs = pack(random_images(ODD_GRIDS))

    def loss(patches):
        hub_module("layout").axis_taps.cache_clear()
        return packed(patches, inputs["grid_thw"]).last_hidden_state.square().mean()

    patches = inputs["hidden_states"].requires_grad_()
    expected = loss(patches)
    if transform is torch.func.grad:
        (expected,) = torch.autograd.grad(expected, patches)
    torch.testing.assert_close(transform(loss)(patches), expected)
