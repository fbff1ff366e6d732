# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The image processor and the model of every example here."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor


REPO = str(Path(__file__).resolve().parent.parent)
PHOTOGRAPHS = Path(REPO) / "examples" / "photographs"
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


def load(checkpoint: str | None):
    """Processor and model of a converted checkpoint; without one, a small model whose random weights say nothing."""
    if checkpoint:
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    else:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(REPO, trust_remote_code=True, **SMALL)
        model = AutoModel.from_config(config, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint or REPO, trust_remote_code=True)
    return processor, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
