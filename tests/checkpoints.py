# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in every format, made from one `Aimv2VisionModel`; the names are written out here once more."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


Tensors = dict[str, torch.Tensor]


def apple(model: torch.nn.Module, prefix: str = "") -> Tensors:
    state = model.state_dict()
    stored = {
        "preprocessor.patchifier.proj.weight": state["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": state["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": state["embeddings.rms_norm.weight"],
        "trunk.post_trunk_norm.weight": state["rms_norm.weight"],
    }
    if "embeddings.position_embedding.weight" in state:
        stored["preprocessor.pos_embed"] = state["embeddings.position_embedding.weight"][None]
    for index in range(model.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{index}.", f"trunk.blocks.{index}."
        for kind in ("weight", "bias"):
            if f"{ours}attention.q_proj.{kind}" in state:
                qkv = [state[f"{ours}attention.{name}_proj.{kind}"] for name in "qkv"]
                stored[f"{theirs}attn.qkv.{kind}"] = torch.cat(qkv)
                stored[f"{theirs}attn.proj.{kind}"] = state[f"{ours}attention.out_proj.{kind}"]
            if f"{ours}ffn.gate_proj.{kind}" in state:
                stored[f"{theirs}mlp.fc1.{kind}"] = state[f"{ours}ffn.gate_proj.{kind}"]
                stored[f"{theirs}mlp.fc2.{kind}"] = state[f"{ours}ffn.down_proj.{kind}"]
                stored[f"{theirs}mlp.fc3.{kind}"] = state[f"{ours}ffn.up_proj.{kind}"]
        stored[f"{theirs}norm_1.weight"] = state[f"{ours}rms_norm1.weight"]
        stored[f"{theirs}norm_2.weight"] = state[f"{ours}rms_norm2.weight"]
    if model.config.use_head:
        stored["head.cls_token"] = state["head.cls_token"]
        for theirs, ours in (("k", "k_proj"), ("v", "v_proj"), ("linear", "output_proj")):
            for kind in ("weight", "bias"):
                if f"head.{ours}.{kind}" in state:
                    stored[f"head.{theirs}.{kind}"] = state[f"head.{ours}.{kind}"]
    return {prefix + name: tensor.contiguous() for name, tensor in stored.items()}


def apple_image_text(model: torch.nn.Module, prefix: str = "") -> Tensors:
    """Of transformers' `Aimv2Model`."""
    stored = apple(model.vision_model, "image_encoder.") | {
        "image_projector.weight": model.visual_projection.weight.data,
        "text_projector.weight": model.text_projection.weight.data,
        "log_logit_scale": model.logit_scale.data,
    }
    state = model.text_model.state_dict()
    text = {
        "preprocessor.text_embedding.weight": state["embeddings.token_embedding.weight"],
        "preprocessor.positional_embedding": state["embeddings.position_embedding.weight"],
        "trunk.post_trunk_norm.weight": state["rms_norm.weight"],
    }
    for index in range(model.config.text_config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{index}.", f"trunk.blocks.{index}."
        qkv = [state[f"{ours}attention.{name}_proj.weight"] for name in "qkv"]
        text[f"{theirs}attn.qkv.weight"] = torch.cat(qkv)
        text[f"{theirs}attn.proj.weight"] = state[f"{ours}attention.out_proj.weight"]
        text[f"{theirs}mlp.fc1.weight"] = state[f"{ours}ffn.gate_proj.weight"]
        text[f"{theirs}mlp.fc2.weight"] = state[f"{ours}ffn.down_proj.weight"]
        text[f"{theirs}mlp.fc3.weight"] = state[f"{ours}ffn.up_proj.weight"]
        text[f"{theirs}norm_1.weight"] = state[f"{ours}rms_norm1.weight"]
        text[f"{theirs}norm_2.weight"] = state[f"{ours}rms_norm2.weight"]
    stored |= {f"text_encoder.{name}": tensor for name, tensor in text.items()}
    return {prefix + name: tensor.contiguous() for name, tensor in stored.items()}


def timm(model: torch.nn.Module, prefix: str = "") -> Tensors:
    """What timm makes of Apple's names."""
    new_names = (
        ("preprocessor.patchifier.", "patch_embed."),
        ("preprocessor.pos_embed", "pos_embed"),
        ("trunk.post_trunk_norm.", "norm."),
        ("trunk.", ""),
        ("norm_1", "norm1"),
        ("norm_2", "norm2"),
        ("mlp.fc1", "mlp.fc1_g"),
        ("mlp.fc3", "mlp.fc1_x"),
    )
    return {prefix + reduce(lambda x, new: x.replace(*new), new_names, k): v for k, v in apple(model).items()}


def transformers(model: torch.nn.Module, prefix: str = "") -> Tensors:
    return {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def ovis2(model: torch.nn.Module, prefix: str = "model.vision_tower.transformer.") -> Tensors:
    return {
        prefix + name.replace("patch_embed.", "patch_embedding."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }


def apple_config(model: torch.nn.Module) -> dict[str, Any]:
    config = model.config
    fields: dict[str, Any] = {
        "model_type": "aimv2",
        "architectures": ["AIMv2Model"],
        "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"},
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": 3,
        "patch_size": config.patch_size,
        "qkv_bias": config.qkv_bias,
        "use_bias": config.mlp_bias,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
        "torch_dtype": "float32",
    }
    return fields if config.is_native else fields | {"image_size": config.image_size}


def apple_image_text_config(model: torch.nn.Module) -> dict[str, Any]:
    text = model.config.text_config
    text_fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "model_type": "aimv2",
        "architectures": ["AIMv2Model"],
        "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"},
        "projection_dim": model.config.projection_dim,
        "vision_config": apple_config(model.vision_model),
        "text_config": {
            **{name: getattr(text, name) for name in text_fields},
            "max_context_length": text.max_position_embeddings,
            "eos_token_id": text.eos_token_id,
            "rms_norm_eps": text.rms_norm_eps,
            "use_bias": False,
        },
    }


def save(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
