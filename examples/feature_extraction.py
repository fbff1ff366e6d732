# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Features of images of any sizes in one packed forward: a map per image, and its mean.

    python examples/feature_extraction.py [--checkpoint CHECKPOINT] [IMAGE ...]
"""

import argparse

from loading import PHOTOGRAPHS, load, run  # first: it says what is not installed


# isort: split
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=sorted(map(str, PHOTOGRAPHS.glob("*.jpg"))), metavar="IMAGE")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    arguments = parser.parse_args()
    processor, model = load(arguments.checkpoint)

    inputs = processor(arguments.images, return_tensors="pt")
    with torch.no_grad():
        # grid_thw stays on the CPU, where the model reads it.
        outputs = model(inputs["hidden_states"].to(model.device), inputs["grid_thw"])
    maps = processor.unpack_features(outputs.last_hidden_state, inputs["grid_thw"])
    for path, features in zip(arguments.images, maps, strict=True):
        mean = features.mean(dim=(0, 1, 2))
        print(f"{path}: map {tuple(features.shape)}, mean {tuple(mean.shape)} of norm {mean.norm():.3f}")
    if outputs.pooler_output is not None:
        print(f"the head's output: {tuple(outputs.pooler_output.shape)}")


if __name__ == "__main__":
    run(main)
