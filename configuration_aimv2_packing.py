# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the packed AIMv2 vision encoder."""

import dataclasses
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from transformers.activations import ACT2FN
from transformers.utils.versions import require_version


# Before what would fail without a word of the version.
require_version("transformers>=5.15", "To update: pip install --upgrade transformers")

# In values: torch counts bytes in 64 bits.
MAX_WEIGHT_SIZE = torch.iinfo(torch.int64).max // torch.float64.itemsize


def sentence_transformers_files(image_text: bool) -> dict[str, Any]:
    """
    What makes a model repo a Sentence Transformers model, by the names of its two files. An image is what the visual
    projection gives, or the head, or else the mean over its patches; a text is what the text projection gives.
    """
    names = ("image", "text") if image_text else ("image",)
    modalities = {name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"} for name in names}
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": modalities,
        "module_output_name": "sentence_embedding",
    }
    kind = "sentence_transformers_aimv2_packing.Aimv2PackingTransformer"
    module = {"idx": 0, "name": "0", "path": "", "type": kind}
    return {"sentence_bert_config.json": settings, "modules.json": [module]}


class SentenceTransformersMixin:
    """Makes what is saved with its code a Sentence Transformers model too."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As [`~transformers.PreTrainedConfig.save_pretrained`], and beside a model's code the files that Sentence
        Transformers reads; the processor brings their module. A `modules.json` that is there already is kept, with its
        settings.
        """
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        if "AutoModel" not in (getattr(self, "auto_map", None) or {}) or (folder / "modules.json").exists():
            return
        for name, content in sentence_transformers_files(image_text=hasattr(self, "text_config")).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def check_auto_map(config: Aimv2VisionConfig | Aimv2Config) -> None:
    """A ValueError where saving would fail, which adds to it."""
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, dict | None):
        raise ValueError(f"`auto_map` must be a dict, got {auto_map!r}.")


@strict
class Aimv2PackingConfig(SentenceTransformersMixin, Aimv2VisionConfig):
    r"""
    Configuration of [`Aimv2PackingModel`]: every field of [`~transformers.Aimv2VisionConfig`], with the same meaning
    and default, and the two below. The configuration of an `Aimv2VisionModel` checkpoint is a valid one.

    Args:
        patch_layout (`str`, *optional*, defaults to `"channels_first"`):
            Order of the values inside one flattened patch: `"channels_first"` for `(channel, row, column)`, that of a
            flattened `Conv2d` weight and of Qwen2-VL's image processor; `"channels_last"` for
            `(row, column, channel)`, that of Siglip2 and NaFlex.
        merge_temporal (`bool`, *optional*, defaults to `False`):
            Whether the frames of a video attend to each other. By default each frame is encoded like an image.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a field has the wrong type, or a value that no model can have.
        ValueError: the same of a field that every configuration has, or a name is not that of a field.
    """

    model_type = "aimv2_packing"
    _auto_class = "AutoConfig"

    # Names of modules below `Aimv2PackingModel`; a tensor-parallel rank holds whole attention heads.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "encoder.layers.*.attention.q_proj": "colwise",
        "encoder.layers.*.attention.k_proj": "colwise",
        "encoder.layers.*.attention.v_proj": "colwise",
        "encoder.layers.*.attention.out_proj": "rowwise",
        "encoder.layers.*.ffn.gate_proj": "colwise",
        "encoder.layers.*.ffn.up_proj": "colwise",
        "encoder.layers.*.ffn.down_proj": "rowwise",
    }

    # One all-gather per layer; without a plan of its own, the whole model would be gathered at once.
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
    }

    patch_layout: Literal["channels_first", "channels_last"] = "channels_first"
    merge_temporal: bool = False

    def __post_init__(self, **kwargs: Any):
        for name in kwargs:
            attribute = inspect.getattr_static(type(self), name, dataclasses.MISSING)
            settable = isinstance(attribute, property) and attribute.fset is not None
            if attribute is not dataclasses.MISSING and name != "model_type" and not settable:
                # Set on the configuration, it would hide the attribute from transformers.
                raise ValueError(f"`{name}` is no field of the configuration, but one of its own attributes.")
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"transformers refuses a field of the configuration: {error}.") from error

    def validate_inherited_fields(self):
        """Refuses what transformers lets pass and fails on later; called as the next."""
        # Models are saved with its name.
        dtype = getattr(torch, self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype | None):
            raise ValueError(f"`dtype` must be the name of a torch dtype, got {self.dtype!r}.")
        if not isinstance(self._attn_implementation, str | None):
            raise ValueError(f"`attn_implementation` must be a str, got {self._attn_implementation!r}.")
        check_auto_map(self)

    def validate_geometry(self):
        """Refuses sizes that no model can have; called by `@strict` whenever a configuration is made."""
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive int, got {value!r}.")
        if self.num_hidden_layers < 0:
            raise ValueError(f"`num_hidden_layers` must not be negative, got {self.num_hidden_layers}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` must be positive and finite, got {self.rms_norm_eps}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` must not be negative, and finite, got {self.initializer_range}.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be in [0, 1), got {self.attention_dropout}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.is_native and self.hidden_size % 4:
            raise ValueError(
                "`hidden_size` must be divisible by 4 when `is_native` is true (sine and cosine of row and column), "
                f"got {self.hidden_size}."
            )
        if not self.is_native and (
            not isinstance(self.image_size, int) or self.image_size < 1 or self.image_size % self.patch_size
        ):
            raise ValueError(
                "`image_size` must be an int that is a multiple of `patch_size` when `is_native` is false (one learned "
                f"position per patch of a square image), got {self.image_size!r} and {self.patch_size}."
            )
        positions = 0 if self.is_native else (self.image_size // self.patch_size) ** 2
        inputs = max(self.hidden_size, self.intermediate_size, self.num_channels * self.patch_size**2, positions)
        if self.hidden_size * inputs > MAX_WEIGHT_SIZE:
            raise ValueError(
                "no tensor can hold a weight of `hidden_size` times the largest of `hidden_size`, `intermediate_size`, "
                f"`num_channels` * `patch_size`**2 and the number of positions: {self.hidden_size} * {inputs}."
            )


@strict
class Aimv2PackingImageTextConfig(SentenceTransformersMixin, Aimv2Config):
    r"""
    Configuration of [`Aimv2PackingImageTextModel`]: the fields of [`~transformers.Aimv2Config`], with the same meaning
    and default. The configuration of an `Aimv2Model` checkpoint is a valid one.

    Args:
        vision_config ([`Aimv2PackingConfig`] or `dict`, *optional*):
            Of the vision tower, which must have a head.
        text_config ([`~transformers.Aimv2TextConfig`] or `dict`, *optional*):
            Of the text encoder.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a field has the wrong type, or a value that no model can have.
        ValueError: the same of a field of the vision tower.
    """

    model_type = "aimv2_packing_image_text"
    _auto_class = "AutoConfig"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": Aimv2TextConfig, "vision_config": Aimv2PackingConfig}

    def __post_init__(self, **kwargs: Any):
        vision: Any = self.vision_config or {}  # type: ignore[has-type]
        if isinstance(vision, Aimv2VisionConfig) and not isinstance(vision, Aimv2PackingConfig):
            # Of transformers, or of another repo with this code, which is a module of its own.
            vision = vision.to_dict()
        if isinstance(vision, dict):
            vision = Aimv2PackingConfig(**{name: value for name, value in vision.items() if name != "model_type"})
        self.vision_config = vision
        super().__post_init__(**kwargs)

    def validate_parts(self):
        """Refuses parts that do not make an image-text model; called by `@strict`."""
        check_auto_map(self)
        for name, kind in (("vision_config", Aimv2PackingConfig), ("text_config", Aimv2TextConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"`{name}` must be a dict or {kind.__name__}, got {type(getattr(self, name)).__name__}."
                )
        if not self.vision_config.use_head:
            raise ValueError(
                "`vision_config.use_head` must be true: the projection reads what the head gives, got false."
            )
        if self.projection_dim < 1:
            raise ValueError(f"`projection_dim` must be a positive int, got {self.projection_dim}.")
        if not 0 < self.max_logit_scale < math.inf:
            raise ValueError(f"`max_logit_scale` must be positive and finite, got {self.max_logit_scale}.")


__all__ = ["Aimv2PackingConfig", "Aimv2PackingImageTextConfig"]
