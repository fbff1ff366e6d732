# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What values an array may hold: of every dtype and range, on both backends, resized or not, against float64."""

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image_processing import BACKENDS, load, noise


PROCESSORS = {backend: load(backend, min_patches=1) for backend in BACKENDS}
DTYPES = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
]
BOUNDS = [0, 1, 2, 255, -1, -0.01, 0.3, 1.02, 2.5, 127, 254.7, 255.5, 256, 65535, -1e6, 1e6, np.nan, np.inf]


def meant(values: torch.Tensor, do_rescale: bool, do_normalize: bool) -> np.ndarray | None:
    """The values in float64 as they are meant, before they are normalised; `None` where they have no meaning."""
    exact = values.double().numpy()
    if not np.isfinite(exact).all():
        return None
    low, high = exact.min(), exact.max()
    is_float = values.is_floating_point()
    if do_rescale and values.dtype == torch.uint16:
        return np.floor(exact / 257 + 0.5) / 255
    if do_rescale:
        return None if low < 0 or high > 255 or (is_float and 0 < high <= 2) else exact / 255
    if do_normalize:
        return None if low < 0 or high > 1 or not is_float else exact
    return exact


def ramp(dtype: torch.dtype, low: float, high: float) -> torch.Tensor:
    """An image `(28, 42, 3)` of every value between two bounds, as far as its dtype has them."""
    values = np.linspace(low, high, 28 * 42 * 3) if np.isfinite([low, high]).all() else np.full(28 * 42 * 3, low + high)
    values = torch.from_numpy(values.reshape(28, 42, 3))
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        values = values.nan_to_num(0, 0, 0).round().clamp(limits.min, min(limits.max, 2**53))
        if dtype in (torch.uint16, torch.uint32, torch.uint64):
            return torch.from_numpy(values.numpy().astype(str(dtype).removeprefix("torch.")))
    return values.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    bounds=st.tuples(st.sampled_from(BOUNDS), st.sampled_from(BOUNDS)),
    options=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 14, 28])),
    as_numpy=st.booleans(),
)
def test_values_of_every_dtype_and_range_are_what_they_mean_or_refused(backend, dtype, bounds, options, as_numpy):
    do_rescale, do_normalize, image_size = options
    processor = PROCESSORS[backend]
    image = ramp(dtype, *sorted(bounds))
    expected = meant(image, do_rescale, do_normalize)
    has_numpy = dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    source = image.numpy() if as_numpy and has_numpy else image
    given_options = {"do_rescale": do_rescale, "do_normalize": do_normalize, "return_tensors": "pt"}
    if expected is None:
        for resized in ({"do_resize": False}, {"image_size": image_size}):
            with pytest.raises(ValueError, match=r"An image|an image"):
                processor(source, **given_options, **resized)
        return
    got = processor(source, do_resize=False, **given_options)["hidden_states"].double().numpy()
    mean, std = (np.array(x) if do_normalize else y for x, y in ((processor.image_mean, 0), (processor.image_std, 1)))
    patches = ((expected - mean) / std).reshape(2, 14, 3, 14, 3).transpose(0, 2, 4, 1, 3).reshape(6, 588)
    np.testing.assert_allclose(got, patches, rtol=1e-6, atol=1e-5)

    resized = processor(source, image_size=image_size, **given_options)["hidden_states"].double()
    pixels = resized.view(-1, 3, 196).permute(0, 2, 1) * torch.as_tensor(std) + torch.as_tensor(mean)
    spread, rounding = expected.max() - expected.min(), 1e-6 * np.abs(expected).max() + 1e-5
    allowed, overshoot = ((0, 1), 0) if do_rescale or do_normalize else ((expected.min(), expected.max()), 0.2 * spread)
    assert pixels.min() >= allowed[0] - overshoot - rounding and pixels.max() <= allowed[1] + overshoot + rounding
    # A ramp keeps its mean, whatever it is resized to; cropped and in few steps, nearly.
    assert abs(pixels.mean() - expected.mean()) <= 0.05 * spread + rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"max_patches": 36}, {"image_size": 56}, {"image_size": 448}])
@pytest.mark.parametrize("kind", ["bilevel", "noise", "dark"])
def test_floats_are_resized_as_their_uint8_twin(backend, options, kind):
    processor = PROCESSORS[backend]
    pixels = noise(150, 210, 3) if kind != "dark" else noise(150, 210, 3) // 100
    if kind == "bilevel":
        pixels = np.kron((noise(30, 42, 1) > 127).astype(np.uint8) * 255, np.ones((5, 5, 3), np.uint8))
    expected = processor(pixels, return_tensors="pt", **options)["hidden_states"]
    one_level = 1 / 255 / min(processor.image_std)
    for image, kwargs in (
        (pixels.astype(np.float32) / np.float32(255), {"do_rescale": False}),
        (torch.from_numpy(pixels).double() / 255, {"do_rescale": False}),
        (pixels.astype(np.float32), {}),
    ):
        if kind != "dark" or kwargs:
            actual = processor(image, return_tensors="pt", **options, **kwargs)["hidden_states"]
            assert (actual - expected).abs().max() <= 2 * one_level


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_of_black_and_white_keeps_its_grey_levels(backend):
    processor = PROCESSORS[backend]
    page = np.kron((noise(50, 50, 1) > 127).astype(np.float32), np.ones((5, 5, 3), np.float32))
    for options in ({"max_patches": 36}, {"image_size": 112}, {"image_size": 560}):
        expected = processor((page * 255).astype(np.uint8), return_tensors="pt", **options)["hidden_states"]
        actual = processor(page, do_rescale=False, return_tensors="pt", **options)["hidden_states"]
        one_level = 1 / 255 / min(processor.image_std)
        assert (actual - expected).abs().max() <= 2 * one_level
        assert len(actual.unique()) > 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"do_resize": False}])
def test_pictures_without_rescaling(backend, options):
    processor = PROCESSORS[backend]
    picture = PIL.Image.fromarray(noise(28, 42, 3))
    for image in (picture, np.asarray(picture)):
        with pytest.raises(ValueError, match="do_rescale"):
            processor(image, do_rescale=False, **options)
        raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt", **options)["hidden_states"]
        assert raw.min() == 0 and raw.max() == 255


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_of_other_byte_orders_and_of_no_numbers(backend):
    processor = PROCESSORS[backend]
    pixels = noise(28, 42, 3)
    expected = processor(pixels, return_tensors="pt", do_resize=False)["hidden_states"]
    for dtype in (">u2", ">i4", ">f4", "<f8"):
        image = (pixels.astype(np.uint16) * (257 if dtype == ">u2" else 1)).astype(dtype)
        actual = processor(image, return_tensors="pt", do_resize=False)["hidden_states"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for dtype in (np.bool_, np.complex128, np.dtype("datetime64[s]"), np.dtype([("a", "u1")])):
        with pytest.raises(ValueError, match=r"integers or floats|images"):
            processor(np.zeros((28, 42, 3), dtype), return_tensors="pt")


def test_gradients_pass_on_torchvision_alone():
    for backend, processor in PROCESSORS.items():
        image = torch.rand(3, 28, 42, requires_grad=True)
        inputs = processor(image, do_rescale=False, return_tensors="pt")
        expected = processor(image.detach(), do_rescale=False, return_tensors="pt")
        assert torch.equal(inputs["hidden_states"].detach(), expected["hidden_states"])
        assert inputs["hidden_states"].requires_grad == (backend == "torchvision")
