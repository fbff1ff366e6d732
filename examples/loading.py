# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the examples share: the image processor and the model, and errors in one line."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path


try:
    import PIL.Image  # noqa: F401
    import safetensors
    import torch
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx
    from transformers import AutoConfig, AutoModel, PreTrainedConfig

    # transformers 5.15 without torchvision exports only a placeholder under the top-level name.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {Path(__file__).resolve().parents[1]}/requirements.txt")


REPO = str(Path(__file__).resolve().parent.parent)
PHOTOGRAPHS = Path(REPO) / "examples" / "photographs"
# The second holds the first as its vision tower.
MODEL_TYPES = ("aimv2_packing", "aimv2_packing_image_text")
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
NEXT_STEPS = {
    errno.EACCES: "- ask for the right to it, or choose another place.",
    errno.EROFS: "- choose another place.",
    errno.ENOSPC: "- free some space, or choose another disk.",
}


def check_converted(checkpoint: str) -> None:
    """
    Reads the configuration alone: of a checkpoint that is not converted no code may run.

    Raises:
        FileNotFoundError: `checkpoint` is no folder and cannot be an id on the Hub, or holds no configuration.
        ValueError: it is not converted.
        OSError: it cannot be read.
    """
    path = Path(checkpoint)
    if not path.is_dir() and (
        path.exists() or path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint)
    ):
        raise FileNotFoundError(
            f"No such folder: {checkpoint}, and it is no id on the Hub either. Make it by: python "
            f"{REPO}/convert_weights.py SOURCE {checkpoint}"
        )
    if not path.is_dir() and try_to_load_from_cache(checkpoint, "config.json") is None:
        try:
            # One short question, because a download asks an unreachable Hub again and again.
            HfApi().model_info(checkpoint, timeout=10)
        except (httpx.TransportError, OfflineModeIsEnabled) as error:
            raise OSError(
                f"{checkpoint} is no folder, and the Hub at {constants.ENDPOINT} cannot be reached ({error}). Check "
                "the connection, or give the folder of a converted checkpoint."
            ) from error
    try:
        config, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise OSError(f"Cannot read the configuration of {checkpoint}: {error}") from error
    if not config:
        raise FileNotFoundError(f"{checkpoint} holds no config.json, so it is no converted checkpoint.")
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{checkpoint} is not converted: its model type is {config.get('model_type')!r}, and none of "
            f"{', '.join(MODEL_TYPES)}. Convert it by: python {REPO}/convert_weights.py {checkpoint} OUTPUT"
        )


def load(checkpoint: str | None):
    """
    Image processor and vision encoder of a converted checkpoint; without one, a small model whose random weights say
    nothing.
    """
    if checkpoint:
        check_converted(checkpoint)
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
        # Of an image-text checkpoint, the vision tower.
        model = getattr(model, "vision_model", model)
    else:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(REPO, trust_remote_code=True, **SMALL)
        model = AutoModel.from_config(config, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(checkpoint or REPO, trust_remote_code=True)
    return processor, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def run(main: Callable[[], None]) -> None:
    """Runs an example. What its user can put right ends it in one line."""
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements-scale.txt")
    except (OSError, ValueError, ImportError, httpx.HTTPError, safetensors.SafetensorError) as error:
        # Safetensors gives the system's reason as text alone.
        steps = [step for code, step in NEXT_STEPS.items() if os.strerror(code) in str(error)]
        sys.exit("error: " + " ".join([*str(error).split(), *steps]))
