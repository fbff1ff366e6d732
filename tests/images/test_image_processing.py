# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The image processor on both backends against CLIP's, Qwen2-VL's, a convolution and `Aimv2VisionModel`.

Without torchvision only the PIL backend is tested. Its wheel is built for CUDA: beside a CPU torch its operators
do not load, and describing them to torch's compiler fails, which breaks transformers' image processors. Its Python
transforms, all that is needed here, run in a folder of their own with that description left out:

    python -m pip install --no-deps --target .venv-torchvision torchvision==0.28.0
    : > .venv-torchvision/torchvision/_meta_registrations.py
    PYTHONPATH=.venv-torchvision python -m pytest tests/images
"""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from reference import REPO, TINY, packing_model, patchify, reference_model

# transformers 5.15 without torchvision exports only a placeholder under the top-level name.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available


BACKENDS = ["pil", *(["torchvision"] if is_torchvision_available() else [])]
PHOTOGRAPHS = sorted((REPO / "examples" / "photographs").glob("*.jpg"))


def load(backend: str, **kwargs):
    return AutoImageProcessor.from_pretrained(str(REPO), trust_remote_code=True, backend=backend, **kwargs)


@pytest.fixture(params=BACKENDS)
def processor(request):
    return load(request.param)


def relative(processor, name: str, **kwargs):
    """The transformers class `name` of the same backend."""
    if processor.backend == "pil":
        return {"CLIP": CLIPImageProcessorPil, "Qwen2VL": Qwen2VLImageProcessorPil}[name](**kwargs)
    from transformers import CLIPImageProcessor, Qwen2VLImageProcessor

    return {"CLIP": CLIPImageProcessor, "Qwen2VL": Qwen2VLImageProcessor}[name](**kwargs)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sizes() -> list[tuple[int, int]]:
    """Heights and widths: square, strips, one pixel, odd, larger than the limit."""
    return [(224, 224), (301, 187), (10, 1500), (700, 41), (1, 1), (1, 150), (33, 34), (1300, 1501)]


def test_the_backend_is_the_one_asked_for_or_the_best():
    assert [load(backend).backend for backend in BACKENDS] == BACKENDS
    assert AutoImageProcessor.from_pretrained(str(REPO), trust_remote_code=True).backend == BACKENDS[-1]


@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("side", [56, 224])
def test_fixed_resolution_is_clip_and_patchify_to_the_bit(processor, side, patch_layout):
    images = [PIL.Image.fromarray(noise(*size, 3, seed=index)) for index, size in enumerate(sizes())]
    images += [PIL.Image.open(path) for path in PHOTOGRAPHS]
    images += [image.convert(mode) for image, mode in zip(images, ("L", "RGBA", "CMYK", "P", "1", "LA"), strict=False)]
    clip = relative(processor, "CLIP", size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = clip(images, return_tensors="pt")["pixel_values"]
    inputs = processor(images, return_tensors="pt", image_size=side, patch_layout=patch_layout)
    expected = [patchify(image, channels_last=patch_layout == "channels_last") for image in pixels]
    assert torch.equal(inputs["hidden_states"], torch.cat(expected))
    assert inputs["grid_thw"].tolist() == [[1, side // 14, side // 14]] * len(images)


def test_native_resolution_is_qwen2_vl_to_the_bit(processor):
    images = [PIL.Image.fromarray(noise(*size, 3, seed=index)) for index, size in enumerate(sizes())]
    size = {"shortest_edge": 112 * 14 * 14, "longest_edge": 4096 * 14 * 14}
    qwen = relative(processor, "Qwen2VL", patch_size=14, temporal_patch_size=1, merge_size=1, size=size)
    expected, inputs = qwen(images, return_tensors="pt"), processor(images, return_tensors="pt")
    assert torch.equal(inputs["hidden_states"], expected["pixel_values"])
    assert torch.equal(inputs["grid_thw"], expected["image_grid_thw"])
    assert inputs["hidden_states"].dtype == torch.float32 and inputs["grid_thw"].dtype == torch.int64


@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
def test_patches_are_in_the_order_of_a_convolution(processor, patch_layout):
    pixels = torch.randn(3, 5 * 14, 7 * 14, dtype=torch.float64)
    inputs = processor(
        pixels.float(), return_tensors="pt", do_resize=False, do_rescale=False, do_normalize=False,
        patch_layout=patch_layout,
    )  # fmt: skip
    weight = torch.randn(8, 3, 14, 14, dtype=torch.float64)
    expected = F.conv2d(pixels.float().double()[None], weight, stride=14)[0].flatten(1).T
    weight = weight.permute(0, 2, 3, 1) if patch_layout == "channels_last" else weight
    torch.testing.assert_close(inputs["hidden_states"].double() @ weight.flatten(1).T, expected)
    assert inputs["grid_thw"].tolist() == [[1, 5, 7]]


def test_the_other_patch_size_too(processor):
    inputs = processor(noise(64, 96, 3), return_tensors="pt", patch_size=16, min_patches=1)
    assert inputs["grid_thw"].tolist() == [[1, 4, 6]] and inputs["hidden_states"].shape == (24, 3 * 16 * 16)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
def test_features_from_a_jpeg_are_those_of_the_plain_model(processor, native, patch_layout):
    reference = reference_model(is_native=native)
    model = packing_model(reference, patch_layout=patch_layout)
    side = None if native else TINY["image_size"]
    inputs = processor(
        [str(path) for path in PHOTOGRAPHS], return_tensors="pt", image_size=side, patch_layout=patch_layout,
        max_patches=300,
    )  # fmt: skip
    with torch.no_grad():
        features = model(**inputs).last_hidden_state.split(inputs["grid_thw"].prod(1).tolist())
        for path, (_, rows, columns), actual in zip(PHOTOGRAPHS, inputs["grid_thw"].tolist(), features, strict=True):
            image = PIL.Image.open(path)
            if native:
                clip = relative(
                    processor, "CLIP", size={"height": rows * 14, "width": columns * 14}, do_center_crop=False
                )
            else:
                clip = relative(
                    processor, "CLIP", size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                )
            expected = reference(clip(image, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_native_mode_on_request_of_a_fixed_checkpoint():
    processor = load("pil", image_size=56)
    model = packing_model(reference_model(is_native=False))
    image = noise(20 * 14, 10 * 14, 3)
    fixed, native = processor(image, return_tensors="pt"), processor(image, return_tensors="pt", image_size=None)
    assert fixed["grid_thw"].tolist() == [[1, 4, 4]] and native["grid_thw"].tolist() == [[1, 20, 10]]
    assert model(**native).last_hidden_state.shape == (200, TINY["hidden_size"])


def test_bounds_in_patches_hold(processor):
    for minimum, maximum in [(1, 1), (1, 7), (112, 112), (50, 60), (112, 4096)]:
        for height, width in [(1, 1), (1, 200), (200, 1), (3, 2), (999, 5), (5, 999), (640, 480), (700, 700)]:
            bounds = {"min_patches": minimum, "max_patches": maximum}
            grid = processor(noise(height, width, 3), return_tensors="np", input_data_format="channels_last", **bounds)[
                "grid_thw"
            ]
            assert grid.prod() <= maximum, (height, width, minimum, maximum, grid)
            assert processor.get_number_of_image_patches(height, width, bounds) == grid.prod()
            if maximum >= 4 * minimum and min(height, width) > 1:
                assert grid.prod() >= minimum
    assert processor.get_number_of_image_patches(480, 640, {"image_size": 224}) == 256


def test_a_maximum_alone_lowers_the_minimum(processor):
    image = noise(300, 500, 3)
    expected = processor(image, return_tensors="pt", min_patches=64, max_patches=64)
    assert 1 < len(expected["hidden_states"]) <= 64
    others = (load(processor.backend, max_patches=64), type(processor)(max_patches=64))
    for inputs in [processor(image, return_tensors="pt", max_patches=64)] + [
        other(image, return_tensors="pt") for other in others
    ]:
        assert torch.equal(inputs["hidden_states"], expected["hidden_states"])
    for other, given in [(processor, {"max_patches": 64}), *((other, None) for other in others)]:
        assert other.get_number_of_image_patches(300, 500, given) == len(expected["hidden_states"])
    with pytest.raises(ValueError, match="`min_patches` must not exceed `max_patches`, got 100 and 64"):
        load(processor.backend, min_patches=100, max_patches=64)
    with pytest.raises(ValueError, match="got 5000 and 4096"):
        processor(image, min_patches=5000)


def test_saving_keeps_both_backends_and_every_field(processor, tmp_path):
    processor = load(processor.backend, image_size=336, patch_layout="channels_last", max_patches=500)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == json.loads((REPO / "preprocessor_config.json").read_text())["auto_map"]
    for backend in BACKENDS:
        again = AutoImageProcessor.from_pretrained(str(tmp_path), trust_remote_code=True, backend=backend)
        assert again.backend == backend
        assert (again.image_size, again.patch_layout, again.max_patches) == (336, "channels_last", 500)


def test_the_stored_configuration_is_the_default():
    saved = json.loads((REPO / "preprocessor_config.json").read_text())
    defaults = type(load("pil"))().to_dict()
    for name in saved.keys() - {"auto_map"}:
        stored = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        assert defaults.get(name) == stored, name


def test_one_image_equals_its_part_of_a_batch(processor):
    images = [noise(100, 140, 3, seed=index) for index in range(3)] + [noise(400, 90, 3)]
    together = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt")["hidden_states"] for image in images]
    assert torch.equal(together["hidden_states"], torch.cat(alone))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 225}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"max_patches": 0}, "`max_patches` must be a positive int, got 0"),
        ({"min_patches": 0}, "min_patches"),
        ({"min_patches": 20, "max_patches": 10}, "min_patches"),
        ({"patch_layout": "nchw"}, "patch_layout"),
        ({"patch_size": 0}, "patch_size"),
        ({"size": {"shortest_edge": 224}}, "`size` is not used"),
        ({"crop_size": 224}, "`crop_size` is not used"),
        ({"merge_size": 0}, "`merge_size` must be a positive int, got 0"),
        ({"merge_size": 3, "max_patches": 8}, r"`max_patches` must be at least `merge_size\*\*2`, got 8"),
        ({"merge_size": 2, "image_size": 14}, "image_size"),
        ({"max_image_pixels": 0}, "max_image_pixels"),
        ({"temporal_patch_size": 2}, "temporal_patch_size"),
        ({"do_resize": False}, "do_resize=False"),
    ],
)
def test_arguments_that_cannot_be_are_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(noise(100, 100, 3), **kwargs)


def test_paths_of_every_kind(processor, tmp_path):
    path = Path(tmp_path / "image.png")
    PIL.Image.fromarray(noise(50, 70, 3)).save(path)
    expected = processor(PIL.Image.open(path), return_tensors="pt")["hidden_states"]
    for source in (str(path), path, os.path.relpath(path), [str(path)]):
        assert torch.equal(processor(source, return_tensors="pt")["hidden_states"], expected)
