# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Properties that hold for any batch: images do not see each other, whatever their order and company."""

from functools import cache

import pytest
import torch
from hypothesis import example, given
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


# Equal neighbours, which share a kernel call, and frames; the example has images of several hundred patches.
clips = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([(1, 1), (2, 3), (3, 2), (1, 6), (4, 3)])), min_size=2, max_size=5
)


@cache
def model_with_head(dtype: torch.dtype, attn: str):
    return packing_model(reference_model(dtype, use_head=True), attn=attn)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("attn", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    clips=clips,
    chosen=st.integers(0, 14),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf"), "large", "max"]),
    share=st.sampled_from([1.0, 0.1, 0.001]),
    random=st.random_module(),
)
@example(clips=[(1, (20, 23)), (2, (19, 30)), (1, (30, 19))], chosen=1, value=float("nan"), share=1.0, random=None)
def test_a_poisoned_neighbour_leaves_no_trace(dtype, attn, grad, clips, chosen, value, share, random):
    """Whatever one frame holds, all or some of it, every other frame has the bits that it has beside a harmless one."""
    model = model_with_head(dtype, attn)
    grid_thw = torch.tensor([(t, *sides) for t, sides in clips])
    frames = list(torch.randn(int(grid_thw.prod(1).sum()), 588).split([h * w for t, (h, w) in clips for _ in range(t)]))
    chosen %= len(frames)
    value = {"large": min(1e30, torch.finfo(dtype).max), "max": torch.finfo(dtype).max}.get(value, value)

    def others() -> list[torch.Tensor]:
        with torch.set_grad_enabled(grad):
            outputs = model(torch.cat(frames), grid_thw)
        features = outputs.last_hidden_state.split([len(frame) for frame in frames])
        kept = [*features[:chosen], *features[chosen + 1 :]]
        return [*kept, outputs.pooler_output[:chosen], outputs.pooler_output[chosen + 1 :]]

    expected = others()
    poisoned = torch.rand(frames[chosen].shape) < share
    poisoned[0, 0] = True
    frames[chosen] = frames[chosen].masked_fill(poisoned, value)
    assert all(torch.equal(ours, clean) for ours, clean in zip(others(), expected, strict=True))
