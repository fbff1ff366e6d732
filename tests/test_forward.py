"""What `forward` takes, refuses and returns."""

import pytest
import torch
from reference import ODD_GRIDS, pack, packing_model, random_images, reference_model
from transformers.modeling_outputs import BaseModelOutputWithPooling


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
        (patches(4), None, ["grid_thw", "layout", "neither"]),
    ],
)
def test_bad_input_is_refused_before_any_work(model, hidden_states, grid_thw, named):
    with pytest.raises(ValueError) as error:
        model(hidden_states, grid_thw)
    assert all(word in str(error.value) for word in named)


def test_a_layout_must_describe_the_patches(model):
    layout = model.prepare_layout(torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="`layout` describes 4 patches, but `hidden_states` holds 5"):
        model(patches(5), layout=layout)
    with pytest.raises(ValueError, match="both"):
        model(patches(4), torch.tensor([[1, 2, 2]]), layout=layout)
    other = packing_model(reference_model(is_native=False)).prepare_layout(torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="`layout`"):
        model(patches(4), layout=other)
    with pytest.raises(ValueError, match=r"2\*\*31"):
        model.prepare_layout(torch.tensor([[1, 2**16, 2**16]]))


def test_attention_maps_are_refused(model):
    with pytest.raises(ValueError, match="output_attentions"):
        model(patches(4), torch.tensor([[1, 2, 2]]), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_any_integer_dtype_and_any_strides(model, dtype):
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        strided = inputs["hidden_states"].T.contiguous().T
        assert not strided.is_contiguous()
        ours = model(strided, inputs["grid_thw"].to(dtype).T.contiguous().T).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5


def test_a_prepared_layout_gives_the_same(model):
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        expected = model(**inputs)
        ours = model(inputs["hidden_states"], layout=model.prepare_layout(inputs["grid_thw"]))
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(ours.pooler_output, expected.pooler_output)


def test_layout_by_hand(model):
    layout = model.prepare_layout(torch.tensor([[1, 1, 2], [2, 2, 1], [1, 3, 1]]))
    assert layout.segments.cu_seqlens.dtype == torch.int32
    assert layout.segments.cu_seqlens.tolist() == [0, 2, 4, 6, 9]
    assert layout.segments.max_seqlen == 3
    assert layout.segments.runs == ((3, 2), (1, 3))
    assert layout.position_ids.tolist() == [
        [0, 0], [1, 0],
        [0, 0], [0, 1], [0, 0], [0, 1],
        [0, 0], [0, 1], [0, 2],
    ]  # fmt: skip
    (block,) = layout.blocks
    assert block == (slice(0, 9), 0, block.segments)
    assert block.segments.runs == layout.segments.runs


def test_blocks_by_hand(model):
    """Whole segments up to 2048 patches; ordered by length where lengths alternate; padded to sizes that recur."""
    large, small = (1, 30, 40), (1, 20, 30)
    first, second, third = model.prepare_layout(torch.tensor([large, small, large, (1, 50, 50)])).blocks
    assert (first.rows, first.padding, first.segments.runs) == (slice(0, 1800), 24, ((1, 1200), (1, 600), (1, 24)))
    assert (second.rows, second.padding, second.segments.runs) == (slice(1800, 3000), 16, ((1, 1200), (1, 16)))
    assert (third.rows, third.padding, third.segments.runs) == (slice(3000, 5500), 60, ((1, 2500), (1, 60)))

    (block,) = model.prepare_layout(torch.tensor([(1, 1, 2), (1, 1, 1)] * 3)).blocks
    assert block.rows.tolist() == [2, 5, 8, 0, 1, 3, 4, 6, 7]
    assert block.segments.runs == ((3, 1), (3, 2))
    assert block.segments.cu_seqlens.tolist() == [0, 1, 2, 3, 5, 7, 9]


def test_few_sizes_of_blocks(model):
    """Each at most 3 % larger than it has to be."""
    sizes = set()
    for patches in range(1, 2049):
        (block,) = model.prepare_layout(torch.tensor([(1, 1, patches)])).blocks
        assert block.padding <= 0.032 * patches
        sizes.add(patches + block.padding)
    assert len(sizes) == 64 + 32 * 5


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
