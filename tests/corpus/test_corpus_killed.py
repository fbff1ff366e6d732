"""
`extract_features.py` against the model run on one image at a time, through killed workers and killed runs.

`AIMV2_PACKING_IMAGES=2000 AIMV2_PACKING_KILLS=10` makes the corpus larger and kills more runs, at random moments.
"""

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("ray", reason="needs requirements-scale.txt")

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from reference import REPO
from scaling import make_model_repo
from transformers import AutoModel, AutoProcessor


sys.path.append(str(REPO))


IMAGES = int(os.environ.get("AIMV2_PACKING_IMAGES", "200"))
KILLS = int(os.environ.get("AIMV2_PACKING_KILLS", "1"))


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make_model_repo(tmp_path_factory.mktemp("models") / "tiny", use_head=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of photographs and generated images in several formats, modes and folders; each hundredth is corrupt."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    photographs = [Image.open(file).convert("RGB") for file in sorted((REPO / "examples/photographs").glob("*.jpg"))]
    for index in range(IMAGES):
        height, width = (int(side) for side in generator.integers(20, 300, 2))
        if index % 3:
            photograph = photographs[index % len(photographs)]
            left, top = (int(generator.integers(side - 20)) for side in photograph.size)
            image = photograph.crop(
                (left, top, min(left + width, photograph.width), min(top + height, photograph.height))
            )
        else:
            image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = image.convert(("RGB", "L", "RGB", "RGBA")[index % 4])
        file = folder / f"{index % 7}" / f"{index:05}.{'png' if image.mode == 'RGBA' else ('jpg', 'webp')[index % 2]}"
        file.parent.mkdir(exist_ok=True)
        image.save(file)
        if index % 100 == 50:
            # Not an image, an empty file, one cut short.
            data = file.read_bytes()
            file.write_bytes((b"not an image", b"", data[: len(data) // 2])[index // 100 % 3])
    return folder


def is_corrupt(name: str) -> bool:
    return int(Path(name).stem) % 100 == 50


def names(corpus: Path) -> list[str]:
    return sorted(str(file.relative_to(corpus)) for file in corpus.rglob("*") if file.is_file())


class OneByOne:
    """The independent reference: transformers' own loading, one image per forward."""

    def __init__(self, repo: Path, dtype: torch.dtype = torch.float32):
        self.processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=dtype).eval()

    @torch.no_grad()
    def __call__(self, file: Path | io.BytesIO):
        inputs = self.processor(Image.open(file), return_tensors="pt")
        return inputs["grid_thw"][0].tolist(), self.model(**inputs)


def start(repo: Path, source: object, output: Path, *options: object) -> subprocess.Popen:
    arguments = ["--model", repo, "--input", source, "--output", output, *options]
    return subprocess.Popen(
        [sys.executable, str(REPO / "extract_features.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def encoders(run: subprocess.Popen) -> list[psutil.Process]:
    """The actors of a run that hold the model."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapBatches(Encoder)" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for_rows(output: Path, run: subprocess.Popen) -> None:
    before = len(list(output.glob("*.parquet")))
    while len(list(output.glob("*.parquet"))) == before and run.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def killed(repo: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of runs that were killed, and of runs that lost a worker, until there was nothing more to do."""
    output = tmp_path_factory.mktemp("output")
    arguments = (repo, corpus, output, "--num-workers", 2, "--rows-per-file", 16, "--patches-per-batch", 4096)
    moments = random.Random(0)
    unfinished = 0
    for kill in range(KILLS):
        run = start(*arguments)
        if kill == 0:
            wait_for_rows(output, run)
        else:
            time.sleep(moments.uniform(0, 60))
        unfinished += run.poll() is None
        run.kill()
        run.wait()
    assert unfinished

    run, struck = start(*arguments), 0
    while run.poll() is None and struck < KILLS:
        for process in encoders(run)[:1]:
            process.kill()
            struck += 1
            time.sleep(moments.uniform(0, 20))
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 0, printed
    assert struck
    return output


def rows_of(output: Path) -> dict[str, dict]:
    rows = [row for file in output.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def test_after_kills_each_image_has_one_row(killed: Path, corpus: Path) -> None:
    assert sorted(rows_of(killed)) == names(corpus)
    assert {file.name for file in killed.iterdir() if file.suffix != ".parquet"} == {"_settings.json", "_lock"}


def test_corrupt_images_are_rows_with_their_error(killed: Path) -> None:
    for name, row in rows_of(killed).items():
        assert (row["error"] is not None) == is_corrupt(name) == (row["embedding"] is None) == (row["grid_thw"] is None)


def test_features_equal_one_image_at_a_time(killed: Path, corpus: Path, repo: Path) -> None:
    encode = OneByOne(repo)
    for name, row in rows_of(killed).items():
        if not is_corrupt(name):
            grid, output = encode(corpus / name)
            assert row["grid_thw"] == grid
            torch.testing.assert_close(torch.tensor(row["embedding"]), output.pooler_output[0], rtol=0, atol=1e-5)


def test_finished_output_is_left_alone_and_other_settings_are_refused(killed: Path, corpus: Path, repo: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in killed.glob("*.parquet")}
    printed, _ = (run := start(repo, corpus, killed)).communicate(timeout=60)
    assert run.returncode == 0 and f"All {IMAGES} images were done" in printed
    printed, _ = (run := start(repo, corpus, killed, "--pooling", "mean")).communicate(timeout=60)
    assert run.returncode == 1 and "was begun with pooling='head', got 'mean'" in printed
    assert {file: file.stat().st_mtime_ns for file in killed.glob("*.parquet")} == before
