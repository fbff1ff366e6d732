# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Features of every image of a folder and its subfolders, in one .safetensors file: a plain loop to copy. One process, one
device; extract_features.py does the same for a corpus.

    python examples/folder_features.py FOLDER --output FILE.safetensors [--checkpoint CHECKPOINT] [--pooled]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from loading import PHOTOGRAPHS, load, run  # first: it says what is not installed


# isort: split
import PIL.Image
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from conversion.local_code import local_class
from conversion.messages import printable, printable_lines, say


image_formats = local_class("image_processing_aimv2_packing.image_formats")


def image_files(folder: Path) -> list[str]:
    """
    The image files of a folder and its subfolders, in order: what is an image, whatever its name, or is named as one.

    Raises:
        NotADirectoryError: `folder` is none.
        FileNotFoundError: it holds no image.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"No such folder: {folder}")
    paths = [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and is_image(path)]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no image of the formats {', '.join(image_formats())}")
    return paths


def is_image(path: Path) -> bool:
    if PIL.Image.registered_extensions().get(path.suffix.lower()) in image_formats():
        return True
    try:
        # Reads the header alone.
        with PIL.Image.open(path, formats=image_formats()):
            return True
    # Decoders raise anything on what only begins like an image.
    except Exception:
        return False


def skip(path: str, error: Exception) -> None:
    say(f"skipped {printable(path)}: {printable_lines(str(error))}", file=sys.stderr)


class ImageFiles(Dataset):
    """Patches of image files, each processed by itself; `None` for a file that cannot be read."""

    def __init__(self, paths: list[str], processor):
        self.processor = processor
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        for path in paths:
            try:
                # Reads the header alone.
                with PIL.Image.open(path, formats=image_formats()) as image:
                    height, width = image.height, image.width
                processor.get_number_of_image_patches(height, width)
            except Exception as error:
                skip(path, error)
                continue
            self.paths.append(path)
            self.sizes.append((height, width))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        try:
            return self.paths[index], self.processor(self.paths[index], return_tensors="pt")
        except (OSError, ValueError) as error:
            skip(self.paths[index], error)
            return None


def collate(examples: list) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Packs: the patches of all images lie end to end."""
    readable = [example for example in examples if example is not None]
    if not readable:
        return [], torch.empty(0, 0), torch.empty(0, 3)
    paths, inputs = zip(*readable, strict=True)
    hidden_states, grid_thw = (torch.cat([one[name] for one in inputs]) for name in ("hidden_states", "grid_thw"))
    return list(paths), hidden_states, grid_thw


def packed_batches(
    paths: list[str], processor, max_patches_per_batch: int = 8192, num_workers: int = 0
) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """The paths of the images of each batch that can be read, their patches, and `grid_thw`."""
    dataset = ImageFiles(paths, processor)
    sampler = processor.batch_sampler(dataset.sizes, max_patches_per_batch)
    for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers):
        if batch[0]:
            yield batch


def encode_files(
    paths: list[str], processor, model, max_patches_per_batch: int = 8192, num_workers: int = 0
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """
    The path of each image that can be read, its features `(1, rows, columns, hidden_size)` and one vector
    `(hidden_size,)`: the head's output where the model has a head, else the mean of the features.
    """
    for names, hidden_states, grid_thw in packed_batches(paths, processor, max_patches_per_batch, num_workers):
        with torch.no_grad():
            # grid_thw stays on the CPU, where the model reads it.
            outputs = model(hidden_states.to(model.device), grid_thw)
        maps = processor.unpack_features(outputs.last_hidden_state.cpu(), grid_thw)
        if outputs.pooler_output is None:
            vectors = [features.mean(dim=(0, 1, 2)) for features in maps]
        else:
            vectors = list(outputs.pooler_output.cpu())
        yield from zip(names, maps, vectors, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=PHOTOGRAPHS, type=Path, metavar="FOLDER")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument("--pooled", action="store_true", help="one vector per image instead of a map")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, got {arguments.output}")
    if not arguments.output.parent.is_dir():
        parser.error(f"no such folder: {arguments.output.parent}")
    paths = image_files(arguments.folder)
    processor, model = load(arguments.checkpoint)

    features = {}
    for path, feature_map, vector in encode_files(paths, processor, model):
        # A copy: a map is a view of its whole batch.
        features[str(Path(path).relative_to(arguments.folder))] = (vector if arguments.pooled else feature_map).clone()
    save_file(features, arguments.output)
    print(f"{arguments.output}: features of {len(features)} images of {len(paths)}")


if __name__ == "__main__":
    run(main)
