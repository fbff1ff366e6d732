# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images of a folder and its subfolders, ordered by likeness to one image: cosine similarity of pooled (with a head) or
mean features.

    python examples/image_retrieval.py [--checkpoint CHECKPOINT] [--query IMAGE] [FOLDER]
"""

import argparse
from pathlib import Path

from loading import PHOTOGRAPHS, load, run  # first: it says what is not installed


# isort: split
import torch
from folder_features import encode_files, image_files

from conversion.messages import printable, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=PHOTOGRAPHS, type=Path, metavar="FOLDER")
    parser.add_argument("--query", help="an image; without it, the first of the folder")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    arguments = parser.parse_args()
    paths = image_files(arguments.folder)
    processor, model = load(arguments.checkpoint)

    if arguments.query:
        # A file of the folder that cannot be read is skipped; a query is an error.
        processor(arguments.query)
    encoded = list(encode_files([arguments.query, *paths] if arguments.query else paths, processor, model))
    if not encoded:
        raise ValueError(f"No image of {arguments.folder} can be read.")
    names = [name for name, _, _ in encoded]
    vectors = torch.nn.functional.normalize(torch.stack([vector for _, _, vector in encoded]), dim=1)
    similarity = vectors @ vectors[0]
    for index in similarity.argsort(descending=True, stable=True).tolist():
        if index or not arguments.query:
            say(f"{similarity[index]:.4f}  {printable(names[index])}")


if __name__ == "__main__":
    run(main)
