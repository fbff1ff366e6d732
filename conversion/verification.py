# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares a packed model repo with the original model, image by image."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from transformers import Aimv2Model, Aimv2VisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .checkpoint_formats import Encoder
from .features import (
    original_features,
    original_joint,
    packed_features,
    packed_joint,
    random_texts,
    read_images,
)
from .image_text import ImageText
from .local_code import Aimv2PackingConfig, Aimv2PackingImageTextConfig, local_class
from .repo_contents import changes_code_only, repo_differences
from .repo_kinds import repo_kind
from .safetensors_files import main_dtype, read_json
from .sources import read_source


# Largest difference, as a part of the reference's largest value where that is above 1, and smallest cosine between
# the features of a patch: a few times what rounding does to 24 layers in each precision.
BOUNDS = {
    torch.float64: (1e-4, 0.99999),
    torch.float32: (1e-4, 0.99999),
    torch.float16: (2e-2, 0.999),
    torch.bfloat16: (1e-1, 0.99),
}
# What is usually asked of a port: largest and mean absolute difference, and smallest cosine.
ALIGNMENT = (0.01, 0.001, 0.99)
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
    "image_size",
)
TEXT_GEOMETRY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "eos_token_id",
    "qkv_bias",
    "mlp_bias",
)


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
class JointComparison:
    """
    Features in the joint space of an image-text model, packed against reference.

    Attributes:
        features (`str`): Which: of the images, of the texts, or their products times the scale (the logits).
        max_diff, mean_diff (`float`): Absolute difference.
        min_cosine (`float`): Cosine between the features of each image or text, or the logits of each image.
        passed (`bool`): Whether `max_diff` and `min_cosine` are within the bounds.
    """

    features: str
    max_diff: float
    mean_diff: float
    min_cosine: float
    passed: bool


@dataclass
class Report:
    """
    Result of [`verify`]; `notes` say what could not be compared, or was compared in another way than asked,
    `code_differences` how the code differs from this tree's, which is what runs, and `code_files` its number of files.
    """

    model: str
    reference: str
    dtype: str
    device: str
    max_diff_bound: float
    min_cosine_bound: float
    identical_weights: bool | None
    code_differences: list[str]
    code_files: int
    notes: list[str]
    images: list[Comparison]
    joint: list[JointComparison]

    @property
    def passed(self) -> bool:
        return (
            not self.code_differences
            and bool(self.images)
            and all(x.passed for x in self.images)
            and all(x.passed for x in self.joint)
        )

    @property
    def worst(self) -> tuple[float, float, float]:
        """Of all images: largest difference, largest mean difference, smallest cosine; NaN where there is one."""
        values = torch.tensor([(x.max_diff, x.mean_diff, x.min_cosine) for x in self.images], dtype=torch.float64)
        largest, smallest = values.amax(dim=0).tolist(), values.amin(dim=0).tolist()
        return largest[0], largest[1], smallest[2]

    @property
    def aligned(self) -> bool:
        """Whether the features of the images are within `ALIGNMENT`, whatever the dtype."""
        return is_within(self.worst, ALIGNMENT)

    def thresholds(self) -> str:
        """The worst of all images beside what is usual for a port and what is asked here, as a Markdown table."""
        own = (self.max_diff_bound, None, self.min_cosine_bound)
        rows = [
            ("measured, worst of all images", *self.worst, ""),
            ("usual for a port", *ALIGNMENT, "met" if self.aligned else "NOT met"),
            (f"asked here, {self.dtype}", *own, "met" if is_within(self.worst, own) else "NOT met"),
        ]
        lines = [
            f"| {name} | {largest:.1e} | {'' if mean is None else f'{mean:.1e}'} | {cosine:.7f} | {verdict} |"
            for name, largest, mean, cosine, verdict in rows
        ]
        head = "| | max diff | mean diff | min cosine | |"
        return "\n".join([head, "|---|---|---|---|---|", *lines])

    def to_json(self) -> str:
        """Everything as JSON, which knows no NaN: `null` stands for it."""

        def finite(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: finite(inner) for name, inner in value.items()}
            if isinstance(value, list):
                return [finite(inner) for inner in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        fields = finite(asdict(self)) | {"passed": self.passed, "aligned": self.aligned}
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"

    def tables(self) -> str:
        """The comparisons as Markdown tables."""
        rows = [
            f"| {x.image} | {x.width} x {x.height} | {x.max_diff:.1e} | {x.mean_diff:.1e} | {x.min_cosine:.7f} | "
            f"{x.mean_cosine:.7f} | {'equal' if x.passed else 'DIFFERS'} |"
            for x in self.images
        ]
        head = "| image | pixels | max diff | mean diff | min cosine | mean cosine | verdict |"
        table = "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
        if not self.joint:
            return table
        rows = [
            f"| {x.features} | {x.max_diff:.1e} | {x.mean_diff:.1e} | {x.min_cosine:.7f} | "
            f"{'equal' if x.passed else 'DIFFERS'} |"
            for x in self.joint
        ]
        head = "| features | max diff | mean diff | min cosine | verdict |"
        return "\n".join([table, "", head, "|---|---|---|---|---|", *rows])


def verify(
    folder: Path,
    reference: Encoder | ImageText | None = None,
    reference_name: str = "transformers' model with the same weights",
    images: list[Path] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Report:
    """
    Runs `folder` packed, and the reference one image at a time, on the same pixels; of an image-text model also texts
    of random tokens.

    Args:
        folder (`Path`): A converted model repo. No code in it, or that its configuration names, is run.
        reference (`Encoder` or `ImageText`, *optional*): The original's weights and configuration; by default those of
            `folder`. They are loaded in transformers' `Aimv2VisionModel` or `Aimv2Model`.
        reference_name (`str`, *optional*): What to call it in the report.
        images (`list[Path]`, *optional*): What to encode. By default the photographs of this repo, and one more of
            each of ten random sizes between 224 and 1000 pixels.
        device (`str`, *optional*, defaults to `"cpu"`): Where to run.
        dtype (`torch.dtype`, *optional*): Precision of both models, by default that of the weights.

    Raises:
        ValueError: `config.json` of `folder` is not that of a model, `folder` does not load completely in transformers'
            model, it has another geometry than the reference, or there is nothing to compare.
    """
    differences = repo_differences(folder)
    # What another configuration or file would make the libraries read, they do not get to see.
    stored = None if changes_code_only(differences) else read_source(str(folder)).model
    config, kind = stored.config if stored else read_config(folder), repo_kind(folder)
    image_text = isinstance(config, Aimv2PackingImageTextConfig)
    vision_config = config.vision_config if image_text else config
    if reference is not None:
        check_geometry(folder, config, reference_name, reference.config)
    # Before the models, which take longer.
    names, inputs = read_images(vision_config, images)
    notes = []
    original_class = Aimv2Model if image_text else Aimv2VisionModel
    original, info = load(original_class, folder, stored, dtype)
    if wrong := sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]))):
        raise ValueError(f"{folder} does not load in {original_class.__name__}: {', '.join(wrong[:5])}.")
    dtype = original.dtype
    identical_weights = None
    if reference is not None:
        converted = original.state_dict()
        weights = loaded_tensors(reference, dtype)
        identical_weights = converted.keys() == weights.keys() and all(
            torch.equal(converted[name], weights[name]) for name in weights
        )
        del converted, original
        with quiet_loading():
            original = original_class.from_pretrained(None, config=reference.config, state_dict=weights, dtype=dtype)
        del weights
    if not vision_config.is_native:
        side = vision_config.image_size
        notes.append(f"the reference has learned positions for {side} x {side} pixels only: images are cropped to that")

    original = original.eval().to(device)
    original_vision = original.vision_model if image_text else original
    expected_features = [original_features(original_vision, x, vision_config) for x in tqdm(inputs, desc="Original")]
    texts = random_texts(config.text_config) if image_text else {}
    expected_joint = original_joint(original, inputs, texts, vision_config) if image_text else {}
    del original, original_vision
    packed_class = local_class(kind.auto_map["AutoModel"])
    packed = load(packed_class, folder, stored, dtype)[0].eval().to(device)
    features = packed_features(packed.vision_model if image_text else packed, inputs)
    joint = packed_joint(packed, inputs, texts) if image_text else {}

    relative_bound, min_cosine_bound = BOUNDS[dtype]
    max_diff_bound = relative_bound * max(1.0, *(expected.abs().max().item() for expected in expected_features))
    comparisons = []
    for name, x, expected, feature in zip(names, inputs, expected_features, features, strict=True):
        diff, cosine = (feature - expected).abs(), F.cosine_similarity(feature, expected, dim=-1)
        _, rows, columns = x["grid_thw"][0].tolist()
        comparisons.append(
            Comparison(
                image=name,
                height=rows * vision_config.patch_size,
                width=columns * vision_config.patch_size,
                max_diff=diff.max().item(),
                mean_diff=diff.mean().item(),
                min_cosine=cosine.min().item(),
                mean_cosine=cosine.mean().item(),
                # In this direction NaN fails.
                passed=bool(diff.max() <= max_diff_bound and cosine.min() >= min_cosine_bound),
            )
        )
    joint_comparisons = []
    for name, expected in expected_joint.items():
        diff, cosine = (joint[name] - expected).abs(), F.cosine_similarity(joint[name], expected, dim=-1)
        bound = relative_bound * max(1.0, expected.abs().max().item())
        passed = bool(diff.max() <= bound and cosine.min() >= min_cosine_bound)
        joint_comparisons.append(
            JointComparison(name, diff.max().item(), diff.mean().item(), cosine.min().item(), passed)
        )
    return Report(
        model=str(folder),
        reference=reference_name,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        max_diff_bound=max_diff_bound,
        min_cosine_bound=min_cosine_bound,
        identical_weights=identical_weights,
        code_differences=differences,
        code_files=len(kind.code_files),
        notes=notes,
        images=comparisons,
        joint=joint_comparisons,
    )


def is_within(found: tuple[float, float, float], bounds: tuple[float, float | None, float]) -> bool:
    """Whether largest and mean difference and smallest cosine are; in this direction NaN is not."""
    largest, mean, cosine = bounds
    return found[0] <= largest and (mean is None or found[1] <= mean) and found[2] >= cosine


def load(
    model_class: type[PreTrainedModel], folder: Path, stored: Encoder | ImageText | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of `folder`, or of what was found `stored` in it, and transformers' account of its loading."""
    with quiet_loading():
        if stored is None:
            return model_class.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
        dtype = dtype or main_dtype(stored.tensors)
        weights = loaded_tensors(stored, dtype)
        return model_class.from_pretrained(
            None, config=stored.config, state_dict=weights, dtype=dtype, output_loading_info=True
        )


def loaded_tensors(model: Encoder | ImageText, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.load(dtype) for name, tensor in model.tensors.items()}


def read_config(folder: Path) -> PreTrainedConfig:
    """
    The configuration of a converted repo.

    Raises:
        ValueError: `config.json` is not that of a model.
    """
    path = folder / "config.json"
    image_text = read_json(path).get("model_type") == Aimv2PackingImageTextConfig.model_type
    try:
        return (Aimv2PackingImageTextConfig if image_text else Aimv2PackingConfig).from_pretrained(folder)
    except (StrictDataclassError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} is not that of a model: {reason}") from error


def check_geometry(folder: Path, config: PreTrainedConfig, reference_name: str, reference: PreTrainedConfig) -> None:
    """Raises a ValueError where the features of two models cannot be compared because their geometry differs."""
    kinds = ["an image-text model" if hasattr(x, "vision_config") else "a vision encoder" for x in (config, reference)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{folder} is {kinds[0]} and {reference_name} is {kinds[1]}: nothing to compare.")
    pairs: list[tuple[PreTrainedConfig, PreTrainedConfig, tuple[str, ...]]] = [(config, reference, GEOMETRY)]
    if hasattr(config, "vision_config"):
        pairs = [
            (config.vision_config, reference.vision_config, GEOMETRY),
            (config.text_config, reference.text_config, TEXT_GEOMETRY),
            (config, reference, ("projection_dim",)),
        ]
    vision = pairs[0][0]
    different = [
        f"{name} {getattr(ours, name)} and {getattr(theirs, name)}"
        for ours, theirs, names in pairs
        for name in names
        if getattr(ours, name) != getattr(theirs, name) and not (name == "image_size" and vision.is_native)
    ]
    if different:
        listed = ", ".join(different)
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
