# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What `forward` takes, refuses and returns."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from reference import (
    ODD_GRIDS,
    TINY,
    Aimv2PackingConfig,
    hub_module,
    pack,
    packed_layout,
    packing_model,
    random_images,
    reference_model,
    with_positions,
)
from transformers import vision_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling


unpack_features, merge_patches = hub_module("layout").unpack_features, hub_module("batching").merge_patches


@pytest.fixture(scope="module")
def model():
    return packing_model(reference_model(use_head=True))


def patches(count: int, width: int = 588, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, width, dtype=dtype)


@pytest.mark.parametrize(
    ("hidden_states", "grid_thw", "named"),
    [
        (patches(4)[None], torch.tensor([[1, 2, 2]]), ["hidden_states", "(1, 4, 588)", "588"]),
        (patches(4, 587), torch.tensor([[1, 2, 2]]), ["hidden_states", "(4, 587)", "588"]),
        (patches(4, dtype=torch.uint8), torch.tensor([[1, 2, 2]]), ["hidden_states", "uint8"]),
        (torch.empty(4, 588, dtype=torch.float4_e2m1fn_x2), torch.tensor([[1, 2, 2]]), ["hidden_states", "float4"]),
        ([[0.0] * 588] * 4, torch.tensor([[1, 2, 2]]), ["hidden_states", "list"]),
        (patches(4), torch.tensor([[1.0, 2.0, 2.0]]), ["grid_thw", "float32"]),
        (patches(4), torch.tensor([[True, True, True]]), ["grid_thw", "bool"]),
        (patches(4), [[1, 2, 2]], ["grid_thw", "list"]),
        (patches(4), torch.tensor([1, 2, 2]), ["grid_thw", "(3,)"]),
        (patches(4), torch.tensor([[2, 2]]), ["grid_thw", "(1, 2)"]),
        (patches(4), torch.tensor([[1, 2, 2], [1, 0, 3]]), ["grid_thw", "(1, 0, 3)", "image 1"]),
        (patches(4), torch.tensor([[1, -2, -2]]), ["grid_thw", "(1, -2, -2)"]),
        (patches(4), torch.tensor([[1, 2, 3]]), ["grid_thw", "6", "4"]),
        (patches(0), torch.tensor([[1, 1, 1]]), ["grid_thw", "1", "0"]),
        (patches(1), torch.zeros(0, 3, dtype=torch.int64), ["grid_thw", "0", "1"]),
        (patches(4), torch.tensor([[2**40, 2**40, 2**40]]), ["grid_thw", str(2**120), "4"]),
        (patches(4), None, ["grid_thw", "NoneType"]),
    ],
)
def test_bad_input_is_refused_before_any_work(model, hidden_states, grid_thw, named):
    with pytest.raises(ValueError) as error:
        model(hidden_states, grid_thw)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize(
    "given",
    [{}, {"hidden_states": patches(4)}, {"hidden_states": patches(4).numpy(), "grid_thw": np.array([[1, 2, 2]])}],
    ids=["nothing", "no grid_thw", "NumPy arrays, as without return_tensors"],
)
def test_what_the_processor_makes_is_asked_for(model, given):
    with pytest.raises(ValueError, match=r'as `processor\(images, return_tensors="pt"\)` makes'):
        model(**given)


def test_too_many_patches_to_count_are_refused():
    for grid in ([1, 2**16, 2**16], [1, 2, 2**30]):
        with pytest.raises(ValueError, match=r"2\*\*31"):
            packed_layout(torch.tensor([grid]), Aimv2PackingConfig())
    most = packed_layout(torch.tensor([[1, 1, 2**31 - 1]]), Aimv2PackingConfig())
    assert most.cu_seqlens.tolist() == [0, 2**31 - 1] and most.max_seqlen == 2**31 - 1


def layout_of(grids, **changes):
    return dataclasses.replace(packed_layout(torch.tensor(grids), Aimv2PackingConfig()), **changes)


def layout_of_four(**changes):
    """Of one image of four patches, with changes."""
    return layout_of([[1, 2, 2]], **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seqlens": [0, 4]}, "`cu_seqlens` must be a tensor of integers"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "`cu_seqlens` must be a tensor of integers"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "`cu_seqlens` must be a tensor of integers of shape (num_"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, "`cu_seqlens` must be a tensor of integers of shape (num_segments"),
        ({"cu_seqlens": torch.tensor([0, 4]).to_sparse()}, "(num_segments + 1,), got a torch.sparse_coo tensor"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "`cu_seqlens` describes 3 patches, but `hidden_states` holds 4"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "`cu_seqlens` must begin with 0 and rise"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 4])}, "`cu_seqlens` must begin with 0 and rise"),
        ({"cu_seqlens": torch.tensor([0, 4]), "max_seqlen": 3}, "`max_seqlen` must be at least the longest segment, 4"),
        (
            {"position_ids": torch.zeros(4, 3, dtype=torch.int64)},
            "`position_ids` must be a tensor of integers of shape (4, 2)",
        ),
        ({"position_ids": torch.zeros(4, 2)}, "`position_ids` must be a tensor of integers of shape (4, 2)"),
        (
            {"position_ids": [[0, 0]] * 4},
            "`position_ids` must be a tensor of integers of shape (4, 2), one row per patch",
        ),
        ({"interp_indices": torch.zeros(4, 16)}, "`interp_indices` must be a tensor of integers of shape (4, 16)"),
        (
            {"interp_weights": torch.zeros(4, 16, dtype=torch.int64)},
            "`interp_weights` must be a tensor of floating-point values of shape (4, 16)",
        ),
        ({"layout": packed_layout(torch.tensor([[1, 2, 3]]), Aimv2PackingConfig())}, "`layout` describes 6 patches"),
        ({"layout": {"cu_seqlens": torch.tensor([0, 4])}}, "`layout` must be a "),
        (
            {"layout": layout_of_four(), "cu_seqlens": torch.tensor([0, 4])},
            "`layout` says all that 'cu_seqlens' would",
        ),
        ({"layout": layout_of_four(cu_seqlens=torch.tensor([0, 2, 4]))}, "`layout.cu_seqlens` must be of shape (2,)"),
        ({"layout": layout_of_four(max_seqlen=3)}, "`max_seqlen` must be at least the longest segment, 4 patches"),
        (
            {"layout": layout_of([[1, 1, 1], [1, 1, 3]], max_seqlen=2)},
            "`max_seqlen` must be at least the longest segment, 3 patches",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 1, 4]), "max_seqlen": 2},
            "`max_seqlen` must be at least the longest segment, 3 patches",
        ),
        (
            {"layout": layout_of_four(position_ids=torch.zeros(5, 2, dtype=torch.int64))},
            "`position_ids` must be a tensor of integers of shape (4, 2)",
        ),
        ({"layout": layout_of_four(runs=None, cu_seqlens=torch.tensor([0, 3]))}, "`cu_seqlens` describes 3 patches"),
        (
            {"interp_weights": torch.zeros(5, 16)},
            "`interp_weights` must be a tensor of floating-point values of shape (4, 16)",
        ),
    ],
)
def test_values_computed_ahead_must_describe_the_patches(model, given, message):
    with pytest.raises(ValueError) as error:
        model(patches(4), torch.tensor([[1, 2, 2]]), **given)
    assert message in str(error.value)


def test_unknown_arguments_are_refused_by_name(model):
    """And let through where they are None, or where transformers, Trainer and PEFT pass them to any model."""
    inputs = pack(random_images([(2, 2)]))
    with pytest.raises(TypeError, match="`ouput_hidden_states` is not an argument"):
        model(**inputs, ouput_hidden_states=True)
    with pytest.raises(ValueError, match=r"`pixel_values`.*`hidden_states`.*image processor"):
        model(pixel_values=torch.zeros(1, 3, 28, 28))
    for call in (model.get_image_features, model.get_intermediate_layers):
        with pytest.raises(ValueError, match=r"`pixel_values`.*`hidden_states`.*image processor"):
            call(pixel_values=torch.zeros(1, 3, 28, 28))
    with pytest.raises(TypeError, match=r"`image_grid_thw` is not .*`forward`\. Its name here is `grid_thw`; leave"):
        model(**inputs, image_grid_thw=inputs["grid_thw"])
    with pytest.raises(TypeError, match=r"`image_sizes` is not an argument of `forward`\.$"):
        model(**inputs, image_sizes=[(28, 28)])
    passed = {
        "input_ids": None,
        "attention_mask": None,
        "output_attentions": None,
        "num_items_in_batch": torch.ones(()),
        "use_cache": True,
        "is_causal": False,
        "output_router_logits": False,
    }
    with torch.inference_mode():
        assert torch.equal(model(**inputs, **passed)[0], model(**inputs)[0])


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("is_causal", True, None),
        ("cu_seq_lens_q", torch.tensor([0, 1, 4]), "cu_seqlens"),
        ("cu_seq_lens_k", torch.tensor([0, 1, 4]), "cu_seqlens"),
        ("max_length_q", 2, "max_seqlen"),
        ("max_length_k", 2, "max_seqlen"),
        ("seq_idx", torch.zeros(1, 4), None),
        ("output_router_logits", True, None),
    ],
)
def test_arguments_of_transformers_that_would_change_nothing_are_refused(model, name, value, own):
    hint = rf" Its name here is `{own}`; leave out what is of a text\." if own else ""
    with pytest.raises(TypeError, match=rf"^`{name}` is not an argument of `forward`\.{hint}$"):
        model(patches(4), torch.tensor([[1, 2, 2]]), **{name: value})


def test_attention_maps_of_other_kernels_than_eager_are_refused(model):
    with pytest.raises(ValueError, match=r"`output_attentions` needs `attn_implementation='eager'`.*got 'sdpa'"):
        model(patches(4), torch.tensor([[1, 2, 2]]), output_attentions=True)
    packed = packing_model(reference_model(), attn="eager")
    packed.config.output_attentions = True
    packed.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"`output_attentions` needs `attn_implementation='eager'`.*got 'sdpa'"):
        packed(patches(4), torch.tensor([[1, 2, 2]]))


def test_attention_maps_are_those_of_the_original_image_by_image():
    reference = reference_model(attn="eager")
    packed, images = packing_model(reference, attn="eager"), random_images([(2, 3), (2, 3), (5, 1)])
    with torch.inference_mode():
        ours = packed(**pack(images), output_attentions=True).attentions
        theirs = [reference(image[None], output_attentions=True).attentions for image in images]
    assert len(ours) == reference.config.num_hidden_layers
    for layer, maps in enumerate(ours):
        for image, weights in enumerate(maps):
            assert (weights - theirs[image][layer][0]).abs().max() < 1e-5


def test_attention_maps_are_asked_for_by_the_configuration_too():
    """And what a call says of them goes before it, as in transformers."""
    packed, inputs = packing_model(reference_model(), attn="eager"), pack(random_images([(2, 3), (1, 2)]))
    with torch.inference_mode():
        expected = packed(**inputs, output_attentions=True).attentions
        packed.config.output_attentions = True
        for given in ({}, {"output_attentions": None}):
            torch.testing.assert_close(packed(**inputs, **given).attentions, expected, rtol=0, atol=0)
        assert packed(**inputs, output_attentions=False).attentions is None
        packed.config._attn_implementation = "sdpa"
        assert packed(**inputs, output_attentions=False).attentions is None


def test_attention_maps_of_a_batch_in_several_calls(monkeypatch):
    packed, inputs = packing_model(reference_model(), attn="eager"), pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = packed(**inputs, output_attentions=True).attentions
        monkeypatch.setattr(hub_module("layout"), "MAX_SEGMENTS_PER_CALL", 4)
        monkeypatch.setattr(hub_module("modeling"), "in_several_calls", lambda _, layout: len(layout.lengths) > 4)
        ours = packed(**inputs, output_attentions=True).attentions
    for maps, theirs in zip(ours, expected, strict=True):
        assert len(maps) == len(ODD_GRIDS)
        for weights, other in zip(maps, theirs, strict=True):
            assert (weights - other).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("asked_by_configuration", [False, True])
def test_attention_maps_of_a_program_for_any_mix_are_refused(asked_by_configuration, on_a_gpu, monkeypatch):
    """It does not know how many segments there are."""
    monkeypatch.setattr(hub_module("modeling"), "has_varlen_kernel", lambda *_: on_a_gpu)
    packed, inputs = packing_model(reference_model(), attn="eager"), pack(random_images(ODD_GRIDS))
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)

    packed.config.output_attentions = asked_by_configuration

    class Maps(torch.nn.Module):
        def forward(self, hidden_states, cu_seqlens, position_ids):
            given = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
            given |= {} if asked_by_configuration else {"output_attentions": True}
            return packed(hidden_states, **given).attentions[0]

    values = (inputs["hidden_states"], layout.cu_seqlens, layout.position_ids)
    with pytest.raises(ValueError, match="`output_attentions` needs the lengths of the segments"):
        torch.jit.trace(Maps(), values)


@pytest.mark.parametrize(("is_native", "name"), [(True, "interp_weights"), (False, "position_ids")])
def test_positions_that_the_model_does_not_read_are_refused(is_native, name):
    """Unless those that it reads are there, too: transformers' exporters give all."""
    packed, inputs = packing_model(reference_model(is_native=is_native)), pack(random_images([(2, 2)]))
    unread = {"interp_weights": torch.zeros(4, 16), "position_ids": torch.zeros(4, 2, dtype=torch.int64)}[name]
    with pytest.raises(ValueError, match=f"`{name}` is not read by a model with .* positions"):
        packed(**inputs, **{name: unread})
    layout = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)
    read = {own: value for own, value in layout.tensors().items() if own.startswith(("position", "interp"))}
    with torch.inference_mode():
        assert torch.equal(packed(**inputs, **read, **{name: unread})[0], packed(**inputs)[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integer_dtype_and_any_strides(model, dtype):
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        strided = inputs["hidden_states"].T.contiguous().T
        assert not strided.is_contiguous()
        ours = model(strided, inputs["grid_thw"].to(dtype).T.contiguous().T).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5


SMALL_INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]


@pytest.mark.parametrize("dtype", SMALL_INTEGERS)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("is_native", [True, False])
def test_what_was_computed_before_may_be_of_any_integer_dtype(is_native, plain, dtype):
    model, inputs = packing_model(reference_model(is_native=is_native), plain=plain), pack(random_images([(3, 4)] * 2))
    layout = with_positions(packed_layout(inputs["grid_thw"], model.config), model.config)
    narrow = {name: x.to(dtype) for name, x in layout.tensors().items() if not x.is_floating_point()}
    given = {name: narrow.get(name, x) for name, x in layout.tensors().items() if name != "frame_sizes"}
    with torch.inference_mode():
        expected = model.get_image_features(**inputs).pooler_output
        for ours in (given, {"layout": dataclasses.replace(layout, **narrow)}):
            features = model.get_image_features(inputs["hidden_states"], **ours).pooler_output
            assert (features - expected).abs().max() < 1e-5


def test_a_longest_segment_given_alone_is_compared(model):
    inputs = pack(random_images([(2, 3), (1, 2)]))
    with torch.inference_mode():
        assert torch.equal(model(**inputs, max_seqlen=6)[0], model(**inputs)[0])
    with pytest.raises(ValueError, match="`max_seqlen` must be at least the longest segment, 6 patches, got 2"):
        model(**inputs, max_seqlen=2)


@pytest.mark.parametrize("max_seqlen", ["6", 6.5, torch.tensor(6.0), [6]])
def test_a_longest_segment_that_is_no_integer_is_refused(model, max_seqlen):
    inputs = pack(random_images([(2, 3), (1, 2)]))
    layout = dataclasses.replace(packed_layout(inputs["grid_thw"], model.config), max_seqlen=max_seqlen)
    for given in ({}, {"cu_seqlens": torch.tensor([0, 6, 8])}):
        with pytest.raises(ValueError, match="`max_seqlen` must be an int, got "):
            model(**inputs, **given, max_seqlen=max_seqlen)
    with pytest.raises(ValueError, match="`max_seqlen` must be an int, got "):
        model(inputs["hidden_states"], layout=layout)


def test_a_layout_with_boundaries_that_are_no_integers_is_refused(model):
    layout = packed_layout(torch.tensor([[1, 2, 3]]), model.config)
    layout = dataclasses.replace(layout, cu_seqlens=layout.cu_seqlens.half())
    with pytest.raises(ValueError, match=r"`layout\.cu_seqlens` must be .* of integers, got torch\.float16"):
        model(patches(6), layout=layout)


@pytest.mark.parametrize("image_size", [28, 112])
def test_positions_of_another_size_are_refused(image_size):
    """The indices of few positions are valid among many."""
    model, inputs = packing_model(reference_model(is_native=False)), pack(random_images([(2, 3)]))
    other = Aimv2PackingConfig(**{**TINY, "is_native": False, "image_size": image_size})
    layout = with_positions(packed_layout(inputs["grid_thw"], other), other)
    side = image_size // 14
    with pytest.raises(ValueError, match=rf"`layout` must .* grid of {side} x {side}, the model has 4 x 4"):
        model(inputs["hidden_states"], layout=layout)


@pytest.mark.parametrize(
    ("made", "changed"),
    [
        ({"is_native": False}, {"image_size": 28}),
        ({"is_native": False}, {"image_size": 112}),
        ({"is_native": False}, {"is_native": True}),
        ({"is_native": True}, {"is_native": False}),
        ({"use_head": False}, {"use_head": True}),
    ],
)
def test_a_configuration_that_needs_other_weights_is_refused(made, changed):
    """Set after the model was made, it would be read with the weights that are there."""
    model, inputs = packing_model(reference_model(**made)), pack(random_images([(2, 3)]))
    for name, value in changed.items():
        setattr(model.config, name, value)
    for call in (model, model.get_image_features, model.get_intermediate_layers):
        with pytest.raises(ValueError, match=f"`{next(iter(changed))}`.* of `config` must be"):
            call(**inputs)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_layout_computed_ahead_gives_the_same(is_native):
    """By this repo's function, and by transformers' own."""
    model = packing_model(reference_model(use_head=True, is_native=is_native))
    inputs = pack(random_images(ODD_GRIDS))
    grid_thw = inputs["grid_thw"]
    theirs = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid_thw)}
    if is_native:
        theirs["position_ids"] = vision_utils.get_vision_position_ids(grid_thw, 1)
    else:
        names = ("interp_indices", "interp_weights")
        values = vision_utils.get_vision_interpolation_indices_and_weights(grid_thw, 4, mode="bicubic")
        theirs |= dict(zip(names, values, strict=True))
    with torch.inference_mode():
        expected = model(**inputs)
        layout = packed_layout(grid_thw, model.config)
        full = with_positions(layout, model.config)
        for given in ({"layout": layout}, {"layout": full}, {"layout": dataclasses.replace(full, grids=None)}, theirs):
            ours = model(inputs["hidden_states"], **given)
            assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
            assert (ours.pooler_output - expected.pooler_output).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", [[20], [4, 16]])
@pytest.mark.parametrize("is_native", [True, False])
def test_segments_of_ones_own_leave_positions_to_the_frames(is_native, lengths):
    model = packing_model(reference_model(is_native=is_native))
    inputs = pack(random_images([(4, 4), (2, 2)]))
    layout = packed_layout(inputs["grid_thw"], model.config)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    own = dataclasses.replace(layout, cu_seqlens=cu_seqlens.int(), runs=None, frame_sizes=None)
    with torch.inference_mode():
        expected = model(**inputs, cu_seqlens=cu_seqlens).last_hidden_state
        assert torch.equal(model(inputs["hidden_states"], layout=own).last_hidden_state, expected)
    resolve_layout = hub_module("layout").resolve_layout
    given = {"cu_seqlens": cu_seqlens}
    resolved = resolve_layout(inputs["hidden_states"], inputs["grid_thw"], None, given, model.config)
    assert resolved.frame_sizes is None
    assert resolved.lengths == tuple(lengths)


@pytest.mark.parametrize("name", ["interp_indices", "interp_weights"])
def test_half_of_the_interpolation_may_be_given(name):
    model = packing_model(reference_model(is_native=False))
    inputs = pack(random_images(ODD_GRIDS))
    layout = packed_layout(inputs["grid_thw"], model.config)
    full = with_positions(layout, model.config)
    changed = getattr(full, name).flip(1)
    with torch.inference_mode():
        whole = dataclasses.replace(full, **{name: changed})
        expected = model(inputs["hidden_states"], layout=whole).last_hidden_state
        ours = model(**inputs, **{name: changed}).last_hidden_state
        assert torch.equal(ours, expected)
        half = dataclasses.replace(layout, **{name: changed})
        assert torch.equal(model(inputs["hidden_states"], layout=half).last_hidden_state, expected)


def test_positions_outside_the_grid_may_be_given(model):
    """Of an image cut from a larger one: what its patches alone, as one segment, give at these positions."""
    inputs = pack(random_images([(2, 3)]))
    inside = with_positions(packed_layout(inputs["grid_thw"], model.config), model.config).position_ids
    with torch.inference_mode():
        for position_ids in (inside, inside + torch.tensor([4, 40]), inside - 5):
            ours = model(**inputs, position_ids=position_ids).last_hidden_state
            given = {"cu_seqlens": torch.tensor([0, 6]), "position_ids": position_ids}
            assert (ours - model(inputs["hidden_states"], **given).last_hidden_state).abs().max() < 1e-5


def test_positions_beyond_the_number_that_a_layout_says_are_an_error(model):
    inputs = pack(random_images([(2, 3)]))
    layout = with_positions(packed_layout(inputs["grid_thw"], model.config), model.config)
    for position_ids in (layout.position_ids - 1, layout.position_ids + 1):
        expected = model(**inputs, position_ids=position_ids).last_hidden_state
        changed = dataclasses.replace(layout, position_ids=position_ids)
        with pytest.raises(IndexError):
            model(inputs["hidden_states"], layout=changed)
        unbounded = dataclasses.replace(changed, num_positions=None)
        ours = model(inputs["hidden_states"], layout=unbounded).last_hidden_state
        torch.testing.assert_close(ours, expected)


def test_positions_of_no_frames_are_refused():
    config = Aimv2PackingConfig()
    layout = dataclasses.replace(packed_layout(torch.tensor([[1, 2, 2]]), config), grids=None)
    with pytest.raises(ValueError, match="`grids` must be in a layout"):
        with_positions(layout, config)


def test_layout_by_hand():
    grid_thw = torch.tensor([[1, 1, 2], [2, 2, 1], [1, 3, 1]])
    layout = packed_layout(grid_thw, Aimv2PackingConfig(is_native=True))
    assert layout.grids == ((1, 1, 2), (2, 2, 1), (1, 3, 1))
    assert layout.frame_sizes.dtype == torch.int32
    assert layout.frame_sizes.tolist() == [[1, 2, 2, 3], [2, 1, 1, 1]]
    merged = packed_layout(grid_thw, Aimv2PackingConfig(is_native=True, merge_temporal=True))
    assert merged.lengths == (2, 4, 3)
    assert merged.frame_sizes.tolist() == [[1, 2, 3], [2, 1, 1]]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 6, 9]
    assert layout.max_seqlen == 3
    assert layout.runs == ((3, 2), (1, 3))
    assert layout.lengths == (2, 2, 2, 3)
    assert layout.num_positions == 3
    positions = [with_positions(own, Aimv2PackingConfig(is_native=True)).position_ids for own in (layout, merged)]
    assert torch.equal(*positions)
    assert positions[0].tolist() == [
        [0, 0], [0, 1],
        [0, 0], [1, 0], [0, 0], [1, 0],
        [0, 0], [1, 0], [2, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("merge_temporal", [True, False])
def test_the_layout_of_no_images(merge_temporal):
    config = Aimv2PackingConfig(is_native=True, merge_temporal=merge_temporal)
    layout = with_positions(packed_layout(torch.zeros(0, 3, dtype=torch.int64), config, 0), config)
    assert (layout.runs, layout.lengths, layout.grids, layout.max_seqlen, layout.num_positions) == ((), (), (), 0, 0)
    assert layout.cu_seqlens.tolist() == [0]
    assert layout.frame_sizes.shape == layout.position_ids.T.shape == (2, 0)


def test_segments_of_no_patches_are_a_valid_batch(model):
    own = {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "position_ids": torch.zeros(0, 2, dtype=torch.int64)}
    layout = packed_layout(torch.zeros(0, 3, dtype=torch.int64), model.config)
    for given in (own, {**own, "max_seqlen": 0}, {"layout": layout}):
        with torch.inference_mode():
            outputs = model(patches(0), **given)
        assert outputs.last_hidden_state.shape == outputs.pooler_output.shape == (0, 64)


def test_hidden_states_are_asked_for_by_the_configuration_too():
    packed, inputs = packing_model(reference_model()), pack(random_images([(2, 2)]))
    with torch.inference_mode():
        for asked, count in ((None, None), (False, None), (True, 3)):
            packed.config.output_hidden_states = asked
            states = packed(**inputs).hidden_states
            assert (states if states is None else len(states)) == count
            assert packed(**inputs, output_hidden_states=False).hidden_states is None


def test_outputs_as_in_transformers(model):
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        outputs = model(**inputs)
        detailed = model(**inputs, output_hidden_states=True)
        as_tuple = model(**inputs, return_dict=False)
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert outputs.hidden_states is None
    assert len(detailed.hidden_states) == model.config.num_hidden_layers + 1
    with torch.inference_mode():
        torch.testing.assert_close(model.rms_norm(detailed.hidden_states[-1]), outputs.last_hidden_state)
    assert len({id(state) for state in detailed.hidden_states}) == len(detailed.hidden_states)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], outputs.last_hidden_state)
    assert torch.equal(as_tuple[1], outputs.pooler_output)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("is_native", [True, False])
def test_no_images_is_a_valid_batch(is_native, attn):
    model = packing_model(reference_model(use_head=True, is_native=is_native), attn=attn).train()
    outputs = model(patches(0), torch.zeros(0, 3, dtype=torch.int64), output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (0, 64)
    assert outputs.pooler_output.shape == (0, 64)
    (outputs.last_hidden_state.sum() + outputs.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("merge_temporal", [False, True])
def test_a_model_without_a_head_gives_the_mean_over_the_patches(merge_temporal):
    model = packing_model(reference_model(), merge_temporal=merge_temporal)
    grid_thw = torch.tensor([(1, 3, 4), (2, 2, 3), (1, 1, 1)])
    hidden_states = torch.randn(25, 588)
    with torch.inference_mode():
        outputs = model.get_image_features(hidden_states, grid_thw)
        as_tuple = model.get_image_features(hidden_states, grid_thw, return_dict=False)
        states = model.get_image_features(hidden_states, grid_thw, output_hidden_states=[1]).hidden_states
    lengths = [12, 12, 1] if merge_temporal else [12, 6, 6, 1]
    expected = torch.stack([part.mean(dim=0) for part in outputs.last_hidden_state.split(lengths)])
    torch.testing.assert_close(outputs.pooler_output, expected)
    assert torch.equal(as_tuple[1], outputs.pooler_output)
    with torch.inference_mode():
        assert torch.equal(states[1], model(hidden_states, grid_thw, output_hidden_states=True).hidden_states[1])


def test_a_model_with_a_head_gives_what_the_head_gives(model):
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        assert torch.equal(model.get_image_features(**inputs).pooler_output, model(**inputs).pooler_output)


@pytest.mark.parametrize("use_head", [True, False])
def test_segments_of_ones_own_are_pooled(use_head):
    packed = packing_model(reference_model(use_head=use_head))
    inputs = pack(random_images([(4, 4), (2, 2)]))
    cu_seqlens = torch.tensor([0, 5, 12, 20])
    with torch.inference_mode():
        outputs = packed.get_image_features(**inputs, cu_seqlens=cu_seqlens)
    assert outputs.pooler_output.shape == (3, 64)
    if not use_head:
        expected = torch.stack([part.mean(0) for part in outputs.last_hidden_state.split([5, 7, 8])])
        torch.testing.assert_close(outputs.pooler_output, expected)


@pytest.mark.parametrize("plain", [True, False])
def test_intermediate_layers_are_those_of_the_original(plain):
    """With and without the norm, by number and by index, as tokens and as maps; `hidden_states[k]` is block `k - 1`."""
    reference = reference_model(num_hidden_layers=4)
    packed = packing_model(reference, plain=plain)
    images = random_images([(3, 5), (2, 2)])
    inputs = pack(images)
    with torch.inference_mode():
        theirs = [reference(image[None], output_hidden_states=True).hidden_states for image in images]
        expected = [torch.cat([states[depth][0] for states in theirs]) for depth in range(5)]
        for n, depths in ((1, [4]), (3, [2, 3, 4]), (4, [1, 2, 3, 4]), ([2, 0, -1], [3, 1, 4]), ([-2], [3])):
            for ours, depth in zip(packed.get_intermediate_layers(**inputs, n=n, norm=False), depths, strict=True):
                assert (ours - expected[depth]).abs().max() < 1e-5
            for ours, depth in zip(packed.get_intermediate_layers(**inputs, n=n), depths, strict=True):
                assert (ours - reference.rms_norm(expected[depth])).abs().max() < 1e-5
        (last,) = packed.get_intermediate_layers(**inputs)
        assert (last - reference.rms_norm(expected[4])).abs().max() < 1e-5
        (maps,) = packed.get_intermediate_layers(**inputs, n=[1], reshape=True, norm=False)
        assert [tuple(image.shape) for image in maps] == [(1, 3, 5, 64), (1, 2, 2, 64)]
        assert (torch.cat([image.flatten(0, 2) for image in maps]) - expected[2]).abs().max() < 1e-5


@pytest.mark.parametrize("merge_temporal", [True, False])
def test_a_layout_for_another_configuration_is_refused(merge_temporal):
    """Such as one of the repo's own, where the model was loaded with another value."""
    packed = packing_model(reference_model(), merge_temporal=merge_temporal)
    layout = packed_layout(torch.tensor([[2, 3, 3]]), Aimv2PackingConfig(merge_temporal=not merge_temporal))
    with pytest.raises(ValueError, match=f"with `merge_temporal={merge_temporal}` there are . segments, got "):
        packed(patches(18), layout=layout)


@pytest.mark.parametrize("index", [np.int64(1), [np.int64(1)], torch.tensor([1])])
def test_indices_may_be_numpys_or_torchs(model, index):
    inputs = pack(random_images([(2, 2)]))
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=index).hidden_states
        assert torch.equal(states[1], model(**inputs, output_hidden_states=True).hidden_states[1])
        assert len(model.get_intermediate_layers(**inputs, n=index)) == 1


@pytest.mark.parametrize("index", [1.0, [0.5], "1", ["1"], np.True_, torch.tensor([0.0]), [None]])
def test_indices_that_are_no_integers_are_refused(model, index):
    inputs = pack(random_images([(2, 2)]))
    with pytest.raises(ValueError, match="`n` must be an int or a sequence of ints, got "):
        model.get_intermediate_layers(**inputs, n=index)
    with pytest.raises(ValueError, match="`output_hidden_states` must be an int or a sequence of ints, got "):
        model(**inputs, output_hidden_states=index)


def test_maps_have_the_sides_of_the_layout(model):
    inputs = pack(random_images([(2, 6), (3, 1)]))
    layout, of_other_sides = packed_layout(inputs["grid_thw"], model.config), torch.tensor([[1, 3, 5]])
    expected = model.get_intermediate_layers(**inputs, reshape=True)[0]
    for grid_thw in (None, of_other_sides):
        (maps,) = model.get_intermediate_layers(inputs["hidden_states"], grid_thw, reshape=True, layout=layout)
        assert [tuple(each.shape[:3]) for each in maps] == [(1, 2, 6), (1, 3, 1)]
        assert all(map(torch.equal, maps, expected))
    with pytest.raises(ValueError, match=r"`layout` must be a PackedLayout, .* got dict"):
        model.get_intermediate_layers(**inputs, reshape=True, layout=vars(layout))


@pytest.mark.parametrize("grid_thw", [[[1, 2, 2]], torch.ones(1, 2), torch.tensor([[1, -2, -2]])])
def test_maps_of_bad_grids_are_refused(grid_thw):
    with pytest.raises(ValueError, match="`grid_thw` must "):
        unpack_features(torch.zeros(4, 8), grid_thw)


@pytest.mark.parametrize("features", [BaseModelOutputWithPooling(torch.zeros(4, 8)), np.zeros((4, 8)), torch.ones(())])
def test_maps_of_what_are_no_features_are_refused(features):
    for function in (unpack_features, partial(merge_patches, merge_size=2)):
        with pytest.raises(ValueError, match="`features` must be a tensor of shape \\(total_patches, "):
            function(features, torch.tensor([[1, 2, 2]]))


def test_maps_need_grids_where_tokens_need_none(model):
    inputs = pack(random_images([(2, 3), (3, 1)]))
    hidden_states, layout = inputs["hidden_states"], packed_layout(inputs["grid_thw"], model.config)
    layout = dataclasses.replace(with_positions(layout, model.config), grids=None)
    with torch.inference_mode():
        (ours,) = model.get_intermediate_layers(hidden_states, layout=layout)
        assert torch.equal(ours, *model.get_intermediate_layers(**inputs))
    with pytest.raises(ValueError, match="`grid_thw` must be given with `reshape`"):
        model.get_intermediate_layers(hidden_states, layout=layout, reshape=True)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "return_dict"])
def test_intermediate_layers_take_no_option_of_outputs(name):
    packed = packing_model(reference_model(), attn="eager")
    with pytest.raises(TypeError, match=f"`{name}` is not an argument of `get_intermediate_layers`"):
        packed.get_intermediate_layers(**pack(random_images([(2, 2)])), **{name: True})


def test_a_mean_in_float64_is_one_in_float64():
    packed, inputs = packing_model(reference_model(torch.float64)), pack(random_images([(3, 5), (2, 2)]))
    with torch.inference_mode():
        outputs = packed.get_image_features(**inputs)
    expected = torch.stack([part.mean(0) for part in outputs.last_hidden_state.split([15, 4])])
    assert (outputs.pooler_output - expected).abs().max() < 1e-12


@pytest.mark.parametrize("plain", [True, False])
def test_no_block_after_the_last_one_needed_runs(plain):
    packed = packing_model(reference_model(num_hidden_layers=4), plain=plain)
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = packed.get_intermediate_layers(**inputs, n=[1])[0]
        for layer in packed.encoder.layers[2:]:
            torch.nn.init.constant_(layer.ffn.down_proj.weight, torch.nan)
        assert torch.equal(packed.get_intermediate_layers(**inputs, n=[1])[0], expected)
        assert packed(**inputs).last_hidden_state.isnan().any()


def test_blocks_that_are_not_needed_are_not_called():
    packed, inputs = packing_model(reference_model(num_hidden_layers=4), plain=True), pack(random_images([(2, 2)]))
    called = []
    for index, layer in enumerate(packed.encoder.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: called.append(index))
    for n, needed in (([1], [0, 1]), ([-3, 0], [0, 1]), (1, [0, 1, 2, 3])):
        called.clear()
        packed.get_intermediate_layers(**inputs, n=n)
        assert called == needed


@pytest.mark.parametrize("n", [0, 3, [2], [-3], [0, 5]])
def test_blocks_that_are_not_there_are_refused(model, n):
    with pytest.raises(ValueError, match=r"`n` must name blocks of 2, .* got "):
        model.get_intermediate_layers(**pack(random_images([(2, 2)])), n=n)


def test_hidden_states_can_be_chosen(model):
    """By index, as transformers' models let it; the others are `None`."""
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        whole = model(**inputs, output_hidden_states=True).hidden_states
        for chosen, kept in ((-2, [1]), ([0, 2], [0, 2]), ([1, 7], [1]), ([1, 3, -4], [1]), (-3, [0])):
            states = model(**inputs, output_hidden_states=chosen).hidden_states
            assert [index for index, state in enumerate(states) if state is not None] == kept
            assert all(torch.equal(states[index], whole[index]) for index in kept)


@pytest.mark.parametrize("is_native", [True, False])
def test_any_subset_of_the_patches_with_its_positions(is_native):
    """Pruned patches: attention among those that are left, at their own positions."""
    packed = packing_model(reference_model(is_native=is_native))
    inputs = pack(random_images([(4, 4), (3, 5)]))
    full = with_positions(packed_layout(inputs["grid_thw"], packed.config), packed.config)
    kept = torch.tensor([0, 3, 7, 8, 15, 16, 20, 30])
    given = {name: value[kept] for name, value in full.tensors().items() if name.startswith(("position", "interp"))}
    given["cu_seqlens"] = torch.tensor([0, 5, 8])
    with torch.inference_mode():
        ours = packed(inputs["hidden_states"][kept], **given).last_hidden_state
        assert packed.last_engine == "cpu"
        for own in (slice(0, 5), slice(5, 8)):
            alone = {name: value[own] for name, value in given.items() if name != "cu_seqlens"}
            alone["cu_seqlens"] = torch.tensor([0, own.stop - own.start])
            packed.use_engines = False
            expected = packed(inputs["hidden_states"][kept[own]], **alone).last_hidden_state
            packed.use_engines = True
            assert (ours[own] - expected).abs().max() < 1e-5
