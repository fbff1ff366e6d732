# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images of a folder, ordered by likeness to one of them: cosine similarity of pooled (with a head) or mean features.

    python examples/image_retrieval.py [--checkpoint CHECKPOINT] [--query IMAGE] [FOLDER]
"""

import argparse
from pathlib import Path

import PIL.Image
import torch
from loading import PHOTOGRAPHS, load
from torch.utils.data import DataLoader


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def embed(paths: list[str], processor, model, max_patches_per_batch: int = 8192) -> torch.Tensor:
    """One unit vector per image, `(num_images, hidden_size)`; no batch holds more patches than the budget."""
    sizes = [PIL.Image.open(path).size[::-1] for path in paths]
    sampler = processor.batch_sampler(sizes, max_patches_per_batch)
    vectors = []
    for batch in DataLoader(paths, batch_sampler=sampler, collate_fn=processor.collate):
        with torch.no_grad():
            outputs = model(batch["hidden_states"].to(model.device), batch["grid_thw"])
        if outputs.pooler_output is not None:
            vectors.append(outputs.pooler_output)
        else:
            maps = processor.unpack_features(outputs.last_hidden_state, batch["grid_thw"])
            vectors.append(torch.stack([features.mean(dim=(0, 1, 2)) for features in maps]))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=PHOTOGRAPHS, type=Path, metavar="FOLDER")
    parser.add_argument("--query", help="an image; without it, the first of the folder")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    arguments = parser.parse_args()
    paths = sorted(str(path) for path in arguments.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{arguments.folder} holds no image with one of the suffixes {sorted(SUFFIXES)}")
    processor, model = load(arguments.checkpoint)

    vectors = embed([arguments.query or paths[0], *paths], processor, model)
    similarity = vectors[1:] @ vectors[0]
    for index in similarity.argsort(descending=True, stable=True).tolist():
        print(f"{similarity[index]:.4f}  {paths[index]}")


if __name__ == "__main__":
    main()
