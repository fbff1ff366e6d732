# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds an AIMv2 vision encoder among the tensors of a checkpoint, whatever names it was stored under, and gives its
tensors the names and its configuration the fields that `Aimv2VisionModel` has. Only names and shapes are looked at.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Aimv2VisionModel, PreTrainedConfig, PreTrainedModel

from .local_code import Aimv2PackingConfig
from .messages import listed, printable
from .safetensors_files import DTYPES, StoredTensor


# All released models have this head size.
HEAD_SIZE = 128
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")
# By hidden size, intermediate size and number of layers.
RELEASED = {
    (1024, 2816, 24): "Large",
    (1536, 4096, 24): "Huge",
    (2048, 5632, 24): "1B",
    (3072, 8192, 24): "3B",
}
# The configuration's fields by the names of timm's `model_args`.
TIMM_ARGUMENTS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "patch_size": "patch_size",
    "img_size": "image_size",
}
# Those that the tensors tell, or that say nothing of the features.
TIMM_ELSEWHERE = {
    *("attn_drop_rate", "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "pos_drop_rate"),
    *(
        "class_token",
        "fc_norm",
        "global_pool",
        "init_values",
        "mlp_ratio",
        "no_embed_class",
        "num_classes",
        "pos_embed",
    ),
    *("proj_bias", "proj_drop_rate", "qk_norm", "qkv_bias", "reg_tokens", "strict_img_size", "weight_init"),
}
# transformers' types of configurations that describe an AIMv2 encoder and nothing else.
ENCODER_TYPES = ("aimv2_vision_model", "aimv2_packing", "ovis2_vision")


class CheckpointFormat(NamedTuple):
    """
    Names that a library gives to the encoder's tensors.

    Attributes:
        name (`str`): What to call it.
        modules (`dict[str, str]`): The library's name of a module or tensor by `Aimv2VisionModel`'s, where they
            differ; `N` stands for the number of a layer.
        fused_qkv (`bool`): Whether query, key and value are one tensor, stacked on the first dimension.
        dropped (`str`): Pattern of tensors beside the encoder that have no counterpart in it.
    """

    name: str
    modules: dict[str, str]
    fused_qkv: bool = False
    dropped: str = r"(?!)"

    def stored_name(self, name: str) -> str:
        """The library's name of the tensor that holds `Aimv2VisionModel`'s tensor `name`."""
        number = re.search(r"\.(\d+)\.", name)
        generic = re.sub(r"\.\d+\.", ".N.", name)
        module, _, parameter = generic.rpartition(".")
        stored = self.modules.get(generic) or f"{self.modules.get(module, module)}.{parameter}"
        return stored.replace(".N.", f".{number[1]}.") if number else stored

    def part(self, name: str) -> int | None:
        """Which third of its stored tensor `name` is, or `None` when it is the whole."""
        match = re.search(r"\.attention\.([qkv])_proj\.", name) if self.fused_qkv else None
        return "qkv".index(match[1]) if match else None


# Of both of Apple's encoders.
APPLE_TRUNK = {
    "encoder.layers.N.attention.q_proj": "trunk.blocks.N.attn.qkv",
    "encoder.layers.N.attention.k_proj": "trunk.blocks.N.attn.qkv",
    "encoder.layers.N.attention.v_proj": "trunk.blocks.N.attn.qkv",
    "encoder.layers.N.attention.out_proj": "trunk.blocks.N.attn.proj",
    "encoder.layers.N.ffn.gate_proj": "trunk.blocks.N.mlp.fc1",
    "encoder.layers.N.ffn.up_proj": "trunk.blocks.N.mlp.fc3",
    "encoder.layers.N.ffn.down_proj": "trunk.blocks.N.mlp.fc2",
    "encoder.layers.N.rms_norm1": "trunk.blocks.N.norm_1",
    "encoder.layers.N.rms_norm2": "trunk.blocks.N.norm_2",
    "rms_norm": "trunk.post_trunk_norm",
}
CHECKPOINT_FORMATS = (
    CheckpointFormat("transformers", {}, dropped=r"embeddings\.position_ids"),
    CheckpointFormat("transformers Ovis2", {"embeddings.patch_embed": "embeddings.patch_embedding"}),
    CheckpointFormat(
        "Apple",
        {
            "embeddings.patch_embed": "preprocessor.patchifier.proj",
            "embeddings.rms_norm": "preprocessor.patchifier.norm",
            "embeddings.position_embedding.weight": "preprocessor.pos_embed",
            **APPLE_TRUNK,
            "head.k_proj": "head.k",
            "head.v_proj": "head.v",
            "head.output_proj": "head.linear",
        },
        fused_qkv=True,
    ),
    CheckpointFormat(
        "timm",
        {
            "embeddings.patch_embed": "patch_embed.proj",
            "embeddings.rms_norm": "patch_embed.norm",
            "embeddings.position_embedding.weight": "pos_embed",
            "encoder.layers.N.attention.q_proj": "blocks.N.attn.qkv",
            "encoder.layers.N.attention.k_proj": "blocks.N.attn.qkv",
            "encoder.layers.N.attention.v_proj": "blocks.N.attn.qkv",
            "encoder.layers.N.attention.out_proj": "blocks.N.attn.proj",
            "encoder.layers.N.ffn.gate_proj": "blocks.N.mlp.fc1_g",
            "encoder.layers.N.ffn.up_proj": "blocks.N.mlp.fc1_x",
            "encoder.layers.N.ffn.down_proj": "blocks.N.mlp.fc2",
            "encoder.layers.N.rms_norm1": "blocks.N.norm1",
            "encoder.layers.N.rms_norm2": "blocks.N.norm2",
            "rms_norm": "norm",
        },
        fused_qkv=True,
        # The classifier of a fine-tuned model.
        dropped=r"head\.(weight|bias)",
    ),
)


@dataclass
class Encoder:
    """
    An AIMv2 encoder found in a checkpoint, or what looks most like one.

    Attributes:
        checkpoint_format (`CheckpointFormat`): How its tensors are named.
        prefix (`str`): What their names begin with.
        config (`Aimv2PackingConfig` or `Aimv2TextConfig`): Its configuration; meaningless if anything is wrong.
        tensors (`dict[str, StoredTensor]`): Where the tensors are, by transformers' names and in its model's order.
        dropped, dropped_inside (`list[str]`): Tensors of the checkpoint that are no part of it, and those of them that
            begin with the prefix.
        notes (`list[str]`): What had to be guessed, or of a configuration could not be taken over, a line each.
        missing, left_over, wrong (`list[str]`): What is wrong: expected tensors that are not there, others that are
            there under the same prefix, and descriptions of tensors or settings that do not fit.
    """

    checkpoint_format: CheckpointFormat
    prefix: str
    config: PreTrainedConfig = field(default_factory=Aimv2PackingConfig)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    dropped_inside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.left_over) + len(self.wrong)

    def describe(self) -> str:
        where = f" under {self.prefix!r}" if self.prefix else ""
        lines = [f"the {self.checkpoint_format.name} checkpoint format{where}"]
        for label, names in (("missing", self.missing), ("left over", self.left_over), ("wrong", self.wrong)):
            if names:
                lines.append(f"  {label}: {listed(names)}")
        return "\n".join(lines)


def find_encoder(tensors: dict[str, StoredTensor], source_config: dict[str, Any], prefix: str | None = None) -> Encoder:
    """
    Finds the one AIMv2 vision encoder of a checkpoint.

    Args:
        tensors (`dict[str, StoredTensor]`): The checkpoint.
        source_config (`dict`): Content of its `config.json`, or empty.
        prefix (`str`, *optional*): What the names of the encoder's tensors begin with, where more than one fits.

    Raises:
        ValueError: there is no complete encoder, with what is missing, left over or misshapen in the nearest checkpoint
            format; or there is more than one.
    """
    wanted = None if prefix is None else prefix.removesuffix(".") + "." if prefix else ""
    candidates = []
    for checkpoint_format in CHECKPOINT_FORMATS:
        anchor = checkpoint_format.stored_name("embeddings.patch_embed.weight")
        for name in tensors:
            if name == anchor or name.endswith("." + anchor):
                candidate = Encoder(checkpoint_format, name.removesuffix(anchor))
                if wanted in (None, candidate.prefix):
                    match_format(candidate, tensors, source_config)
                    candidates.append(candidate)
    complete = [candidate for candidate in candidates if not candidate.problems]
    if len(complete) == 1:
        return complete[0]
    if complete:
        prefixes = ", ".join(repr(candidate.prefix) for candidate in complete)
        raise ValueError(f"The checkpoint holds {len(complete)} AIMv2 encoders. Choose one with --prefix: {prefixes}.")
    if not candidates:
        where = "" if prefix is None else f" under the prefix {prefix!r}"
        anchors = ", ".join(each.stored_name("embeddings.patch_embed.weight") for each in CHECKPOINT_FORMATS)
        raise ValueError(
            f"No AIMv2 vision encoder{where} among the checkpoint's {len(tensors)} tensors "
            f"({listed(sorted(tensors), 3)}): no checkpoint format's patch embedding is there ({anchors})."
        )
    nearest = max(candidates, key=lambda candidate: (len(candidate.tensors), -candidate.problems))
    raise ValueError(f"No complete AIMv2 vision encoder. The nearest is {nearest.describe()}")


def match_format(encoder: Encoder, tensors: dict[str, StoredTensor], source_config: dict[str, Any]) -> None:
    """Fills in what `encoder.checkpoint_format` finds under `encoder.prefix`, and what is wrong with it."""
    prefix = encoder.prefix
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        geometry = read_geometry(encoder.checkpoint_format, own)
        whole, arguments = not prefix, source_config.get("model_args")
        if encoder.checkpoint_format.name == "timm" and isinstance(arguments, dict):
            whole, source_config = True, read_timm_arguments(arguments, encoder.notes)
        settings = read_settings(geometry, source_config, whole)
        if "num_attention_heads" not in settings:
            settings["num_attention_heads"] = geometry["hidden_size"] // HEAD_SIZE
            if tuple(geometry[name] for name in SIZES) not in RELEASED:
                encoder.notes.append(guessed_heads("vision", settings["num_attention_heads"]))
        encoder.config = Aimv2PackingConfig(**{**geometry, **settings})
    except (StrictDataclassError, ValueError) as error:
        encoder.wrong.append(" ".join(str(error.__cause__ or error).split()))
        return

    match_tensors(encoder, own, expected_shapes(Aimv2VisionModel, encoder.config))
    encoder.dropped = encoder.dropped_inside + [name for name in tensors if not name.startswith(prefix)]


def match_tensors(encoder: Encoder, own: dict[str, StoredTensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Finds the tensors of these names and shapes among `own`, which lack the encoder's prefix, and what is wrong."""
    used = set()
    for name, whole in shapes.items():
        stored_name, part = encoder.checkpoint_format.stored_name(name), encoder.checkpoint_format.part(name)
        shape = whole if part is None else (3 * whole[0], *whole[1:])
        stored, label = own.get(stored_name), printable(encoder.prefix + stored_name)
        used.add(stored_name)
        if stored is None:
            encoder.missing.append(label)
        elif stored.dtype not in DTYPES:
            encoder.wrong.append(f"{label} is {stored.dtype}, expected one of {', '.join(DTYPES)}")
        elif stored.shape not in (shape, (1, *shape)):
            encoder.wrong.append(f"{label} is {stored.shape}, expected {shape}")
        else:
            stored = stored._replace(shape=shape)
            encoder.tensors[name] = stored if part is None else stored.part(part, 3)

    # Of theirs, which may be three of ours.
    encoder.missing, encoder.wrong = (list(dict.fromkeys(names)) for names in (encoder.missing, encoder.wrong))
    others = [name for name in own if name not in used]
    dropped = {name for name in others if re.fullmatch(encoder.checkpoint_format.dropped, name)}
    encoder.left_over = [encoder.prefix + name for name in others if name not in dropped]
    encoder.dropped_inside = [encoder.prefix + name for name in others if name in dropped]


def expected_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model of this class, by name and in its order."""
    # All layers are like the first: names may claim more of them than could be built in a lifetime.
    one_layer = copy.copy(config)
    one_layer.num_hidden_layers = 1
    with torch.device("meta"):
        state = model_class(one_layer).state_dict()
    layer = [name for name in state if name.startswith("encoder.layers.0.")]
    names = []
    for name in state:
        if name == layer[0]:
            names += [(i, own) for i in range(config.num_hidden_layers) for own in layer]
        elif name not in layer:
            names.append((0, name))
    return {name.replace(".0.", f".{index}."): tuple(state[name].shape) for index, name in names}


def read_geometry(checkpoint_format: CheckpointFormat, own: dict[str, StoredTensor]) -> dict[str, Any]:
    """
    The fields of the configuration that names and shapes of the tensors determine.

    Raises:
        ValueError: tensors that determine a field are missing or have a shape that no AIMv2 encoder has.
    """

    hidden_size, num_channels, patch_size, patch_width = stored_tensor(
        checkpoint_format, own, "embeddings.patch_embed.weight", 4
    ).shape
    if patch_size != patch_width:
        raise ValueError(
            f"the patch embedding is {(hidden_size, num_channels, patch_size, patch_width)}, expected (hidden_size, "
            "channels, patch_size, patch_size)"
        )
    fields = {
        "hidden_size": hidden_size,
        **read_trunk(checkpoint_format, own),
        "num_channels": num_channels,
        "patch_size": patch_size,
        "use_head": checkpoint_format.stored_name("head.cls_token") in own,
        "is_native": checkpoint_format.stored_name("embeddings.position_embedding.weight") not in own,
    }
    if not fields["is_native"]:
        shape = own[checkpoint_format.stored_name("embeddings.position_embedding.weight")].shape
        num_positions = shape[-2] if len(shape) > 1 else 0
        side = math.isqrt(num_positions)
        if not side or side**2 != num_positions:
            raise ValueError(f"the position embedding is {shape}, expected (positions of a square grid, hidden_size)")
        fields["image_size"] = side * patch_size
    return fields


def read_trunk(checkpoint_format: CheckpointFormat, own: dict[str, StoredTensor]) -> dict[str, Any]:
    """The fields of [`read_geometry`] that the layers determine."""
    norm = re.escape(checkpoint_format.stored_name("encoder.layers.0.rms_norm1.weight")).replace(r"\.0\.", r"\.\d+\.")
    return {
        "intermediate_size": stored_tensor(checkpoint_format, own, "encoder.layers.0.ffn.gate_proj.weight", 2).shape[0],
        "num_hidden_layers": sum(re.fullmatch(norm, name) is not None for name in own),
        "qkv_bias": checkpoint_format.stored_name("encoder.layers.0.attention.q_proj.bias") in own,
        "mlp_bias": checkpoint_format.stored_name("encoder.layers.0.ffn.gate_proj.bias") in own,
    }


def stored_tensor(
    checkpoint_format: CheckpointFormat, own: dict[str, StoredTensor], name: str, rank: int
) -> StoredTensor:
    """
    The tensor that is stored for transformers' `name`.

    Raises:
        ValueError: it is missing, or has not `rank` dimensions.
    """
    stored_name = checkpoint_format.stored_name(name)
    if stored_name not in own:
        raise ValueError(f"{stored_name} is missing")
    if len(own[stored_name].shape) != rank:
        raise ValueError(f"{stored_name} is {own[stored_name].shape}, expected {rank} dimensions")
    return own[stored_name]


def read_settings(geometry: dict[str, Any], source_config: dict[str, Any], whole: bool) -> dict[str, Any]:
    """
    The fields of the configuration that only the source's `config.json` can tell, with the defaults of the released
    models where it does not.

    Args:
        geometry (`dict`): Fields that the tensors determine, which the source must not contradict.
        source_config (`dict`): The source's configuration; that of the encoder is sought in all its parts.
        whole (`bool`): Whether the checkpoint is the encoder alone, so that `source_config` itself describes it.

    Raises:
        ValueError: the source's configuration contradicts the tensors or itself.
    """
    checked = (*SIZES, "num_channels", "patch_size") + (() if geometry["is_native"] else ("image_size",))

    def contradictions(section: dict[str, Any]) -> list[str]:
        return [name for name in checked if section.get(name, geometry[name]) != geometry[name]]

    sections = [source_config]
    if not whole:
        everything = list(nested(source_config))
        sections = [section for section in everything if section.get("model_type") in ENCODER_TYPES]
        if not sections:
            complete = [section for section in everything if all(name in section for name in SIZES)]
            sections = [section for section in complete if not contradictions(section)]
    fitting = [section for section in sections if not contradictions(section)]
    if sections and not fitting:
        name = contradictions(sections[0])[0]
        raise ValueError(f"config.json says {name} {sections[0][name]}, the tensors say {geometry[name]}")

    heads = [section["num_attention_heads"] for section in fitting if "num_attention_heads" in section]
    if different := [value for value in heads if value != heads[0]]:
        raise ValueError(f"config.json says num_attention_heads {heads[0]} and {different[0]}")
    if not heads and any(section.get("model_type") in ENCODER_TYPES for section in fitting):
        # transformers leaves out of a nested configuration what equals the default.
        heads = [Aimv2PackingConfig().num_attention_heads]
    if not heads and geometry["hidden_size"] % HEAD_SIZE:
        raise ValueError("no config.json says num_attention_heads, and the size is none of the released models'")
    settings = {"num_attention_heads": heads[0]} if heads else {}
    # `use_head` and `is_native` decide which tensors must be there: one that is not is then found missing.
    stated = (
        "rms_norm_eps",
        "hidden_act",
        "attention_dropout",
        "initializer_range",
        "image_size",
        "use_head",
        "is_native",
        "patch_layout",
        "merge_temporal",
    )
    for section in reversed(fitting):
        settings |= {name: section[name] for name in stated if name in section}
    return settings


def read_timm_arguments(arguments: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The configuration's fields that timm's `model_args` tell, and in `notes` what else might change features."""
    unknown = sorted(arguments.keys() - TIMM_ARGUMENTS.keys() - TIMM_ELSEWHERE)
    if unknown:
        notes.append(f"not taken over of timm's model_args: {listed(unknown)}")
    fields = {new: arguments[name] for name, new in TIMM_ARGUMENTS.items() if arguments.get(name) is not None}
    sides = fields.get("image_size")
    if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
        fields["image_size"] = sides[0]
    return fields


def guessed_heads(encoder: str, heads: int) -> str:
    return (
        f"no configuration says how many attention heads the {encoder} encoder has: {heads} are taken, of {HEAD_SIZE} "
        "values each, as in all released models"
    )


def nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`config` and every object inside it."""
    # A stack of its own: what JSON may nest is deeper than what Python may call.
    objects = [config]
    while objects:
        current = objects.pop()
        yield current
        objects += [value for value in reversed(current.values()) if isinstance(value, dict)]
