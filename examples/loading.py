# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the examples share: the image processor and the model, pictures that are saved, and errors in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


REPO = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPO)
try:
    import PIL.Image
    import safetensors
    import torch
    from huggingface_hub.utils import httpx
    from transformers import AutoConfig, AutoModel

    # transformers 5.15 without torchvision exports only a placeholder under the top-level name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from conversion.hub_files import require_converted
    from conversion.messages import NEXT_STEPS, is_of_store, printable_lines
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements.txt")


PHOTOGRAPHS = Path(REPO) / "examples" / "photographs"
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


def load(checkpoint: str | None):
    """
    Image processor and vision encoder of a converted checkpoint; without one, a small model whose random weights say
    nothing.
    """
    if checkpoint:
        require_converted(checkpoint)
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, use_safetensors=True)
        # Of an image-text checkpoint, the vision tower.
        model = getattr(model, "vision_model", model)
    else:
        print("No --checkpoint: the weights are random, and what follows says nothing of AIMv2.", file=sys.stderr)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(REPO, trust_remote_code=True, **SMALL)
        model = AutoModel.from_config(config, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(checkpoint or REPO, trust_remote_code=True)
    return processor, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save_picture(picture: PIL.Image.Image, file: Path) -> None:
    """Whole or not at all: what was there before is then still there."""
    unfinished = file.with_name(f".{file.name}")
    picture.save(unfinished, optimize=True)
    unfinished.replace(file)


def run(main: Callable[[], None]) -> None:
    """Runs an example. What its user can put right ends it in one line."""
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements-scale.txt")
    except Exception as error:
        for_users = (OSError, ValueError, ImportError, httpx.HTTPError, safetensors.SafetensorError)
        if not isinstance(error, for_users) and not is_of_store(error):
            raise
        # Safetensors gives the system's reason as text alone.
        steps = {f"- {step}." for code, step in NEXT_STEPS.items() if os.strerror(code) in str(error)}
        sys.exit(printable_lines("error: " + " ".join([*str(error).split(), *steps])))
