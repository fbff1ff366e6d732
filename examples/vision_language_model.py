# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder as the vision tower of a LLaVA-style model: tower, projector, language model. The tower is frozen, the rest
learns captions with gradient checkpointing, is saved, loaded again, and captions the images. The language model is a
tiny Qwen2 with random weights whose tokens are bytes; nothing is downloaded.

    python examples/vision_language_model.py [--checkpoint CHECKPOINT] [--output FOLDER] [--steps N]
"""

import argparse
import os
from pathlib import Path
from typing import Any

from loading import PHOTOGRAPHS, REPO, load, run  # first: it says what is not installed


# isort: split
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config


OUTPUT = Path(REPO, "build", "vision-language-model")
# The bytes 0 to 255 come first.
IMAGE_TOKEN, END_TOKEN, PAD_TOKEN, VOCABULARY = 256, 257, 258, 259
CAPTIONS = {"astronaut": "an astronaut", "cat": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket"}


class VisionLanguageConfig(PreTrainedConfig):
    model_type = "aimv2_packing_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    vision_config: Any = None
    text_config: Any = None

    def __post_init__(self, **kwargs):
        # As they come from a file.
        for name in self.sub_configs:
            config = getattr(self, name)
            if isinstance(config, dict):
                setattr(self, name, AutoConfig.for_model(**config))
        super().__post_init__(**kwargs)


class VisionLanguageModel(PreTrainedModel):
    """Each image token of the text is replaced by one projected patch, in the order of the packed sequence."""

    config_class = VisionLanguageConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisionLanguageConfig):
        super().__init__(config)
        self.vision = AutoModel.from_config(config.vision_config)
        self.language = AutoModelForCausalLM.from_config(config.text_config)
        width = config.text_config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.post_init()

    def embed(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """`(texts, length, text hidden_size)`: the embeddings of the text, with the patches in their places."""
        patches = self.projector(self.vision(hidden_states, grid_thw).last_hidden_state)
        embeddings = self.language.get_input_embeddings()(input_ids)
        return embeddings.masked_scatter((input_ids == IMAGE_TOKEN)[..., None], patches.to(embeddings.dtype))

    def forward(self, hidden_states, grid_thw, input_ids, attention_mask, labels=None):
        embeddings = self.embed(hidden_states, grid_thw, input_ids)
        # No cache: it would keep what gradient checkpointing throws away.
        return self.language(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, use_cache=False)

    @torch.no_grad()
    def generate(self, hidden_states, grid_thw, input_ids, attention_mask, **kwargs) -> torch.Tensor:
        """The new tokens alone; `kwargs` are those of [`~transformers.GenerationMixin.generate`]."""
        embeddings = self.embed(hidden_states, grid_thw, input_ids)
        return self.language.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)


def batch_of_text(captions: list[str], num_patches: list[int]) -> dict[str, torch.Tensor]:
    """Image tokens, then the caption, padded on the left as `generate` wants it; only the caption is learned."""
    rows = [
        [IMAGE_TOKEN] * length + ([*text.encode(), END_TOKEN] if text else [])
        for text, length in zip(captions, num_patches, strict=True)
    ]
    input_ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_TOKEN, padding_side="left"
    )
    is_learned = (input_ids != PAD_TOKEN) & (input_ids != IMAGE_TOKEN)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD_TOKEN).long(),
        "labels": input_ids.masked_fill(~is_learned, -100),
    }


def captions_of(model: VisionLanguageModel, inputs: dict[str, torch.Tensor], num_patches: list[int]) -> list[str]:
    prompt = batch_of_text([""] * len(num_patches), num_patches)
    tokens = model.generate(
        inputs["hidden_states"],
        inputs["grid_thw"],
        prompt["input_ids"].to(model.device),
        prompt["attention_mask"].to(model.device),
        max_new_tokens=24,
        do_sample=False,
    )
    return [bytes(token for token in row if token < 256).decode(errors="replace") for row in tokens.tolist()]


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
    parser.add_argument("--steps", type=int, default=80, help="default: %(default)s")
    arguments = parser.parse_args()
    check_output(arguments.output)
    processor, vision = load(arguments.checkpoint)
    # So that from_config and from_pretrained know the tower, whose classes came with the checkpoint.
    AutoConfig.register("aimv2_packing", type(vision.config), exist_ok=True)
    AutoModel.register(type(vision.config), type(vision), exist_ok=True)

    torch.manual_seed(0)
    language = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=PAD_TOKEN, bos_token_id=None, eos_token_id=END_TOKEN,
    )  # fmt: skip
    model = VisionLanguageModel(VisionLanguageConfig(vision_config=vision.config, text_config=language))
    model.vision.load_state_dict(vision.state_dict())
    # Trained in float32, whatever the checkpoint is stored in.
    model = model.to(vision.device, torch.float32)

    images = [str(PHOTOGRAPHS / f"{name}.jpg") for name in CAPTIONS]
    # A fixed-resolution checkpoint has its own number of patches.
    inputs = processor(images, return_tensors="pt", max_patches=144).to(model.device)
    num_patches = inputs["grid_thw"].prod(dim=1).tolist()
    batch = {**inputs, **batch_of_text(list(CAPTIONS.values()), num_patches)}
    batch = {name: value.to(model.device) for name, value in batch.items()}

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

    model = VisionLanguageModel.from_pretrained(arguments.output, use_safetensors=True).to(vision.device).eval()
    for name, caption in zip(CAPTIONS, captions_of(model, inputs, num_patches), strict=True):
        print(f"{name}.jpg: {caption}")
    print(f"{arguments.output}: the model, its projector and its processor")


if __name__ == "__main__":
    run(main)
