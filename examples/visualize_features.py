# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A picture of what the encoder sees: each photograph beside the principal components of its patch features as colours,
and beside the cosine similarity of every patch to one of them, which is marked.

    python examples/visualize_features.py [--checkpoint CHECKPOINT] [--patch X Y] [--output FILE.png] [IMAGE ...]
"""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import torch
from loading import PHOTOGRAPHS, load


PANEL_HEIGHT, MARGIN, LINE = 150, 6, 18


def principal_colours(maps: list[torch.Tensor]) -> list[np.ndarray]:
    """The first three principal components over all patches of all images, as uint8 RGB `(h, w, 3)` per image."""
    features = torch.cat([features.flatten(0, 2) for features in maps]).float()
    features = features - features.mean(dim=0)
    _, _, directions = torch.linalg.svd(features, full_matrices=False)
    components = features @ directions[:3].T
    low, high = components.quantile(torch.tensor([0.01, 0.99]), dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1).mul(255).byte()
    parts = colours.split([features[..., 0].numel() for features in maps])
    return [part.view(*features.shape[1:3], 3).numpy() for part, features in zip(parts, maps, strict=True)]


def similarity_to(features: torch.Tensor, row: int, column: int) -> np.ndarray:
    """Cosine similarity of each patch to that one, from the least (black) to 1 (white), uint8 `(h, w)`."""
    unit = torch.nn.functional.normalize(features[0].float(), dim=-1)
    similarity = unit @ unit[row, column]
    low = similarity.min()
    return ((similarity - low) / (1 - low).clamp(min=1e-6) * 255).round().clamp(0, 255).byte().numpy()


def panel(values: np.ndarray, size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(values).convert("RGB").resize(size, PIL.Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=sorted(map(str, PHOTOGRAPHS.glob("*.jpg"))), metavar="IMAGE")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument(
        "--patch", nargs=2, type=float, default=(0.5, 0.5), metavar=("X", "Y"),
        help="the patch to compare with, from 0 0 (top left) to 1 1 (bottom right); the middle if not given",
    )  # fmt: skip
    parser.add_argument("--output", default="features.png", help="default: features.png")
    arguments = parser.parse_args()
    x, y = arguments.patch
    if not (0 <= x <= 1 and 0 <= y <= 1):
        parser.error(f"--patch must be two numbers from 0 to 1, got {x} {y}")
    if Path(arguments.output).suffix.lower() != ".png":
        parser.error(f"--output must end in .png, got {arguments.output}")

    processor, model = load(arguments.checkpoint)
    inputs = processor(arguments.images, return_tensors="pt")
    with torch.no_grad():
        outputs = model(inputs["hidden_states"].to(model.device), inputs["grid_thw"])
    maps = processor.unpack_features(outputs.last_hidden_state.cpu(), inputs["grid_thw"])

    rows = []
    for path, features, colours in zip(arguments.images, maps, principal_colours(maps), strict=True):
        height, width = features.shape[1:3]
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        size = (round(PANEL_HEIGHT * width / height), PANEL_HEIGHT)
        photograph = PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB").resize(size)
        panels = [photograph, panel(colours, size), panel(similarity_to(features, row, column), size)]
        cell = (size[0] / width, size[1] / height)
        box = (column * cell[0], row * cell[1], (column + 1) * cell[0], (row + 1) * cell[1])
        for image in (photograph, panels[2]):
            PIL.ImageDraw.Draw(image).rectangle(box, outline="red", width=2)
        rows.append(panels)

    weights = arguments.checkpoint or "RANDOM WEIGHTS: the colours and likenesses show no understanding of the images"
    widest = max(3 * panels[0].width for panels in rows) + 4 * MARGIN
    sheet = PIL.Image.new("RGB", (widest, len(rows) * (PANEL_HEIGHT + MARGIN) + 2 * LINE + 2 * MARGIN), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN), "photograph | principal components | similarity to the marked patch", "black", font)
    for index, panels in enumerate(rows):
        for place, image in enumerate(panels):
            left = MARGIN + place * (image.width + MARGIN)
            sheet.paste(image, (left, LINE + MARGIN + index * (PANEL_HEIGHT + MARGIN)))
    draw.text((MARGIN, sheet.height - LINE), weights, "black", font)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {len(rows)} images, {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    main()
