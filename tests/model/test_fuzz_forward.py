# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
`forward` on random arguments: a right result, or a ValueError that names the argument; inputs are never changed.

Thousands of cases: `pytest tests/model/test_fuzz_forward.py --hypothesis-profile=thorough --timeout 0`.
"""

import copy
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import hub_module, packed_layout, packing_model, reference_model
from torch import nn


pytestmark = pytest.mark.filterwarnings("ignore:.*(in beta state|in prototype stage)")

PATCH_SIZE, PATCH_DIM, LEARNED_SIDE = 2, 12, 3
GEOMETRY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "patch_size": PATCH_SIZE,
    "image_size": LEARNED_SIDE * PATCH_SIZE,
    "use_head": True,
}

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SIGNED = [torch.int64, torch.int32, torch.int16, torch.int8]
UNSIGNED = [torch.uint64, torch.uint32, torch.uint16, torch.uint8]
NOT_FLOATS = [*SIGNED, *UNSIGNED, torch.bool, torch.complex64, torch.complex128, torch.float4_e2m1fn_x2]
NOT_INTEGERS = [*FLOATS, torch.bool, torch.complex64, torch.int4, torch.uint1, torch.bits8]

# Relative error against float64, by the dtype of the weights. The reference's norms are in float32.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}

STORAGES = {
    "contiguous": lambda rows, columns, dtype: torch.empty(rows, columns, dtype=dtype),
    "transposed": lambda rows, columns, dtype: torch.empty(columns, rows, dtype=dtype).T,
    "every other row": lambda rows, columns, dtype: torch.empty(2 * rows, columns, dtype=dtype)[::2],
    "every other column": lambda rows, columns, dtype: torch.empty(rows, 2 * columns, dtype=dtype)[:, 1::2],
    "inner block": lambda rows, columns, dtype: torch.empty(rows + 3, columns + 4, dtype=dtype)[2:-1, 1:-3],
}
EXPANSIONS = {"one row": lambda x: x[:1].expand(x.shape), "one column": lambda x: x[:, :1].expand(x.shape)}


class Subclass(torch.Tensor):
    pass


WRAPPERS = {
    "plain": lambda x: x,
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter": lambda x: nn.Parameter(x, requires_grad=x.is_floating_point()),
}

clips = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), max_size=5)
some_clips = clips.filter(bool)


@st.composite
def tensors(draw, values: torch.Tensor, dtypes: list[torch.dtype]) -> torch.Tensor:
    """`values` in any dtype and memory layout; or their first row or column, over and over."""
    dtype, storage = draw(st.sampled_from(dtypes)), draw(st.sampled_from([*STORAGES, *EXPANSIONS]))
    if storage in EXPANSIONS:
        tensor = EXPANSIONS[storage](values.to(dtype))
    else:
        tensor = STORAGES[storage](len(values), values.shape[1], dtype).copy_(values)
    return WRAPPERS[draw(st.sampled_from(list(WRAPPERS)))](tensor)


@cache
def reference(is_native: bool, dtype: torch.dtype):
    return reference_model(dtype, is_native=is_native, **GEOMETRY)


@cache
def in_float64(is_native: bool, dtype: torch.dtype):
    return copy.deepcopy(reference(is_native, dtype)).double()


@cache
def model(is_native: bool = True, dtype: torch.dtype = torch.float32, attn: str = "sdpa", merge_temporal: bool = False):
    return packing_model(reference(is_native, dtype), attn=attn, merge_temporal=merge_temporal)


def batch(clips: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    grid_thw = torch.tensor(clips, dtype=torch.int64).reshape(-1, 3)
    return torch.randn(int(grid_thw.prod(1).sum()), PATCH_DIM), grid_thw


def embedded(original, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One frame through the original's embeddings; learned positions resized by `F.interpolate`."""
    pixels = patches.reshape(height, width, 3, PATCH_SIZE, PATCH_SIZE).permute(2, 0, 3, 1, 4)
    pixels = pixels.reshape(1, 3, height * PATCH_SIZE, width * PATCH_SIZE)
    if original.config.is_native:
        return original.embeddings(pixels)[0]
    learned = original.embeddings.position_embedding.weight.T.reshape(1, -1, LEARNED_SIDE, LEARNED_SIDE)
    positions = F.interpolate(learned, size=(height, width), mode="bicubic", align_corners=False)
    embeddings = original.embeddings.patch_embed(pixels).flatten(2).transpose(1, 2)
    return (original.embeddings.rms_norm(embeddings) + positions.flatten(2).transpose(1, 2))[0]


@torch.inference_mode()
def expected_outputs(original, hidden_states: torch.Tensor, clips: list[list[int]], merge_temporal: bool):
    """Features and pooled vectors of the original, segment by segment."""
    features, pooled = [torch.zeros(0, 16)], [torch.zeros(0, 16)]
    patches = iter(hidden_states.split([h * w for t, h, w in clips for _ in range(t)]))
    for t, h, w in clips:
        frames = [embedded(original, next(patches), h, w) for _ in range(t)]
        for segment in [torch.cat(frames)] if merge_temporal else frames:
            output = original.rms_norm(original.encoder(inputs_embeds=segment[None]).last_hidden_state)
            features.append(output[0])
            pooled.append(original.head(output))
    return torch.cat(features), torch.cat(pooled)


@given(
    clips=clips,
    is_native=st.booleans(),
    merge_temporal=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    attn=st.sampled_from(["sdpa", "eager"]),
    grad_mode=st.sampled_from([torch.inference_mode, torch.no_grad, torch.enable_grad]),
    ahead=st.booleans(),
    random=st.random_module(),
    data=st.data(),
)
def test_valid_arguments_give_the_outputs_of_the_original(
    clips, is_native, merge_temporal, dtype, attn, grad_mode, ahead, random, data
):
    grid_thw = data.draw(tensors(batch(clips)[1], SIGNED + UNSIGNED), "grid_thw")
    clips = grid_thw.tolist()
    hidden_states = data.draw(tensors(batch(clips)[0], FLOATS), "hidden_states")
    before = hidden_states.detach().clone()
    packed = model(is_native, dtype, attn, merge_temporal)
    with grad_mode():
        if ahead:
            outputs = packed(hidden_states, layout=packed_layout(grid_thw, packed.config))
        else:
            outputs = packed(hidden_states, grid_thw)

    original = in_float64(is_native, dtype)
    expected = expected_outputs(original, before.to(dtype).double(), clips, merge_temporal)
    for ours, theirs in zip(outputs.to_tuple(), expected, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()
        if len(ours):
            assert ours.untyped_storage().data_ptr() != hidden_states.untyped_storage().data_ptr()
    assert torch.equal(hidden_states.float(), before.float())
    assert grid_thw.tolist() == clips


def refusal(packed, *args, **kwargs) -> str:
    """The message of the ValueError, raised before any module ran."""
    ran = []
    hook = packed.embeddings.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError) as error:
            packed(*args, **kwargs)
    finally:
        hook.remove()
    assert not ran
    return str(error.value)


def described(argument) -> str:
    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__
    if argument.is_nested:
        return "a nested tensor"
    if argument.layout != torch.strided:
        return f"a {argument.layout} tensor"
    return f"{argument.dtype} of shape {tuple(argument.shape)}"


def not_tensors(tensor: torch.Tensor) -> list:
    return [tensor.tolist(), tensor.numpy(), tuple(tensor), tensor.shape, "tensor", 1, {"tensor": tensor}]


def not_strided(tensor: torch.Tensor) -> list:
    return [tensor.to_sparse(), tensor.to_sparse_csr(), torch.nested.as_nested_tensor([tensor])]


@given(clips=clips, data=st.data())
def test_hidden_states_of_another_kind_are_refused(clips, data):
    hidden_states, grid_thw = batch(clips)
    count = len(hidden_states)
    shapes = [(), (count,), (1, count, PATCH_DIM), (count, PATCH_DIM, 1), (count, 0), (PATCH_DIM, count + 13)]
    shapes += [(count, PATCH_DIM + extra) for extra in (-11, -1, 1, PATCH_DIM)]
    argument = data.draw(
        st.one_of(
            st.sampled_from([None, *not_tensors(hidden_states)]),
            st.sampled_from([*not_strided(hidden_states), hidden_states.to_mkldnn()]),
            st.sampled_from(NOT_FLOATS).map(lambda dtype: torch.empty(count, PATCH_DIM, dtype=dtype)),
            st.sampled_from(shapes).map(torch.zeros),
        )
    )
    message = refusal(model(), argument, grid_thw)
    assert (
        f"`hidden_states` must be a tensor of floating-point patches of shape (total_patches, {PATCH_DIM})" in message
    )
    assert message.endswith(f"got {described(argument)}.")


@given(clips=clips, data=st.data())
def test_a_grid_of_another_kind_is_refused(clips, data):
    hidden_states, grid_thw = batch(clips)
    count = len(grid_thw)
    shapes = [(), (3,), (1, count, 3), (count, 3, 1), (count, 0), (count, 2), (count, 4), (3, count + 4)]
    argument = data.draw(
        st.one_of(
            st.sampled_from([*not_tensors(grid_thw), packed_layout(grid_thw, model().config)]),
            st.sampled_from(not_strided(grid_thw)),
            st.sampled_from(NOT_INTEGERS).map(lambda dtype: torch.empty(count, 3, dtype=dtype)),
            st.sampled_from(shapes).map(lambda shape: torch.ones(shape, dtype=torch.int64)),
        )
    )
    message = refusal(model(), hidden_states, argument)
    assert "`grid_thw` must be a tensor of integers of shape (num_images, 3)" in message
    assert message.endswith(f"got {described(argument)}.")


@given(clips=some_clips, dtype=st.sampled_from(SIGNED + UNSIGNED), data=st.data())
def test_sizes_that_cannot_be_are_refused(clips, dtype, data):
    """Zero, negative, or so large that products leave int32 and int64: none may pass for the number of patches."""
    hidden_states, grid_thw = batch(clips)
    limits = torch.iinfo(dtype)
    near_limit = [size for size in (limits.max, limits.max - 1, 2**62, 2**32, 2**31) if 6 < size <= limits.max]
    index, axis = data.draw(st.integers(0, len(clips) - 1)), data.draw(st.integers(0, 2))
    size = data.draw(st.one_of(st.sampled_from(near_limit), st.integers(limits.min, 0), st.integers(7, limits.max)))
    rows = grid_thw.tolist()
    rows[index][axis] = size
    message = refusal(model(), hidden_states, torch.tensor(rows, dtype=dtype))
    if size < 1:
        assert message == f"`grid_thw` must hold sizes of at least 1, got {tuple(rows[index])} for image {index}."
    else:
        described = sum(prod(row) for row in rows)
        assert message == f"`grid_thw` describes {described} patches, but `hidden_states` holds {len(hidden_states)}."


@given(clips=clips, difference=st.integers(-40, 40).filter(bool))
def test_another_number_of_patches_is_refused(clips, difference):
    hidden_states, grid_thw = batch(clips)
    count = max(0, len(hidden_states) + difference)
    if count != len(hidden_states):
        layout = packed_layout(grid_thw, model().config)
        message = refusal(model(), torch.zeros(count, PATCH_DIM), grid_thw)
        assert "`grid_thw` describes" in message
        assert f"`hidden_states` holds {count}" in message
        message = refusal(model(), torch.zeros(count, PATCH_DIM), layout=layout)
        assert message == f"`layout` describes {len(hidden_states)} patches, but `hidden_states` holds {count}."


def test_more_images_than_patches_are_refused_at_once():
    grid_thw = torch.ones(1, 3, dtype=torch.int64).expand(10**9, 3)
    message = refusal(model(), torch.zeros(4, PATCH_DIM), grid_thw)
    assert message == (
        "`grid_thw` describes 1000000000 images of at least one patch, but `hidden_states` holds 4 patches."
    )


def test_tensors_without_values_are_refused():
    hidden_states, grid_thw = batch([(1, 2, 3)])
    assert "`hidden_states` is on the meta device" in refusal(model(), hidden_states.to("meta"), grid_thw)
    assert "`grid_thw` must hold sizes" in refusal(model(), hidden_states, grid_thw.to("meta"))


@pytest.mark.parametrize("is_native", [True, False])
def test_shapes_can_be_had_without_values(is_native):
    """A model on the meta device computes shapes; and a default device moves no part of a layout."""
    hidden_states, grid_thw = batch([(1, 2, 3), (2, 4, 1)])
    expected = model(is_native)(hidden_states, grid_thw)
    hub_module("layout").axis_taps.cache_clear()
    with torch.device("meta"):
        ours = model(is_native)(hidden_states, grid_thw)
        shapes = copy.deepcopy(model(is_native)).to("meta")(hidden_states.to("meta"), grid_thw)
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(ours[name], expected[name])
        assert shapes[name].is_meta
        assert shapes[name].shape == expected[name].shape


@given(clips=some_clips, other=some_clips)
def test_a_layout_of_other_images_is_refused(clips, other):
    """Where its patches are as many: then nothing tells them apart, and the layout that was given counts."""
    hidden_states, grid_thw = batch(clips)
    given = {"layout": packed_layout(torch.tensor(other), model().config)}
    described = sum(prod(clip) for clip in other)
    if described != len(hidden_states):
        assert f"describes {described} patches" in refusal(model(), hidden_states, grid_thw, **given)
    else:
        ours, expected = model()(hidden_states, **given), model()(hidden_states, torch.tensor(other))
        assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5


sizes = st.one_of(st.integers(1, 3), st.integers(-2, 6), st.integers(-(2**63), 2**63 - 1))
shapes = st.one_of(
    st.tuples(st.integers(0, 12), st.just(PATCH_DIM)), st.lists(st.integers(0, 13), max_size=4).map(tuple)
)
columns = st.one_of(st.just(3), st.integers(0, 4))
grids = st.one_of(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)), min_size=1, max_size=3),
    columns.flatmap(lambda width: st.lists(st.lists(sizes, min_size=width, max_size=width), max_size=3)),
)


@given(shape=shapes, dtype=st.sampled_from(FLOATS[:4] + NOT_FLOATS[:-1]), grid=grids, random=st.random_module())
def test_any_pair_of_tensors_is_taken_or_refused(shape, dtype, grid, random):
    grid_thw = torch.tensor(grid, dtype=torch.int64)
    hidden_states = torch.zeros(shape, dtype=dtype)
    valid = (
        dtype in FLOATS
        and len(shape) == 2
        and shape[1] == PATCH_DIM
        and grid_thw.ndim == 2
        and grid_thw.shape[1] == 3
        and all(min(row) >= 1 for row in grid)
        and sum(prod(row) for row in grid) == shape[0]
    )
    if valid:
        assert model()(hidden_states, grid_thw).last_hidden_state.isfinite().all()
    else:
        message = refusal(model(), hidden_states, grid_thw)
        assert "`hidden_states`" in message or "`grid_thw`" in message
