# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The packed forward against `Aimv2VisionModel` image by image, and against Apple's forward in float64."""

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ODD_GRIDS,
    apple_forward,
    pack,
    packed_layout,
    packing_model,
    patchify,
    random_images,
    reference_model,
    with_positions,
)
from torch.utils._python_dispatch import TorchDispatchMode


MODELS = {
    "native": {},
    "native_with_head": {"use_head": True},
    "learned": {"is_native": False},
    "learned_with_head": {"is_native": False, "use_head": True},
    "biased": {"qkv_bias": True, "mlp_bias": True, "use_head": True},
}

# hidden_size, intermediate_size, num_attention_heads of the released models.
GEOMETRIES = {
    "large": (1024, 2816, 8),
    "huge": (1536, 4096, 12),
    "1B": (2048, 5632, 16),
    "3B": (3072, 8192, 24),
}


def grids_for(model) -> list[tuple[int, int]]:
    side = model.config.image_size // model.config.patch_size
    return ODD_GRIDS if model.config.is_native else [(side, side)] * 3


def differences(reference, packed, images):
    """Per image: max |difference| over the final features, every hidden state and the pooled vector."""
    with torch.inference_mode():
        outputs = packed(**pack(images), output_hidden_states=True)
        first, found = 0, []
        for index, image in enumerate(images):
            expected = reference(image[None].to(reference.dtype), output_hidden_states=True)
            patches = slice(first, first + expected.last_hidden_state.shape[1])
            pairs = [(outputs.last_hidden_state[patches], expected.last_hidden_state[0])]
            states = zip(outputs.hidden_states, expected.hidden_states, strict=True)
            pairs += [(ours[patches], theirs[0]) for ours, theirs in states]
            if reference.config.use_head:
                pairs.append((outputs.pooler_output[index], expected.pooler_output[0]))
            else:
                assert outputs.pooler_output is None
            found.append(max((ours - theirs).abs().max().item() for ours, theirs in pairs))
            first = patches.stop
    assert first == len(outputs.last_hidden_state)
    return found


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original_image_by_image(name, attn):
    reference = reference_model(attn=attn, **MODELS[name])
    packed = packing_model(reference, attn=attn)
    images = random_images(grids_for(reference))
    assert max(differences(reference, packed, images)) < 2e-5


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("is_native", [True, False])
def test_equals_apple_in_float64(is_native, attn):
    reference = reference_model(torch.float64, is_native=is_native)
    packed = packing_model(reference, attn=attn)
    images = random_images(grids_for(reference))
    with torch.inference_mode():
        ours = packed(**pack(images)).last_hidden_state
    expected = torch.cat([apple_forward(reference, image) for image in images])
    assert (ours - expected).abs().max() < 1e-9


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("is_native", [True, False])
def test_every_released_geometry(geometry, is_native):
    hidden_size, intermediate_size, num_attention_heads = GEOMETRIES[geometry]
    reference = reference_model(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        is_native=is_native,
        image_size=224,
        use_head=True,
    )
    images = random_images([(3, 5), (1, 4), (8, 8)] if is_native else [(16, 16)])
    assert max(differences(reference, packing_model(reference), images)) < 1e-4


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_full_depth_of_the_large_model(attn):
    reference = reference_model(
        attn=attn, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8
    )
    images = random_images([(1, 1), (16, 16), (3, 20), (7, 5)])
    assert max(differences(reference, packing_model(reference, attn=attn), images)) < 1e-4


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_the_original(dtype, attn):
    config = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8}
    reference = reference_model(dtype, **config)
    packed = packing_model(reference, attn=attn)
    images = [image.to(dtype).float() for image in random_images([*ODD_GRIDS, (16, 16), (24, 10)])]
    with torch.inference_mode():
        exact = torch.cat([apple_forward(reference, image) for image in images])
        ours = packed(**pack(images)).last_hidden_state
        theirs = torch.cat([reference(image[None].to(dtype)).last_hidden_state[0] for image in images])
    error, allowed = ((features.double() - exact).norm().item() for features in (ours, theirs))
    assert error <= 1.05 * allowed


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_row_of_patches_ends_within_a_tile(dtype, autocast):
    """There oneDNN reads on, into the next image, and what it finds times 0 is NaN where that is NaN."""
    reference = reference_model(torch.float32 if autocast else dtype)
    packed, inputs = packing_model(reference, plain=True), pack(random_images(ODD_GRIDS))
    multiplied = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                multiplied.append(args[-2])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast), Products():
        packed(**inputs)
    patches = multiplied[0]
    assert patches.dtype == dtype
    assert patches.shape[1] % 32 == 0
    assert torch.equal(patches[:, :588], inputs["hidden_states"].to(dtype))
    assert not patches[:, 588:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_float64_as_the_original(dtype):
    reference = reference_model(hidden_size=256, intermediate_size=704, num_hidden_layers=8)
    packed = packing_model(reference)
    images = random_images([*ODD_GRIDS, (16, 16), (24, 10)])
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        ours = packed(**pack(images)).last_hidden_state
        theirs = torch.cat([reference(image[None]).last_hidden_state[0] for image in images])
    with torch.inference_mode():
        exact = torch.cat([apple_forward(reference, image) for image in images])
    error, allowed = ((features.double() - exact).norm().item() for features in (ours, theirs))
    assert ours.dtype == theirs.dtype
    assert error <= 1.05 * allowed


def test_both_patch_layouts_give_the_same_features():
    reference = reference_model()
    images = random_images(ODD_GRIDS)
    inputs = pack(images)
    with torch.inference_mode():
        expected = packing_model(reference)(**inputs).last_hidden_state
        inputs["hidden_states"] = torch.cat([patchify(image, channels_last=True) for image in images])
        ours = packing_model(reference, patch_layout="channels_last")(**inputs).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [4, 1])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 1), (9, 4), (13, 17)])
def test_learned_positions_are_interpolated_like_torch(grid, side, dtype):
    """Exact at the native grid; elsewhere what `F.interpolate` makes of the learned table, in float32 at least."""
    reference = reference_model(dtype, is_native=False, image_size=14 * side)
    packed = packing_model(reference)
    layout = with_positions(packed_layout(torch.tensor([(2, *grid)]), packed.config), packed.config)
    learned = reference.embeddings.position_embedding.weight.detach().float()
    with torch.inference_mode():
        ours = packed.embeddings.learned_positions(layout)
    table = learned.T.reshape(1, -1, side, side)
    expected = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2)[0].T
    assert (ours - expected.repeat(2, 1)).abs().max() < 1e-5
    if grid == (side, side):
        assert torch.equal(ours, learned.repeat(2, 1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed.embeddings.learned_positions(layout), ours)


def test_frames_of_a_video_are_encoded_like_images():
    reference = reference_model(use_head=True)
    packed = packing_model(reference)
    frames = random_images([(3, 5)] * 4)
    still = random_images([(2, 2)])
    inputs = pack(frames + still)
    with torch.inference_mode():
        expected = packed(**inputs)
        video = packed(inputs["hidden_states"], torch.tensor([(4, 3, 5), (1, 2, 2)]))
    assert torch.equal(video.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(video.pooler_output, expected.pooler_output)


def test_merged_frames_attend_to_each_other():
    """Against the reference's own layers on the whole clip, with the positions of one frame repeated."""
    reference = reference_model(use_head=True)
    packed = packing_model(reference, merge_temporal=True)
    frames = random_images([(3, 5)] * 4)
    inputs = pack(frames)
    with torch.inference_mode():
        outputs = packed(inputs["hidden_states"], torch.tensor([(4, 3, 5)]))
        embedded = torch.cat([reference.embeddings(frame[None]) for frame in frames], dim=1)
        expected = reference.rms_norm(reference.encoder(inputs_embeds=embedded).last_hidden_state)
        pooled = reference.head(expected)
    assert (outputs.last_hidden_state - expected[0]).abs().max() < 1e-5
    assert (outputs.pooler_output - pooled).abs().max() < 1e-5


def test_hundreds_of_images():
    reference = reference_model()
    generator = torch.Generator().manual_seed(1)
    grids = [tuple(torch.randint(1, 6, (2,), generator=generator).tolist()) for _ in range(300)]
    assert max(differences(reference, packing_model(reference), random_images(grids))) < 2e-5
