# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of gradients in benchmarks/distributed.py tells a wrong one from rounding, in each dtype."""

import pytest
import torch
from agreement import agreement, relative_errors
from reference import ODD_GRIDS, pack, packing_model, random_images, reference_model


BATCHES = [ODD_GRIDS, ODD_GRIDS[3:6]]


def gradients(dtype: torch.dtype, batches: list) -> dict[str, torch.Tensor]:
    """Of the mean of the batches' losses, each batch with a backward pass of its own: summed in the model's dtype."""
    torch.manual_seed(0)
    model = packing_model(reference_model(use_head=True)).to(dtype).train()
    for index, grids in enumerate(batches):
        torch.manual_seed(index)
        output = model(**pack(random_images(grids)))
        probe = torch.arange(output.last_hidden_state.shape[1], dtype=dtype).cos()
        (torch.tanh(output.last_hidden_state @ probe).sum() / len(BATCHES)).backward()
        del output
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def steps(request) -> tuple[dict, dict, dict, dict]:
    """Gradients in the dtype, by the other order of batches, by one batch alone, and in float64."""
    own = gradients(request.param, BATCHES)
    torch.manual_seed(0)
    shuffled = {name: value + torch.finfo(value.dtype).eps * value * torch.randn(()) for name, value in own.items()}
    return own, shuffled, gradients(request.param, BATCHES[:1]), gradients(torch.float64, BATCHES)


def test_rounding_agrees(steps):
    own, shuffled, _, exact = steps
    result = agreement(shuffled, own, exact)
    assert result["wrong"] == [] and 0 < result["error"] <= result["bound"]
    assert result["worst"] in exact


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.attention.k_proj.weight", "encoder.layers.1.rms_norm2.weight", "embeddings.patch_embed.bias"],
)
@pytest.mark.parametrize("fault", ["of one process alone", "not divided", "of another sign", "not a number"])
def test_a_wrong_gradient_is_named(fault, name, steps):
    own, shuffled, alone, exact = steps
    wrong = {
        "of one process alone": alone[name] * len(BATCHES),
        "not divided": own[name] * len(BATCHES),
        "of another sign": -own[name],
        "not a number": own[name] * float("nan"),
    }[fault]
    result = agreement({**shuffled, name: wrong}, own, exact)
    assert result["wrong"] == [name] and result["worst"] == name
    assert not result["error"] <= result["bound"]


def test_errors_are_norms_of_differences_over_norms():
    exact = {"a": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2), "other": torch.zeros(2)}
    actual = {"a": torch.tensor([3.0, 4.5]), "zero": torch.zeros(2), "other": torch.tensor([0.0, 1e-30])}
    assert relative_errors(actual, exact) == {"a": 0.1, "zero": 0.0, "other": float("inf")}


def test_tensors_of_other_names_are_an_error():
    with pytest.raises(ValueError, match=r"one alone has \['b'\]"):
        relative_errors({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
