# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Throughput of the image processor beside the transformers processor that it builds on, in one process, and how full the
batch sampler's batches are. Times are CPU seconds of one thread, which other programs disturb least. Prints ratios:
above 1.00 this repo is faster.

    python benchmarks/preprocessing.py [--images 4] [--rounds 100]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available


REPO = Path(__file__).resolve().parent.parent


def images_of_many_sizes(count: int) -> list[PIL.Image.Image]:
    """Crops of the example photographs, sides of 300 to 800 pixels, decoded."""
    rng = np.random.default_rng(0)
    photographs = [
        PIL.Image.open(path).convert("RGB") for path in sorted((REPO / "examples/photographs").glob("*.jpg"))
    ]
    sizes = [tuple(rng.integers(300, 800, 2).tolist()) for _ in range(count)]
    return [photographs[index % len(photographs)].resize(size) for index, size in enumerate(sizes)]


def clip_patches(clip, images: list, return_tensors: str) -> torch.Tensor:
    pixels = clip(images, return_tensors=return_tensors)["pixel_values"]
    return pixels.unflatten(3, (-1, 14)).unflatten(2, (-1, 14)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * 14 * 14)


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, list[float]]:
    """Least seconds of both, called in turn, and the ratio of each round, sorted."""
    seconds: tuple[list[float], list[float]] = [], []
    for index in range(rounds + 1):
        # Short rounds in turn meet the same load, and in alternating order the same caches.
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.process_time()
            (ours, theirs)[which]()
            seconds[which].append(time.process_time() - start)
    # The first round warms up.
    ratios = [their / our for our, their in zip(*seconds, strict=True)][1:]
    return min(seconds[0][1:]), min(seconds[1][1:]), sorted(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = images_of_many_sizes(arguments.images)
    photographs = sorted(map(str, (REPO / "examples/photographs").glob("*.jpg")))
    files = [photographs[index % len(photographs)] for index in range(arguments.images)]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")

    relatives = {"pil": (Qwen2VLImageProcessorPil, CLIPImageProcessorPil)}
    if is_torchvision_available():
        relatives["torchvision"] = (transformers.Qwen2VLImageProcessor, transformers.CLIPImageProcessor)
    bounds = {"shortest_edge": 112 * 14 * 14, "longest_edge": 4096 * 14 * 14}
    for backend, (qwen_class, clip_class) in relatives.items():
        processor = AutoProcessor.from_pretrained(str(REPO), trust_remote_code=True, backend=backend)
        qwen, clip = qwen_class(temporal_patch_size=1, merge_size=1, size=bounds), clip_class()
        cases = {
            "native against Qwen2-VL": (images, None, qwen),
            "native from JPEG files against Qwen2-VL": (files, None, qwen),
            "fixed 224 against CLIP and cutting into patches": (images, 224, partial(clip_patches, clip)),
        }
        for name, (sources, side, peer) in cases.items():
            our, their, ratios = compare(
                partial(processor, sources, return_tensors="pt", image_size=side),
                partial(peer, sources, return_tensors="pt"),
                arguments.rounds,
            )
            print(
                f"{backend}, {name}: {len(images) / our:.1f} against {len(images) / their:.1f} images/s, ratio "
                f"{their / our:.3f} of the best of {len(ratios)} rounds, {statistics.median(ratios):.3f} in the median"
            )

    processor = AutoProcessor.from_pretrained(str(REPO), trust_remote_code=True)
    sizes = np.random.default_rng(0).lognormal(6, 0.5, (100_000, 2)).clip(100, 4000).astype(int).tolist()
    lengths = np.array([processor.get_number_of_image_patches(*size) for size in sizes])
    for budget in (8192, 32768):
        for shuffle in (True, False):
            start = time.process_time()
            sampler = processor.batch_sampler(sizes, budget, shuffle=shuffle)
            took = time.process_time() - start
            fill = np.array([lengths[batch].sum() / budget for batch in sampler])
            print(
                f"sampler, budget {budget}, {'shuffled' if shuffle else 'in order'}: {fill.mean():.1%} full on "
                f"average, 99 % of batches above {np.quantile(fill, 0.01):.1%}; {len(sizes)} images in {took:.1f} s"
            )


if __name__ == "__main__":
    main()
