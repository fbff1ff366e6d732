# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of model repo that the converter makes, and what each of them holds beside weights and texts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .code_files import CODE_FILES, REPO
from .safetensors_files import read_json


# `model_type` of what this repo's models load.
CONVERTED_TYPES = ("aimv2_packing", "aimv2_packing_image_text")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
PROCESSOR: dict[str, Any] = {
    "auto_map": {"AutoProcessor": "processing_aimv2_packing.Aimv2PackingProcessor"},
    "processor_class": "Aimv2PackingProcessor",
}


@dataclass(frozen=True)
class RepoKind:
    """
    What distinguishes converted repos, other than their weights and sizes.

    Attributes:
        image_text (`bool`): Whether the model has a text encoder.
    """

    image_text: bool

    @property
    def auto_map(self) -> dict[str, str]:
        """The classes that `config.json` names."""
        if not self.image_text:
            return read_json(REPO / "config.json")["auto_map"]
        model = "image_text_aimv2_packing.Aimv2PackingImageTextModel"
        return {
            "AutoConfig": "configuration_aimv2_packing.Aimv2PackingImageTextConfig",
            "AutoModel": model,
            "AutoModelForZeroShotImageClassification": model,
        }

    @property
    def architectures(self) -> list[str]:
        return [self.auto_map["AutoModel"].rpartition(".")[2]]

    @property
    def image_processor(self) -> dict[str, Any]:
        """`preprocessor_config.json` of the released models at native resolution."""
        return read_json(REPO / "preprocessor_config.json")

    @property
    def sentence_transformers(self) -> dict[str, Any]:
        """
        The two files that make a repo a Sentence Transformers model, by name. An image is what the visual projection
        gives, or the head, or else the mean over its patches; a text is what the text projection gives.
        """
        names = ("image", "text") if self.image_text else ("image",)
        modalities = {name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"} for name in names}
        module = {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers_aimv2_packing.Aimv2PackingTransformer",
        }
        settings = {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "sentence_embedding",
        }
        return {"modules.json": [module], "sentence_bert_config.json": settings}

    @property
    def code_files(self) -> tuple[Path, ...]:
        """The files of code that such a repo carries."""
        return tuple(CODE_FILES)

    def write_json(self, folder: Path) -> None:
        """Writes the files of Sentence Transformers, and `processor_config.json` where there are texts."""
        files = self.sentence_transformers | ({"processor_config.json": PROCESSOR} if self.image_text else {})
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def why_not_converted(folder: Path) -> str | None:
    """What in `config.json` says that the folder is no converted repo, or `None` where it is one."""
    file = folder / "config.json"
    if not file.is_file():
        return "it has no config.json"
    model_type = read_json(file).get("model_type")
    return None if model_type in CONVERTED_TYPES else f"its model_type is {model_type!r}"


def is_converted(folder: Path) -> bool:
    return why_not_converted(folder) is None


def repo_kind(folder: Path) -> RepoKind:
    """The kind of a converted repo."""
    return RepoKind(image_text=read_json(folder / "config.json")["model_type"] == "aimv2_packing_image_text")
