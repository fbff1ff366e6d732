# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares a packed model repo with the original model, image by image."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from PIL import Image
from transformers import Aimv2VisionModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from configuration_aimv2_packing import Aimv2PackingConfig

from .checkpoint_formats import Encoder
from .code_files import REPO, code_differences


PHOTOGRAPHS = REPO / "examples" / "photographs"
# Largest difference, as a part of the reference's largest value where that is above 1, and smallest cosine between
# the features of a patch: a few times what rounding does to 24 layers in each precision.
BOUNDS = {
    torch.float64: (1e-4, 0.99999),
    torch.float32: (1e-4, 0.99999),
    torch.float16: (2e-2, 0.999),
    torch.bfloat16: (1e-1, 0.99),
}
# What decides the shapes of weights and features.
GEOMETRY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_channels",
    "patch_size",
    "is_native",
    "use_head",
    "qkv_bias",
    "mlp_bias",
)
MAX_PATCHES_PER_FORWARD = 8192
RANDOM_SIZES = 10


@dataclass
class Comparison:
    """
    Features of one image, packed against reference; `pooler_output`, where there is one, counts as one more patch.

    Attributes:
        image (`str`): Its name.
        height, width (`int`): The size that both models saw, in pixels.
        max_diff, mean_diff (`float`): Absolute difference of the features.
        min_cosine, mean_cosine (`float`): Cosine between the features of each patch.
        passed (`bool`): Whether `max_diff` and `min_cosine` are within the bounds.
    """

    image: str
    height: int
    width: int
    max_diff: float
    mean_diff: float
    min_cosine: float
    mean_cosine: float
    passed: bool


@dataclass
class Report:
    """
    Result of [`verify`]; `notes` say what could not be compared, or was compared in another way than asked,
    `code_differences` how the code differs from this tree's, which is what runs.
    """

    model: str
    reference: str
    dtype: str
    device: str
    max_diff_bound: float
    min_cosine_bound: float
    identical_weights: bool | None
    code_differences: list[str]
    notes: list[str]
    images: list[Comparison]

    @property
    def passed(self) -> bool:
        return bool(self.images) and all(image.passed for image in self.images)

    def to_json(self) -> str:
        """Everything as JSON, which knows no NaN: `null` stands for it."""
        images = [
            {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in asdict(image).items()}
            for image in self.images
        ]
        bound = self.max_diff_bound if math.isfinite(self.max_diff_bound) else None
        fields = asdict(self) | {"images": images, "max_diff_bound": bound, "passed": self.passed}
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """The comparisons as a Markdown table."""
        rows = [
            f"| {x.image} | {x.width} x {x.height} | {x.max_diff:.1e} | {x.mean_diff:.1e} | {x.min_cosine:.7f} | "
            f"{x.mean_cosine:.7f} | {'equal' if x.passed else 'DIFFERS'} |"
            for x in self.images
        ]
        head = "| image | pixels | max diff | mean diff | min cosine | mean cosine | verdict |"
        return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def verify(
    folder: Path,
    reference: Encoder | None = None,
    reference_name: str = "Aimv2VisionModel",
    images: list[Path] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Report:
    """
    Runs `folder` packed, and the reference one image at a time, on the same pixels.

    Args:
        folder (`Path`): A converted model repo. No code in it, or that its configuration names, is run.
        reference (`Encoder`, *optional*): The original's weights and configuration; by default those of `folder`,
            loaded in transformers' `Aimv2VisionModel`.
        reference_name (`str`, *optional*): What to call it in the report.
        images (`list[Path]`, *optional*): What to encode. By default the photographs of this repo, and one more of
            each of ten random sizes between 224 and 1000 pixels.
        device (`str`, *optional*, defaults to `"cpu"`): Where to run.
        dtype (`torch.dtype`, *optional*): Precision of both models, by default that of the weights.

    Raises:
        ValueError: `config.json` of `folder` is not that of a model, `folder` does not load completely in
            `Aimv2VisionModel`, it has another geometry than the reference, or there is nothing to compare.
    """
    try:
        config = Aimv2PackingConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{folder / 'config.json'} is not that of a model: {reason}") from error
    if reference is not None:
        check_geometry(folder, config, reference_name, reference.config)
    notes = []
    with quiet_loading():
        original, info = Aimv2VisionModel.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    if wrong := sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]))):
        raise ValueError(f"{folder} does not load in Aimv2VisionModel: {', '.join(wrong[:5])}.")
    dtype = original.dtype
    identical_weights = None
    if reference is not None:
        converted = original.state_dict()
        weights = {name: tensor.load(dtype) for name, tensor in reference.tensors.items()}
        identical_weights = converted.keys() == weights.keys() and all(
            torch.equal(converted[name], weights[name]) for name in weights
        )
        del converted, original
        with quiet_loading():
            original = Aimv2VisionModel.from_pretrained(None, config=reference.config, state_dict=weights, dtype=dtype)
        del weights
    if not original.config.is_native:
        side = original.config.image_size
        notes.append(f"the reference has learned positions for {side} x {side} pixels only: images are cropped to that")

    names, inputs = read_images(config, images)
    original = original.eval().to(device)
    expected_features = [original_features(original, x, config) for x in tqdm(inputs, desc="Original model")]
    del original
    with quiet_loading():
        packed_class = get_class_from_dynamic_module("modeling_aimv2_packing.Aimv2PackingModel", str(REPO))
        packed = packed_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    features = packed_features(packed.eval().to(device), inputs)

    relative_bound, min_cosine_bound = BOUNDS[dtype]
    max_diff_bound = relative_bound * max(1.0, *(expected.abs().max().item() for expected in expected_features))
    comparisons = []
    for name, x, expected, feature in zip(names, inputs, expected_features, features, strict=True):
        diff, cosine = (feature - expected).abs(), F.cosine_similarity(feature, expected, dim=-1)
        _, rows, columns = x["grid_thw"][0].tolist()
        comparisons.append(
            Comparison(
                image=name,
                height=rows * config.patch_size,
                width=columns * config.patch_size,
                max_diff=diff.max().item(),
                mean_diff=diff.mean().item(),
                min_cosine=cosine.min().item(),
                mean_cosine=cosine.mean().item(),
                # In this direction NaN fails.
                passed=bool(diff.max() <= max_diff_bound and cosine.min() >= min_cosine_bound),
            )
        )
    return Report(
        model=str(folder),
        reference=reference_name,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        max_diff_bound=max_diff_bound,
        min_cosine_bound=min_cosine_bound,
        identical_weights=identical_weights,
        code_differences=code_differences(folder),
        notes=notes,
        images=comparisons,
    )


def check_geometry(
    folder: Path, config: Aimv2PackingConfig, reference_name: str, reference: Aimv2PackingConfig
) -> None:
    """Raises a ValueError where the features of two models cannot be compared because their geometry differs."""
    names = [*GEOMETRY] if config.is_native else [*GEOMETRY, "image_size"]
    different = [name for name in names if getattr(config, name) != getattr(reference, name)]
    if different:
        listed = ", ".join(f"{name} {getattr(config, name)} and {getattr(reference, name)}" for name in different)
        raise ValueError(
            f"{folder} and {reference_name} are models of different geometry ({listed}): nothing to compare."
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the warning that `Aimv2VisionModel` reads the configuration of a packed model, which is intended."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read_images(
    config: Aimv2PackingConfig, paths: list[Path] | None
) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """
    Names of the images, and `hidden_states` and `grid_thw` of each.

    Raises:
        ValueError: there are none.
    """
    pictures = []
    for path in sorted(PHOTOGRAPHS.glob("*.jpg")) if paths is None else paths:
        with Image.open(path) as file:
            pictures.append((path.name, file.convert("RGB")))
    if not pictures:
        raise ValueError(f"No image to compare: {PHOTOGRAPHS} holds none. Name some with --images.")
    if paths is None:
        draw, num_photographs = random.Random(0), len(pictures)
        for index in range(RANDOM_SIZES):
            name, picture = pictures[index % num_photographs]
            width, height = draw.randint(224, 1000), draw.randint(224, 1000)
            pictures.append((f"{name} at {width} x {height}", picture.resize((width, height))))
    # Not to `from_pretrained`: an AutoProcessor gives its arguments to the model's configuration as well.
    sizes = {
        "patch_size": config.patch_size,
        "patch_layout": config.patch_layout,
        "image_size": None if config.is_native else config.image_size,
    }
    processor = AutoProcessor.from_pretrained(REPO, trust_remote_code=True)
    return [name for name, _ in pictures], [processor(picture, return_tensors="pt", **sizes) for _, picture in pictures]


@torch.no_grad()
def original_features(
    model: Aimv2VisionModel, inputs: dict[str, torch.Tensor], config: Aimv2PackingConfig
) -> torch.Tensor:
    """`last_hidden_state` and `pooler_output` of one image, float32 of shape `(patches (+ 1), hidden_size)`."""
    _, rows, columns = inputs["grid_thw"][0].tolist()
    side = config.patch_size
    patches = inputs["hidden_states"].view(rows, columns, -1)
    if config.patch_layout == "channels_last":
        pixels = patches.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
    else:
        pixels = patches.view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
    pixel_values = pixels.reshape(1, -1, rows * side, columns * side).to(model.device, model.dtype)
    # cuDNN's convolutions round float32 to TF32 by default; the packed model's matrix product does not.
    with torch.backends.cudnn.flags(allow_tf32=False):
        outputs = model(pixel_values)
    pooled = outputs.pooler_output.flatten(0, -2) if config.use_head else pixel_values.new_empty(0, config.hidden_size)
    return torch.cat([outputs.last_hidden_state[0], pooled]).float().cpu()


@torch.no_grad()
def packed_features(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The same of all images, as many in one forward as fit in `MAX_PATCHES_PER_FORWARD`."""
    batches: list[list[dict[str, torch.Tensor]]] = []
    room = 0
    for x in inputs:
        length = len(x["hidden_states"])
        if length > room:
            batches.append([])
            room = MAX_PATCHES_PER_FORWARD
        batches[-1].append(x)
        room -= length
    features = []
    for batch in tqdm(batches, desc="Packed model"):
        grid_thw = torch.cat([x["grid_thw"] for x in batch])
        outputs = model(torch.cat([x["hidden_states"] for x in batch]).to(model.device), grid_thw)
        pooled = [outputs.last_hidden_state.new_empty(0, model.config.hidden_size)] * len(batch)
        if model.config.use_head:
            pooled = list(outputs.pooler_output.split(1))
        encoded = outputs.last_hidden_state.split(grid_thw.prod(dim=1).tolist())
        features += [torch.cat(pair).float().cpu() for pair in zip(encoded, pooled, strict=True)]
    return features
