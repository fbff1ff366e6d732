# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call that no image can meet are refused by name, and shapes mean one thing on both backends."""

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image
from reference import REPO
from test_image_processing import BACKENDS, load, noise
from transformers import AutoProcessor


RGB, GRAY = PIL.Image.fromarray(noise(42, 56, 3)), noise(42, 56)


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param, min_patches=1)


def patches(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs)["hidden_states"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resample", "bicubic"),
        ("resample", 99),
        ("data_format", "channels_last"),
        ("input_data_format", "last"),
        ("image_std", [0.0, 1.0, 1.0]),
        ("image_std", [-1.0, 1.0, 1.0]),
        ("image_mean", [float("nan"), 0.5, 0.5]),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5]),
        ("rescale_factor", 0.0),
        ("rescale_factor", float("inf")),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(processor, name, value):
    with pytest.raises(ValueError, match=name):
        processor(RGB, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("resample", "bicubic"), ("image_std", "0.5"), ("rescale_factor", "1")])
def test_a_configuration_is_checked_as_a_call_is(name, value):
    with pytest.raises(ValueError, match=name):
        load("pil", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("max_pixels", 1000), ("max_patches", "64"), ("rescale_factor", 0.0)])
def test_what_auto_processor_swallows_is_logged(name, value, caplog):
    # It says of any error only that there is no processor.
    with pytest.raises(ValueError, match="Unrecognized processing class"):
        AutoProcessor.from_pretrained(str(REPO), trust_remote_code=True, **{name: value})
    assert name in caplog.text and caplog.records[-1].levelname == "ERROR"


@pytest.mark.parametrize("value", [None, "channels_first"])
def test_the_only_data_format_is_taken(processor, value):
    assert torch.equal(patches(processor, RGB, data_format=value), patches(processor, RGB))


@pytest.mark.parametrize("input_data_format", [None, "channels_first", "channels_last"])
@pytest.mark.parametrize("width", [3, 56])
def test_an_array_of_rows_and_columns_has_no_channels_to_look_for(processor, input_data_format, width):
    gray = GRAY[:, :width]
    expected = patches(processor, PIL.Image.fromarray(gray))
    for image in (gray, torch.from_numpy(gray.copy())):
        assert torch.equal(patches(processor, image, input_data_format=input_data_format), expected)


@pytest.mark.parametrize("count", [2, 5, 42])
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_another_number_of_channels_is_refused(processor, count, axis, do_normalize):
    image = noise(*((count, 28, 42) if axis == 0 else (28, 42, count)))
    input_data_format = "channels_first" if axis == 0 else "channels_last"
    with pytest.raises(ValueError, match=rf"1, 3 or 4 channels.*{count}"):
        processor(image, input_data_format=input_data_format, do_normalize=do_normalize)


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("mode", ["1", "P", "PA", "LA"])
def test_modes_without_channels_of_values_need_a_conversion(processor, mode, do_normalize):
    image = RGB.convert("RGBA").convert(mode)
    with pytest.raises(ValueError, match=f"do_convert_rgb.*'{mode}'"):
        processor(image, do_convert_rgb=False, do_normalize=do_normalize)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_images_of_one_call_have_one_number_of_channels(processor, do_normalize):
    with pytest.raises(ValueError, match="do_convert_rgb"):
        processor([GRAY, RGB], do_convert_rgb=False, do_normalize=do_normalize)


def test_gray_without_conversion_takes_one_mean(processor):
    found = patches(processor, GRAY, do_convert_rgb=False, image_mean=[0.25], image_std=[0.5])
    values = (GRAY / 255 - 0.25) / 0.5
    expected = values.reshape(3, 14, 4, 14).swapaxes(1, 2).reshape(12, 196)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="image_mean"):
        processor(GRAY, do_convert_rgb=False)


def test_images_may_be_nested_and_batches_lie_beside_single_ones(processor):
    batch = torch.from_numpy(noise(2, 3, 42, 56))
    expected = patches(processor, [batch[0], batch[1], RGB, GRAY])
    for images in ([batch, RGB, GRAY], [[[batch]], [RGB, [GRAY]]], (batch, ([RGB], GRAY))):
        assert torch.equal(patches(processor, images), expected)


@pytest.mark.parametrize("name", ["numpy", "torch", None])
def test_columns_of_images_of_different_sizes_in_every_format_of_datasets(processor, name):
    images = [RGB, PIL.Image.fromarray(noise(28, 42, 3))]
    dataset = Dataset.from_dict({"image": images}, features=Features({"image": Image()})).with_format(name)
    expected = patches(processor, images)
    for column in (dataset[:]["image"], dataset["image"]):
        assert torch.equal(patches(processor, column), expected)
        assert torch.equal(processor.collate([{"image": column}])["hidden_states"], expected)


@pytest.mark.parametrize("shape", [(50,), (1, 1, 3, 20, 20), (0, 5, 3)])
def test_an_array_of_another_shape_is_named_by_its_shape(processor, shape):
    with pytest.raises(ValueError) as error:
        processor(np.zeros(shape, np.uint8))
    assert f"got shape {shape}" in str(error.value)


@pytest.mark.parametrize("image", [b"\x89PNG", bytearray(b"\x89PNG"), {"bytes": b"", "path": None}, {1}, None])
def test_what_is_no_image_is_told_what_is_one(processor, image):
    for images in (image, [RGB, image]):
        with pytest.raises(TypeError, match=rf"`images`.*{type(image).__name__}.*open_image"):
            processor(images)


@pytest.mark.parametrize("given", ["call", "processor"])
def test_a_device_that_pil_does_not_know_is_said(given, caplog):
    processor = load("pil", device="cuda:0" if given == "processor" else None)
    processor(RGB, **({"device": torch.device("cuda:1")} if given == "call" else {}))
    assert "`device` cuda:" in caplog.text and "CPU" in caplog.text
    caplog.clear()
    load("pil")(RGB, device="cpu")
    assert not caplog.text


def test_bytes_are_no_path(processor, tmp_path):
    RGB.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    for source in (str(tmp_path / "image.png").encode(), content, bytearray(content), None, 0):
        with pytest.raises(TypeError, match=rf"`source` must be .* got {type(source).__name__}: .*BytesIO"):
            processor.open_image(source)
    with (tmp_path / "image.png").open("rb") as file:
        assert processor.open_image(file).size == RGB.size


@pytest.mark.parametrize("name", ["min_patches", "max_patches"])
def test_limits_that_a_fixed_size_ignores_are_said(processor, name, caplog):
    # Each message is given once in a process.
    side = 70 + 14 * BACKENDS.index(processor.backend)
    assert len(patches(processor, RGB, **{"image_size": side, name: 30})) == (side // 14) ** 2
    assert f"`{name}` does nothing while `image_size` is {side}" in caplog.text
    caplog.clear()
    processor(RGB, **{"image_size": None, name: 30})
    processor(RGB, image_size=side)
    assert not caplog.text
