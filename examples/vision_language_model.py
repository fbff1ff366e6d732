# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder as the vision tower of a small LLaVA-style model: projector, tiny language model, one training step.

    python examples/vision_language_model.py [--checkpoint CHECKPOINT]
"""

import argparse

import torch
from loading import PHOTOGRAPHS, load
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


# Bytes are the vocabulary here; these follow them.
IMAGE_TOKEN, PAD_TOKEN = 256, 257
CAPTIONS = {"astronaut": "an astronaut", "cat": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket"}


class VisionLanguageModel(nn.Module):
    """Each image token of the text is replaced by one projected patch, in the order of the packed sequence."""

    def __init__(self, vision: nn.Module, language: LlamaForCausalLM):
        super().__init__()
        self.vision, self.language = vision, language
        width = language.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(vision.config.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden_states, grid_thw, input_ids, attention_mask, labels):
        patches = self.projector(self.vision(hidden_states, grid_thw).last_hidden_state)
        embeddings = self.language.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter((input_ids == IMAGE_TOKEN)[..., None], patches.to(embeddings.dtype))
        return self.language(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels)


def batch_of_text(captions: list[str], num_patches: list[int]) -> dict[str, torch.Tensor]:
    """Image tokens, then the caption; only the caption is learned."""
    rows = [[IMAGE_TOKEN] * length + list(text.encode()) for text, length in zip(captions, num_patches, strict=True)]
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_TOKEN)
    return {
        "input_ids": padded,
        "attention_mask": (padded != PAD_TOKEN).long(),
        "labels": padded.masked_fill(padded >= IMAGE_TOKEN, -100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    processor, vision = load(parser.parse_args().checkpoint)

    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=PAD_TOKEN, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    model = VisionLanguageModel(vision, language).to(vision.device).train()
    images = [str(PHOTOGRAPHS / f"{name}.jpg") for name in CAPTIONS]
    inputs = processor(images, return_tensors="pt", max_patches=256)
    text = batch_of_text(list(CAPTIONS.values()), inputs["grid_thw"].prod(dim=1).tolist())
    batch = {name: value.to(vision.device) for name, value in {**inputs, **text}.items()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch).loss
    print(f"loss {before.item():.4f} before the step, {after.item():.4f} after it")


if __name__ == "__main__":
    main()
