# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder as the vision tower of a LLaVA-style model: tower, projector, language model. The tower is frozen, the rest
learns captions with gradient checkpointing, is saved, loaded again as any process would, and captions the images. The
language model is a tiny Qwen2 with random weights whose tokens are bytes; nothing is downloaded.

    python examples/vision_language_model.py [--checkpoint CHECKPOINT] [--output FOLDER] [--steps N]
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from loading import PHOTOGRAPHS, REPO, load, run  # first: it says what is not installed


# isort: split
import torch
from transformers import AutoModel, AutoProcessor, ByT5Tokenizer, Qwen2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from extract_features import positive


OUTPUT = Path(REPO, "build", "vision-language-model")
CODE = Path(REPO, "examples", "vision_language", "modeling_vision_language.py")
CAPTIONS = {"astronaut": "an astronaut", "cat": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket"}


def composite_classes() -> list[type]:
    """Configuration, model and processor, which `save_pretrained` writes with their code and the tower's."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (CODE, *Path(REPO).glob("*_aimv2_packing.py")):
            shutil.copyfile(path, Path(folder, path.name))
        names = ("VisionLanguageConfig", "VisionLanguageModel", "VisionLanguageProcessor")
        classes = [get_class_from_dynamic_module(f"{CODE.stem}.{name}", folder) for name in names]
    for each, auto_class in zip(classes, ("AutoConfig", "AutoModel", "AutoProcessor"), strict=True):
        each.register_for_auto_class(auto_class)
    return classes


def check_output(folder: Path) -> None:
    """
    Raises:
        ValueError: the model could not be saved there.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output must be a folder that can be written to, got {folder}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: build/vision-language-model"
    )
    parser.add_argument("--steps", type=positive, default=80, help="default: %(default)s")
    arguments = parser.parse_args()
    check_output(arguments.output)
    image_processor, vision = load(arguments.checkpoint)
    # An image token for every 2 x 2 patches.
    image_processor.merge_size = 2

    # Its tokens are bytes. Padding is on the left, as `generate` wants it.
    tokenizer = ByT5Tokenizer(extra_ids=0, padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config_class, model_class, processor_class = composite_classes()
    processor = processor_class(image_processor, tokenizer)

    torch.manual_seed(0)
    language = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = config_class(
        vision_config=vision.config, text_config=language, image_token_id=processor.image_token_id,
        merge_size=image_processor.merge_size,
    )  # fmt: skip
    model = model_class(config)
    model.vision.load_state_dict(vision.state_dict())
    # Trained in float32, whatever the checkpoint is stored in.
    model = model.to(vision.device, torch.float32)

    images = [str(PHOTOGRAPHS / f"{name}.jpg") for name in CAPTIONS]
    # A fixed-resolution checkpoint has its own number of patches.
    arguments_of_call = {"padding": True, "return_tensors": "pt", "images_kwargs": {"max_patches": 144}}
    texts = [f"<image>{caption}" for caption in CAPTIONS.values()]
    batch = processor(images, texts, **arguments_of_call).to(model.device)
    is_learned = (batch["attention_mask"] == 1) & (batch["input_ids"] != processor.image_token_id)
    batch["labels"] = batch["input_ids"].masked_fill(~is_learned, -100)

    model.train()
    model.vision.eval().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    for step in range(arguments.steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)

    model = AutoModel.from_pretrained(arguments.output, trust_remote_code=True, use_safetensors=True)
    model = model.to(vision.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.output, trust_remote_code=True)
    prompts = processor(images, ["<image>"] * len(images), add_special_tokens=False, **arguments_of_call)
    tokens = model.generate(**prompts.to(model.device), max_new_tokens=24, do_sample=False)
    for name, caption in zip(CAPTIONS, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
        print(f"{name}.jpg: {caption}")
    print(f"{arguments.output}: the model, its processor and their code")


if __name__ == "__main__":
    run(main)
