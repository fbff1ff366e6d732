# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The two files that make a model repo a Sentence Transformers model."""

import json
from pathlib import Path

from transformers import PreTrainedConfig


def write_sentence_transformers_files(folder: Path, config: PreTrainedConfig) -> None:
    """
    Writes `modules.json` and `sentence_bert_config.json`. The module that they name is in the code files.

    Args:
        folder (`Path`): The model repo.
        config (`Aimv2PackingConfig` or `Aimv2PackingImageTextConfig`):
            Of its model. An image is what the visual projection gives, or the head, or else the mean over its patches;
            a text is what the text projection gives.
    """
    names = ("image", "text") if config.model_type == "aimv2_packing_image_text" else ("image",)
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
    (folder / "modules.json").write_text(json.dumps([module], indent=2) + "\n")
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings, indent=2) + "\n")
