# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A small image-text model of random weights, a tokenizer like CLIP's, and the repo that a conversion makes of them."""

import json
import shutil
from pathlib import Path

import torch
from reference import REPO, TINY, packing_model, random_weights
from tokenizers import pre_tokenizers
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionModel, CLIPTokenizer, PreTrainedModel

from conversion.local_code import local_class


Aimv2PackingImageTextModel = local_class("accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel")
Aimv2PackingImageTextConfig = Aimv2PackingImageTextModel.config_class

TEXTS = ["a cat", "a rocket on its launch pad", "two cups of coffee", "the portrait of an astronaut"]
VOCABULARY = 517
MAX_TOKENS = 77


def reference_image_text_model(**config) -> Aimv2Model:
    """transformers' model: vision as `TINY` with a head and learned positions of 4 x 4 patches."""
    vision = {**TINY, "is_native": False, "use_head": True, **config.pop("vision", {})}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "eos_token_id": VOCABULARY - 1,
    }
    fields = {"vision_config": vision, "text_config": text, "projection_dim": 40, **config}
    model = random_weights(Aimv2Model(Aimv2Config(**fields)))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    return model


def image_text_model(reference: Aimv2Model, **config):
    """The packed model with the weights of `reference`."""
    fields = reference.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    model = Aimv2PackingImageTextModel(Aimv2PackingImageTextConfig(**fields, **config)).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes, a few merges, and `<|startoftext|>` and `<|endoftext|>` last, as in CLIP's own vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def save_image_text_repo(folder: Path, reference: Aimv2Model, tokenizer: bool = True) -> Path:
    """What a conversion writes: weights, configurations, tokenizer and code."""
    model = image_text_model(reference)
    name = "accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel"
    auto_map = {
        "AutoConfig": "configuration_aimv2_packing.Aimv2PackingImageTextConfig",
        "AutoModel": name,
        "AutoModelForZeroShotImageClassification": name,
    }
    save_repo(folder, model, auto_map, image_size=model.config.vision_config.image_size)
    processor = {
        "auto_map": {"AutoProcessor": "processing_aimv2_packing.Aimv2PackingProcessor"},
        "processor_class": "Aimv2PackingProcessor",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if tokenizer:
        clip_tokenizer().save_pretrained(folder)
    return folder


def save_vision_repo(folder: Path, reference: Aimv2VisionModel) -> Path:
    """The same of a vision tower alone."""
    model = packing_model(reference)
    auto_map = json.loads((REPO / "config.json").read_text())["auto_map"]
    return save_repo(folder, model, auto_map, None if model.config.is_native else model.config.image_size)


def save_repo(folder: Path, model: PreTrainedModel, auto_map: dict[str, str], image_size: int | None) -> Path:
    model.config.auto_map = dict(auto_map)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    images = json.loads((REPO / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "image_size": image_size, "min_patches": 1}))
    for path in REPO.glob("*_aimv2_packing.py"):
        shutil.copyfile(path, folder / path.name)
    return folder
