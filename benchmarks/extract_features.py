# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What Ray costs: `extract_features.py` against a plain loop over the same stages, images and packed batches in one
process, repetitions of both interleaved.

    python benchmarks/extract_features.py                        # AIMv2-L width, 6 layers, on the CPU
    python benchmarks/extract_features.py --layers 24 --dtype bfloat16 --images 4000     # on a GPU

The loop is timed once the model is loaded. Ray is timed from its first finished file to its last, which leaves out its
start (reported apart) and keeps everything that goes on for as long as the corpus lasts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module


REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from extract_features import (  # noqa: E402
    FILES_PER_BLOCK,
    UNFINISHED,
    DoneIds,
    Encoder,
    Preprocessor,
    Settings,
    list_input,
    read,
    write,
)


PATCHES_PER_BATCH = 16384


def make_corpus(folder: Path, count: int) -> None:
    """Parts of the bundled photographs, 150 to 500 pixels a side."""
    generator = np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in sorted((REPO / "examples/photographs").glob("*.jpg"))]
    folder.mkdir()
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        width, height = (int(generator.integers(150, min(500, side))) for side in photograph.size)
        left, top = (
            int(generator.integers(photograph.width - width)),
            int(generator.integers(photograph.height - height)),
        )
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{index:06}.jpg", quality=90)


def make_model(folder: Path, layers: int) -> None:
    model_class = get_class_from_dynamic_module("modeling_aimv2_packing.Aimv2PackingModel", str(REPO))
    model_class(model_class.config_class(is_native=True, num_hidden_layers=layers, use_head=False)).save_pretrained(
        folder
    )
    (folder / "preprocessor_config.json").write_bytes((REPO / "preprocessor_config.json").read_bytes())


def plain_loop(settings: Settings, output: Path) -> tuple[int, float]:
    """Patches, and seconds of reading, preprocessing, encoding and writing in turn."""
    kind, files = list_input(settings.input)
    preprocess, encode = Preprocessor(settings), Encoder(settings, PATCHES_PER_BATCH, os.cpu_count() or 1)
    (output / UNFINISHED).mkdir(parents=True)
    patches, start = 0, time.perf_counter()
    for first in range(0, len(files), FILES_PER_BLOCK):
        part = files[first : first + FILES_PER_BLOCK]
        table = pa.table({"path": [os.fsencode(path) for path, _ in part], "name": [name for _, name in part]})
        for images in read(table, kind, settings, DoneIds([])):
            rows = [features for block in preprocess(images) for features in encode(block)]
            patches += write(pa.concat_tables(rows), str(output))["patches"][0].as_py()
    return patches, time.perf_counter() - start


def on_ray(settings: Settings, output: Path, workers: int, rows_per_file: int) -> tuple[float, float]:
    """Patches per second between the first and the last finished file, and seconds before the first."""
    arguments = [
        "--model",
        settings.model,
        "--input",
        settings.input,
        "--output",
        str(output),
        "--dtype",
        settings.dtype,
    ]
    arguments += ["--num-workers", str(workers), "--rows-per-file", str(rows_per_file)]
    start = time.time()
    subprocess.run([sys.executable, str(REPO / "extract_features.py"), *arguments], check=True, capture_output=True)
    files = sorted(output.glob("*.parquet"), key=lambda file: file.stat().st_mtime)
    patches = [sum(int(np.prod(grid)) for grid in pq.read_table(file)["grid_thw"].to_pylist()) for file in files]
    first, last = files[0].stat().st_mtime, files[-1].stat().st_mtime
    return sum(patches[1:]) / (last - first), first - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of Ray Data over a plain loop.")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model, corpus = Path(folder, "model"), Path(folder, "corpus")
        make_model(model, arguments.layers)
        make_corpus(corpus, arguments.images)
        settings = Settings(
            model=str(model),
            input=str(corpus),
            image_column="image",
            id_column=None,
            pooling="mean",
            dtype=arguments.dtype,
            patch_features=None,
        )
        os.chdir(REPO)
        # As many as Ray gets at once, so that a file is finished when its images are encoded, not before.
        rows_per_file = max(1, min(FILES_PER_BLOCK, arguments.images // (4 * arguments.workers)))
        runs = []
        for repetition in range(arguments.repetitions):
            patches, seconds = plain_loop(settings, Path(folder, f"plain{repetition}"))
            rate, startup = on_ray(settings, Path(folder, f"ray{repetition}"), arguments.workers, rows_per_file)
            runs.append(
                {"plain": patches / seconds, "ray": rate, "ratio": rate * seconds / patches, "startup": startup}
            )
            print(
                f"plain {patches / seconds:.0f} patches/s, Ray {rate:.0f} patches/s, ratio {runs[-1]['ratio']:.3f}; "
                f"{startup:.0f} s until Ray's first file"
            )
    ratio = statistics.median(run["ratio"] for run in runs)
    print(f"{arguments.images} images, {patches} patches, {os.cpu_count()} CPUs: median ratio {ratio:.3f}")
    if arguments.output:
        figures = {"arguments": vars(arguments) | {"output": None}, "torch": torch.__version__, "runs": runs}
        arguments.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
