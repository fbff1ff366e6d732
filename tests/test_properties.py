"""Properties that hold for any batch: images do not see each other, whatever their order and company."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import pack, packing_model, random_images, reference_model


grids = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=8)
MODELS = {attn: packing_model(reference_model(), attn=attn) for attn in ("sdpa", "eager")}


def features(model, images: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = pack(images)
    with torch.inference_mode():
        packed = model(**inputs).last_hidden_state
    return list(packed.split(inputs["grid_thw"].prod(1).tolist()))


@pytest.mark.parametrize("attn", MODELS)
@given(grids=grids, data=st.data())
def test_permuting_images_permutes_features(attn, grids, data):
    images = random_images(grids)
    order = data.draw(st.permutations(range(len(images))))
    expected = features(MODELS[attn], images)
    for index, ours in zip(order, features(MODELS[attn], [images[index] for index in order]), strict=True):
        assert (ours - expected[index]).abs().max() < 1e-5


@pytest.mark.parametrize("attn", MODELS)
@given(grids=grids, data=st.data())
def test_splitting_a_batch_changes_nothing(attn, grids, data):
    images = random_images(grids)
    cut = data.draw(st.integers(1, len(images)))
    parts = features(MODELS[attn], images[:cut])
    parts += features(MODELS[attn], images[cut:]) if cut < len(images) else []
    for ours, expected in zip(parts, features(MODELS[attn], images), strict=True):
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("attn", MODELS)
@given(grids=grids, data=st.data(), value=st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_a_poisoned_neighbour_leaves_no_trace(attn, grids, data, value):
    images = random_images(grids)
    poisoned = data.draw(st.integers(0, len(images) - 1))
    clean = features(MODELS[attn], images)
    images[poisoned] = torch.full_like(images[poisoned], value)
    for index, (ours, expected) in enumerate(zip(features(MODELS[attn], images), clean, strict=True)):
        if index != poisoned:
            assert torch.equal(ours, expected)
