# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of model repo that the converter makes, and what each of them holds beside weights and texts."""

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from .code_files import CODE_FILES, REPO, with_imports
from .local_code import local_class
from .safetensors_files import read_json


sentence_transformers_files = local_class("configuration_aimv2_packing.sentence_transformers_files")

# `model_type` of what this repo's models load.
CONVERTED_TYPES = ("aimv2_packing", "aimv2_packing_image_text")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# Of `AutoConfig` and `AutoModel`, by whether there is a text encoder and whether the model is the plain one.
MODEL_CLASSES = {
    (False, False): (
        "configuration_aimv2_packing.Aimv2PackingConfig",
        "accelerated_aimv2_packing.Aimv2PackingAcceleratedModel",
    ),
    (False, True): (
        "configuration_aimv2_packing.Aimv2PackingConfig",
        "modeling_aimv2_packing.Aimv2PackingModel",
    ),
    (True, False): (
        "configuration_aimv2_packing.Aimv2PackingImageTextConfig",
        "accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel",
    ),
    (True, True): (
        "configuration_aimv2_packing.Aimv2PackingImageTextConfig",
        "image_text_aimv2_packing.Aimv2PackingImageTextModel",
    ),
}
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
        plain (`bool`, *optional*, defaults to `False`): Whether it carries the plain model alone, without engines.
    """

    image_text: bool
    plain: bool = False

    @property
    def auto_map(self) -> dict[str, str]:
        """The classes that `config.json` names."""
        config, model = MODEL_CLASSES[self.image_text, self.plain]
        classes = {"AutoConfig": config, "AutoModel": model}
        if self.image_text:
            return classes | {"AutoModelForZeroShotImageClassification": model}
        return classes | {"AutoModelForImageClassification": f"{model.removesuffix('Model')}ForImageClassification"}

    @property
    def architectures(self) -> list[str]:
        return [self.auto_map["AutoModel"].rpartition(".")[2]]

    @property
    def image_processor(self) -> dict[str, Any]:
        """`preprocessor_config.json` of the released models at native resolution."""
        return read_json(REPO / "preprocessor_config.json")

    @property
    def sentence_transformers(self) -> dict[str, Any]:
        """`modules.json` and `sentence_bert_config.json`, which a configuration with this `auto_map` writes."""
        return sentence_transformers_files(self.image_text)

    @property
    def code_files(self) -> tuple[Path, ...]:
        """The files of code that such a repo carries: of a plain one those that its classes need, else all."""
        if not self.plain:
            return tuple(CODE_FILES)
        named: list[str] = [*self.auto_map.values(), self.sentence_transformers["modules.json"][0]["type"]]
        named += chain.from_iterable(self.image_processor["auto_map"].values())
        named += PROCESSOR["auto_map"].values() if self.image_text else ()
        return with_imports(*sorted({name.rpartition(".")[0] for name in named}))

    def write_json(self, folder: Path) -> None:
        """Writes `processor_config.json` where there are texts."""
        if self.image_text:
            (folder / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


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
    """The kind of a converted repo; one whose classes are of neither kind is measured against the accelerated one."""
    config = read_json(folder / "config.json")
    plain = RepoKind(image_text=config["model_type"] == CONVERTED_TYPES[1], plain=True)
    return plain if config.get("auto_map") == plain.auto_map else replace(plain, plain=False)
