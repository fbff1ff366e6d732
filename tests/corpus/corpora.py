# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of a corpus share: images, model repos, runs, and the model run on one image at a time."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from reference import REPO
from transformers import AutoModel, AutoProcessor

from corpus.options import Options
from corpus.run import run


def encoded_image(height: int, width: int, seed: int = 0, form: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


IMAGES = {f"{index}.png": encoded_image(30 + 40 * index, 250 - 35 * index, index) for index in range(5)}


def write_images(folder: Path, images: dict[str, bytes] = IMAGES) -> Path:
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def archive_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def copy_of(repo: Path, folder: Path) -> Path:
    return Path(shutil.copytree(repo, folder))


def extract(repo: object, source: object, output: object, **options) -> dict[str, dict]:
    """A run in this process, and the rows of the output after it."""
    sources = source if isinstance(source, list) else [source]
    run(Options(model=str(repo), input=[str(item) for item in sources], output=str(output), **options))
    return rows_of(output)


def rows_of(output: object) -> dict[str, dict]:
    """The rows by their ids, of which none comes twice."""
    fs, path = fsspec.core.url_to_fs(str(output))
    fs.invalidate_cache()
    rows = []
    for file in fs.ls(path, detail=False) if fs.exists(path) else ():
        if file.endswith(".parquet"):
            with fs.open(file, "rb") as opened:
                rows += pq.ParquetFile(opened).read().to_pylist()
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


class OneByOne:
    """The independent reference: transformers' own loading, one image per forward."""

    def __init__(self, repo: Path, dtype: torch.dtype = torch.float32):
        self.processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=dtype).eval()

    @torch.no_grad()
    def __call__(self, data: bytes):
        inputs = self.processor(Image.open(io.BytesIO(data)), return_tensors="pt")
        return inputs["grid_thw"][0].tolist(), self.model(**inputs)


def start(*arguments: object, cwd: Path | None = None, setup: str = "") -> subprocess.Popen:
    """The command as a user runs it, or after the Python code `setup`."""
    script = str(REPO / "extract_features.py")
    code = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{setup}\n"
    code += f"import runpy; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if setup else [script]), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(repo: Path, source: object, output: object, *options: object) -> tuple[object, ...]:
    return ("--model", repo, "--input", source, "--output", output, *options)
