# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Finds what makes a vision encoder an image-text model ("LiT"): text encoder, projections and logit scale."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import Aimv2TextConfig, Aimv2TextModel
from transformers.activations import ACT2FN

from .checkpoint_formats import (
    APPLE_TRUNK,
    HEAD_SIZE,
    CheckpointFormat,
    Encoder,
    expected_shapes,
    guessed_heads,
    match_tensors,
    nested,
    read_trunk,
    stored_tensor,
)
from .local_code import Aimv2PackingImageTextConfig
from .messages import printable
from .safetensors_files import DTYPES, StoredTensor


class Names(NamedTuple):
    """How a library names the parts of the model: what its encoders' names begin with, and its other tensors."""

    vision: str
    text: str
    visual_projection: str
    text_projection: str
    logit_scale: str
    text_format: CheckpointFormat


# By the vision encoder's checkpoint format. Apple's names are those that transformers' own conversion reads,
# `convert_aimv2_original_pytorch_to_hf.py`.
NAMES = {
    "transformers": Names(
        "vision_model.",
        "text_model.",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        CheckpointFormat("transformers", {}, dropped=r"embeddings\.position_ids"),
    ),
    "Apple": Names(
        "image_encoder.",
        "text_encoder.",
        "image_projector.weight",
        "text_projector.weight",
        "log_logit_scale",
        CheckpointFormat(
            "Apple",
            {
                "embeddings.token_embedding": "preprocessor.text_embedding",
                "embeddings.position_embedding.weight": "preprocessor.positional_embedding",
                **APPLE_TRUNK,
            },
            fused_qkv=True,
        ),
    ),
}


@dataclass
class ImageText:
    """
    An image-text model found in a checkpoint.

    Attributes:
        checkpoint_format (`CheckpointFormat`): How the tensors of its vision encoder are named.
        config (`Aimv2PackingImageTextConfig`): Its configuration.
        tensors (`dict[str, StoredTensor]`): Where the tensors are, by `Aimv2Model`'s names.
        dropped (`list[str]`): Tensors of the checkpoint that are no part of it.
        notes (`list[str]`): As an encoder's, of both.
    """

    checkpoint_format: CheckpointFormat
    config: Aimv2PackingImageTextConfig
    tensors: dict[str, StoredTensor]
    dropped: list[str]
    notes: list[str]


def find_image_text(
    vision: Encoder, tensors: dict[str, StoredTensor], source_config: dict[str, Any]
) -> ImageText | None:
    """
    The image-text model that the vision encoder is part of, or `None` where it is none.

    Args:
        vision (`Encoder`): The complete vision encoder.
        tensors (`dict[str, StoredTensor]`): The checkpoint.
        source_config (`dict`): Content of its `config.json`, or empty.

    Raises:
        ValueError: the checkpoint holds a projection of images or a logit scale, but no complete image-text model.
    """
    names = NAMES.get(vision.checkpoint_format.name)
    if names is None or not f".{vision.prefix}".endswith(f".{names.vision}"):
        return None
    root = vision.prefix.removesuffix(names.vision)
    if not {root + names.visual_projection, root + names.logit_scale} & tensors.keys():
        return None
    config_of_whole = next((part for part in nested(source_config) if isinstance(part.get("text_config"), dict)), {})

    text = Encoder(names.text_format, root + names.text)
    match_text(text, tensors, config_of_whole.get("text_config", {}))
    found = {f"text_model.{name}": tensor for name, tensor in text.tensors.items()}
    found |= {f"vision_model.{name}": tensor for name, tensor in vision.tensors.items()}
    image_features = tensors.get(root + names.visual_projection)
    dimension = image_features.shape[0] if image_features and image_features.shape else 0
    shapes = {
        "visual_projection.weight": (dimension, vision.config.hidden_size),
        "text_projection.weight": (dimension, text.config.hidden_size),
        "logit_scale": (),
    }
    others = (names.visual_projection, names.text_projection, names.logit_scale)
    for own, (name, shape) in zip(others, shapes.items(), strict=True):
        stored, label = tensors.get(root + own), printable(root + own)
        if stored is None:
            text.missing.append(label)
        elif stored.dtype not in DTYPES or stored.shape not in (shape, (1, *shape)):
            text.wrong.append(f"{label} is {stored.dtype} {stored.shape}, expected floating-point {shape}")
        else:
            found[name] = stored._replace(shape=shape)
    if (stated_dimension := config_of_whole.get("projection_dim", dimension)) != dimension:
        text.wrong.append(f"config.json says projection_dim {stated_dimension}, the tensors say {dimension}")
    fields = {"vision_config": vision.config, "text_config": text.config, "projection_dim": dimension}
    stated = ("logit_scale_init_value", "max_logit_scale", "initializer_factor")
    try:
        config = Aimv2PackingImageTextConfig(
            **fields, **{name: config_of_whole[name] for name in stated if name in config_of_whole}
        )
    except (StrictDataclassError, ValueError) as error:
        text.wrong.append(" ".join(str(error.__cause__ or error).split()))
    if text.problems:
        raise ValueError(
            "The AIMv2 vision encoder is part of an image-text model that is not complete. Convert it alone with "
            f"--vision-only, or complete the rest: {text.describe()}"
        )
    used = {root + own for own in others}
    dropped = [name for name in vision.dropped if name not in used and not name.startswith(text.prefix)]
    return ImageText(vision.checkpoint_format, config, found, text.dropped_inside + dropped, vision.notes + text.notes)


def match_text(text: Encoder, tensors: dict[str, StoredTensor], section: dict[str, Any]) -> None:
    """Fills in what `text.checkpoint_format` finds under `text.prefix`, and what is wrong with it."""
    own = {name.removeprefix(text.prefix): x for name, x in tensors.items() if name.startswith(text.prefix)}
    try:
        vocab_size, hidden_size = stored_tensor(
            text.checkpoint_format, own, "embeddings.token_embedding.weight", 2
        ).shape
        positions = text.checkpoint_format.stored_name("embeddings.position_embedding.weight")
        if positions not in own or len(own[positions].shape) < 2:
            raise ValueError(f"{positions} is missing, or has not two dimensions")
        geometry = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "max_position_embeddings": own[positions].shape[-2],
            **read_trunk(text.checkpoint_format, own),
        }
        settings = read_text_settings(geometry, section, text.notes)
        text.config = Aimv2TextConfig(**{**geometry, **settings})
        shapes = expected_shapes(Aimv2TextModel, text.config)
    except (StrictDataclassError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # The text encoder's configuration checks no sizes: torch refuses those that no tensor can have.
        text.wrong.append(" ".join(str(error.__cause__ or error).split()))
        return
    match_tensors(text, own, shapes)


def read_text_settings(geometry: dict[str, Any], section: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """
    The fields of the text encoder's configuration that only the source's can tell, with the defaults of the released
    model where it does not; what is guessed is added to `notes`.

    Raises:
        ValueError: the source's configuration contradicts the tensors, or does not tell what has no default.
    """
    default = Aimv2TextConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        if section.get(name, geometry[name]) != geometry[name]:
            raise ValueError(f"config.json says {name} {section[name]}, the tensors say {geometry[name]}")
    stated = ("num_attention_heads", "eos_token_id", "hidden_act", "attention_dropout", "rms_norm_eps")
    settings = {name: section[name] for name in (*stated, "initializer_range") if name in section}
    if "num_attention_heads" not in settings:
        if section.get("model_type") == default.model_type:
            # transformers leaves out of a nested configuration what equals the default.
            settings["num_attention_heads"] = default.num_attention_heads
        elif geometry["hidden_size"] % HEAD_SIZE:
            raise ValueError("config.json says no num_attention_heads of the text encoder")
        else:
            settings["num_attention_heads"] = geometry["hidden_size"] // HEAD_SIZE
            notes.append(guessed_heads("text", settings["num_attention_heads"]))
    heads = settings["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1 or geometry["hidden_size"] % heads:
        raise ValueError(f"num_attention_heads {heads!r} of the text encoder do not divide {geometry['hidden_size']}")
    if (activation := settings.get("hidden_act", default.hidden_act)) not in ACT2FN:
        raise ValueError(f"hidden_act {activation!r} of the text encoder is no activation of transformers")
    closing = settings.setdefault("eos_token_id", default.eos_token_id)
    if not isinstance(closing, int) or not 0 <= closing < geometry["vocab_size"]:
        raise ValueError(f"eos_token_id {closing!r} of the text encoder is none of its {geometry['vocab_size']} tokens")
    return settings
