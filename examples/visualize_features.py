# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A picture of what the encoder sees: each image as the model was given it, beside the principal components of its patch
features as colours, and beside the cosine similarity of every patch to one of them, which is marked.

    python examples/visualize_features.py [--checkpoint CHECKPOINT] [--patch X Y] [--output FILE.png] [IMAGE ...]
"""

import argparse
from pathlib import Path

from loading import PHOTOGRAPHS, load, run, save_picture  # first: it says what is not installed


# isort: split
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch


# Pixels; a panel fits in this box.
PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LINE = 320, 180, 8, 18
HEADINGS = ("what the model was given", "principal components", "similarity to the marked patch")


def pictures_of_patches(processor, hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> list[np.ndarray]:
    """The images that these patches are, uint8 RGB `(height, width, 3)` each: resizing and cropping shows."""
    side = processor.patch_size
    pictures = []
    for patches in processor.unpack_features(hidden_states, grid_thw):
        if processor.patch_layout == "channels_last":
            pixels = patches[0].unflatten(-1, (side, side, 3))
        else:
            pixels = patches[0].unflatten(-1, (3, side, side)).permute(0, 1, 3, 4, 2)
        pixels = pixels.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        if processor.do_normalize:
            pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
        pictures.append((pixels * 255).round().clamp(0, 255).byte().numpy())
    return pictures


def principal_colours(maps: list[torch.Tensor]) -> list[np.ndarray]:
    """The first three principal components over all patches of all images, as uint8 RGB `(h, w, 3)` per image."""
    features = torch.cat([features.flatten(0, 2) for features in maps]).double()
    features = features - features.mean(dim=0)
    _, directions = torch.linalg.eigh(features.T @ features)
    components = features @ directions[:, -3:].flip(1)
    low, high = (torch.from_numpy(np.quantile(components.numpy(), share, axis=0)) for share in (0.01, 0.99))
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).byte()
    parts = colours.split([features[..., 0].numel() for features in maps])
    return [part.view(*features.shape[1:3], 3).numpy() for part, features in zip(parts, maps, strict=True)]


def similarity_to(features: torch.Tensor, row: int, column: int) -> np.ndarray:
    """Cosine similarity of each patch to that one, from the least (black) to 1 (white), uint8 `(h, w)`."""
    unit = torch.nn.functional.normalize(features[0].float(), dim=-1)
    similarity = unit @ unit[row, column]
    low = similarity.min()
    return ((similarity - low) / (1 - low).clamp(min=1e-6) * 255).round().clamp(0, 255).byte().numpy()


def panels_of(picture: np.ndarray, colours: np.ndarray, similarity: np.ndarray, row: int, column: int) -> list:
    """The three panels of one image in the same size, with the patch marked in the first and the last."""
    height, width = similarity.shape
    scale = min(PANEL_WIDTH / width, PANEL_HEIGHT / height)
    # A strip stays visible.
    size = (max(4, round(width * scale)), max(4, round(height * scale)))
    panels = [PIL.Image.fromarray(picture).resize(size, PIL.Image.Resampling.LANCZOS)]
    for values in (colours, similarity):
        panels.append(PIL.Image.fromarray(values).convert("RGB").resize(size, PIL.Image.Resampling.NEAREST))
    cell_width, cell_height = size[0] / width, size[1] / height
    left, top = column * cell_width, row * cell_height
    box = (left, top, max(left + 2, left + cell_width - 1), max(top + 2, top + cell_height - 1))
    for panel in (panels[0], panels[2]):
        PIL.ImageDraw.Draw(panel).rectangle(box, outline="red", width=2)
    return panels


def sheet_of(rows: list[tuple[str, list]], footer: str) -> PIL.Image.Image:
    """One row of panels per image under its name, in three columns with headings."""
    column_width = max(PANEL_WIDTH // 2, *(panels[0].width for _, panels in rows)) + MARGIN
    heights = [LINE + panels[0].height + MARGIN for _, panels in rows]
    sheet = PIL.Image.new("RGB", (3 * column_width + MARGIN, sum(heights) + 3 * LINE + 2 * MARGIN), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)

    def write(text: str, left: int, top: int, width: int, colour: str) -> None:
        """Long texts lose their beginning: the end of a path is its name."""
        if draw.textlength(text, font) > width:
            while draw.textlength("..." + text, font) > width:
                text = text[1:]
            text = "..." + text
        draw.text((left, top), text, colour, font)

    for column, heading in enumerate(HEADINGS):
        write(heading, MARGIN + column * column_width, MARGIN, column_width - MARGIN, "black")
    top = LINE + MARGIN
    for (name, panels), height in zip(rows, heights, strict=True):
        write(name, MARGIN, top, sheet.width - 2 * MARGIN, "dimgray")
        for column, panel in enumerate(panels):
            sheet.paste(panel, (MARGIN + column * column_width, top + LINE))
        top += height
    left, width = MARGIN + 2 * column_width, column_width - MARGIN
    write("least", left, top, width, "dimgray")
    write("1", left + width - LINE // 2, top, LINE, "dimgray")
    # From black to white, as the similarities.
    shades = PIL.Image.linear_gradient("L").transpose(PIL.Image.Transpose.ROTATE_90)
    sheet.paste(shades.resize((width - 4 * LINE, LINE // 2)), (left + 2 * LINE, top + LINE // 4))
    top += LINE
    write(footer, MARGIN, top, sheet.width - 2 * MARGIN, "black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=sorted(map(str, PHOTOGRAPHS.glob("*.jpg"))), metavar="IMAGE")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument(
        "--patch", nargs=2, type=float, default=(0.5, 0.5), metavar=("X", "Y"),
        help="the patch to compare with, from 0 0 (top left) to 1 1 (bottom right); the middle if not given",
    )  # fmt: skip
    parser.add_argument("--output", default="features.png", type=Path, help="default: features.png")
    arguments = parser.parse_args()
    x, y = arguments.patch
    if not (0 <= x <= 1 and 0 <= y <= 1):
        parser.error(f"--patch must be two numbers from 0 to 1, got {x} {y}")
    if arguments.output.suffix.lower() != ".png":
        parser.error(f"--output must end in .png, got {arguments.output}")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output must be in a folder that exists, got {arguments.output}")

    processor, model = load(arguments.checkpoint)
    inputs = processor(arguments.images, return_tensors="pt")
    with torch.no_grad():
        outputs = model(inputs["hidden_states"].to(model.device), inputs["grid_thw"])
    maps = processor.unpack_features(outputs.last_hidden_state.cpu(), inputs["grid_thw"])
    pictures = pictures_of_patches(processor, inputs["hidden_states"], inputs["grid_thw"])

    rows = []
    for path, picture, features, colours in zip(arguments.images, pictures, maps, principal_colours(maps), strict=True):
        height, width = features.shape[1:3]
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        panels = panels_of(picture, colours, similarity_to(features, row, column), row, column)
        rows.append((f"{Path(path).name}: {height} x {width} patches", panels))
    weights = arguments.checkpoint or "Random weights: the colours and likenesses show no understanding of the images."
    sheet = sheet_of(rows, weights)
    save_picture(sheet, arguments.output)
    print(f"{arguments.output}: {len(rows)} images, {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    run(main)
