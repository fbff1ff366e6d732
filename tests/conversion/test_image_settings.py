# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The output's image processor gives the pixels that the source's gives, or the difference is said."""

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image
from reference import REPO, reference_model

# transformers 5.15 without torchvision exports only a placeholder under the top-level name.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conversion.features import pixels
from conversion.local_code import Aimv2PackingConfig
from convert_weights import parse_arguments, run


PHOTOGRAPHS = sorted((REPO / "examples" / "photographs").glob("*.jpg"))
PACKED = {"image_processor_type": "Aimv2PackingImageProcessor"}
OTHERS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2, "rescale_factor": 1 / 128}


def save(folder: Path, processor: dict | None = None, config: dict | None = None, **fields) -> Path:
    model = reference_model(**fields)
    checkpoints.save(folder, checkpoints.apple(model), {**checkpoints.apple_config(model), **(config or {})})
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def convert(source: Path, output: Path, *arguments: str) -> Path:
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


def output_pixels(folder: Path, image: Image.Image) -> np.ndarray:
    """`(channels, height, width)`, put together from the patches of the converted repo's image processor."""
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    inputs = processor(image, return_tensors="pt")
    config = Aimv2PackingConfig(patch_size=processor.patch_size, patch_layout=processor.patch_layout)
    return pixels(inputs, config)[0].numpy()


@pytest.mark.parametrize(
    "size", [{"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, {"size": 56, "crop_size": 56}]
)
@pytest.mark.parametrize("others", [{}, OTHERS, {"do_normalize": False}], ids=["defaults", "others", "not normalised"])
@pytest.mark.parametrize("fields", [{}, {"is_native": False}], ids=["native", "learned"])
def test_clips_image_processor(tmp_path, capsys, size, others, fields):
    settings = CLIPImageProcessorPil(**size, **others).to_dict()
    output = convert(save(tmp_path / "in", settings | size, **fields), tmp_path / "out")
    warned = capsys.readouterr().err
    assert ("crops to 56 x 56 pixels" in warned) == (not fields) and "not taken over" not in warned
    source = CLIPImageProcessorPil.from_pretrained(tmp_path / "in")
    for photograph in PHOTOGRAPHS:
        with Image.open(photograph) as image:
            expected = source(image, return_tensors="np")["pixel_values"][0]
            np.testing.assert_allclose(output_pixels(output, image), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("others", [{}, OTHERS], ids=["defaults", "others"])
def test_limits_in_pixels(tmp_path, capsys, others):
    limits = {"min_pixels": 4 * 14**2, "max_pixels": 30 * 14**2}
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 1, **limits, **others}
    output = convert(save(tmp_path / "in", settings), tmp_path / "out")
    assert "not taken over" not in capsys.readouterr().err
    source = Qwen2VLImageProcessorPil(patch_size=14, merge_size=1, temporal_patch_size=1, **limits, **others)
    for photograph in PHOTOGRAPHS:
        with Image.open(photograph) as image:
            expected = source(image, return_tensors="pt")
            rows, columns = expected["image_grid_thw"][0, 1:].tolist()
            patches = expected["pixel_values"].view(rows, columns, 3, 14, 14)
            whole = patches.permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14).numpy()
            np.testing.assert_allclose(output_pixels(output, image), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("interpolation", "resample"), [("bicubic", 3), ("bilinear", 2)])
def test_timms_settings(tmp_path, interpolation, resample):
    timm = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": interpolation,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    output = convert(save(tmp_path / "in", config={"pretrained_cfg": timm}, is_native=False), tmp_path / "out")
    source = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=56, image_mean=timm["mean"], image_std=timm["std"], resample=resample
    )
    for photograph in PHOTOGRAPHS:
        with Image.open(photograph) as image:
            expected = source(image, return_tensors="np")["pixel_values"][0]
            np.testing.assert_allclose(output_pixels(output, image), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {**OTHERS, "min_patches": 20, "max_patches": 33},
        {"image_size": 70, "do_normalize": False},
        {"do_convert_rgb": False},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_repo_of_this_converter(tmp_path, changes, nested):
    first = convert(save(tmp_path / "in", is_native=False), tmp_path / "first")
    file = first / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(settings))
    if nested:
        # As transformers saves a processor with an image processor in it, which comes first.
        (first / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
        file.write_text("{}")
    second = convert(first, tmp_path / "second", "--dtype", "bfloat16")
    assert json.loads((second / "preprocessor_config.json").read_text()) == settings


def test_sources_that_say_nothing_get_aimv2s(tmp_path, capsys):
    output = convert(save(tmp_path / "in"), tmp_path / "out")
    expected = json.loads((REPO / "preprocessor_config.json").read_text())
    assert json.loads((output / "preprocessor_config.json").read_text()) == expected
    assert "warning" not in capsys.readouterr().err


CLIP = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3}


@pytest.mark.parametrize(
    ("processor", "config", "said"),
    [
        (
            {**CLIP, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
            {},
            ["size", "crop_size", "56"],
        ),
        (
            {**CLIP, "size": {"height": 56, "width": 56}},
            {},
            ["resizes to size {'height': 56, 'width': 56}", "does not crop"],
        ),
        ({**CLIP, "size": {"shortest_edge": 56}, "crop_size": 56, "do_center_crop": False}, {}, ["does not crop"]),
        ({**CLIP, "size": {"shortest_edge": 60}, "crop_size": 60}, {}, ["which this one cannot"]),
        ({**CLIP, "do_resize": False}, {}, ["do_resize"]),
        ({**CLIP, "do_pad": True}, {}, ["do_pad True of the source's image processor is not taken over"]),
        ({**CLIP, "merge_size": 2, "patch_size": 14, "max_pixels": 9999}, {}, ["merge_size 2"]),
        (None, {"pretrained_cfg": {"crop_pct": 0.9}}, ["crop_pct 0.9"]),
        (None, {"pretrained_cfg": {"crop_mode": "squash"}}, ["crop_mode 'squash'"]),
        (None, {"pretrained_cfg": {"interpolation": "random"}}, ["interpolation 'random'"]),
    ],
)
def test_what_cannot_be_kept_is_said(tmp_path, capsys, processor, config, said):
    output = convert(save(tmp_path / "in", processor, config, is_native=False), tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert all(text in line for text in said), line
    settings = json.loads((output / "preprocessor_config.json").read_text())
    assert processor is None or settings["image_mean"] == [0.5] * 3
    assert settings["image_size"] in (None, 56)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean holds 2 values, and images have 3 channels"),
        ({"image_mean": "0.5"}, "image_mean holds '0.5'"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std holds 0"),
        ({"resample": "bicubic"}, "resample holds 'bicubic'"),
        ({"min_pixels": 9999999}, "min_patches 51020 and max_patches 4096 are no limits"),
        ({"resample": 99}, "`resample` must be"),
        ({"image_std": [-1.0, 1.0, 1.0]}, "`image_std` must hold positive numbers"),
        ({"rescale_factor": 0}, "`rescale_factor` must hold positive numbers"),
        ({"image_mean": [float("nan")] * 3}, "`image_mean` must hold finite numbers"),
        ({**PACKED, "merge_size": 0}, "`merge_size` must be a positive int"),
        ({**PACKED, "image_size": 56, "merge_size": 3}, "`image_size` must be None or a positive multiple"),
        ({**PACKED, "temporal_patch_size": 2}, "`temporal_patch_size` must be 1"),
    ],
)
def test_settings_of_no_use_are_refused(tmp_path, changes, message):
    source = save(tmp_path / "in", {**CLIP, **changes})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_timms_arguments_tell(tmp_path, capsys):
    model = reference_model(hidden_size=128, num_attention_heads=2)
    config = {
        "architecture": "aimv2_large_patch14_native",
        "model_args": {"num_heads": 2, "embed_dim": 128, "img_size": [56, 56]},
    }
    source = checkpoints.save(tmp_path / "in", checkpoints.timm(model), config)
    convert(source, tmp_path / "out", "--verify", "--images", str(PHOTOGRAPHS[0]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 2
    assert "warning" not in capsys.readouterr().err
    config["model_args"] = {"embed_dim": 256}
    checkpoints.save(tmp_path / "wrong", checkpoints.timm(model), config)
    with pytest.raises(ValueError, match="hidden_size 256, the tensors say 128"):
        convert(tmp_path / "wrong", tmp_path / "wrong-out")
    config["model_args"] = {"num_heads": 2, "act_layer": "gelu"}
    checkpoints.save(tmp_path / "more", checkpoints.timm(model), config)
    convert(tmp_path / "more", tmp_path / "more-out")
    assert "not taken over of timm's model_args: act_layer." in capsys.readouterr().err


def test_heads_that_are_guessed_are_said(tmp_path, capsys):
    model = reference_model(hidden_size=128, num_attention_heads=2)
    convert(checkpoints.save(tmp_path / "in", checkpoints.timm(model)), tmp_path / "out")
    assert "how many attention heads the vision encoder has: 1 are taken" in capsys.readouterr().err


@torch.no_grad()
def test_timms_heads_change_features(tmp_path):
    """Two heads instead of one are other features: what the setting decides is not lost in tolerances."""
    image = torch.rand(1, 3, 56, 56)
    models = [reference_model(hidden_size=128, num_attention_heads=heads) for heads in (1, 2)]
    models[1].load_state_dict(models[0].state_dict())
    assert (models[0](image).last_hidden_state - models[1](image).last_hidden_state).abs().max() > 1e-3
