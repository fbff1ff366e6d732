# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The command through killed runs, killed workers and Ctrl-C, on both engines, against one image at a time.

`AIMV2_PACKING_IMAGES=2000 AIMV2_PACKING_KILLS=10` makes the corpus larger and kills more runs, at random moments.
That takes longer than a test may: `--timeout 0`.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from corpora import OneByOne, command, rows_of, start
from PIL import Image
from reference import REPO


IMAGES = int(os.environ.get("AIMV2_PACKING_IMAGES", "200"))
KILLS = int(os.environ.get("AIMV2_PACKING_KILLS", "1"))


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


# However late it is seen, a run has work left after its first file: it encodes no more, or, where other processes
# encode, it publishes no more.
ENCODES_NO_MORE = """
import time
from corpus.sink import Sink
from corpus.stages import Encoder

publish, encode, published = Sink.publish, Encoder.encode, []
Sink.publish = lambda self, *arguments: published.append(publish(self, *arguments))
Encoder.encode = lambda self, batch: time.sleep(600) if published else encode(self, batch)
"""
PUBLISHES_NO_MORE = """
import time
from corpus.sink import Sink

publish = Sink.publish
Sink.publish = lambda self, *arguments: (publish(self, *arguments), time.sleep(600))
"""


def wait_for_a_file(output: Path, run: subprocess.Popen) -> None:
    before, end = len(list(output.glob("*.parquet"))), time.monotonic() + 300
    while len(list(output.glob("*.parquet"))) == before:
        if run.poll() is not None or time.monotonic() > end:
            run.kill()
            pytest.fail(f"it published nothing: {run.communicate(timeout=60)[0]}")
        time.sleep(0.01)


def encoders(run: subprocess.Popen) -> list[psutil.Process]:
    """The actors of a run that hold the model."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapBatches(EncodeStage)" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def killed_in_process(head_repo: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was killed, one that was interrupted, and a last one."""
    output = tmp_path_factory.mktemp("output")
    arguments = command(head_repo, corpus, output, "--rows-per-file", 16, "--patches-per-batch", 4096)
    moments = random.Random(0)
    for kill in range(KILLS):
        run = start(*arguments, setup="" if kill else ENCODES_NO_MORE)
        wait_for_a_file(output, run)
        time.sleep(moments.uniform(0, 2) if kill else 0)
        run.kill()
        run.wait()
    assert 0 < len(rows_of(output)) < IMAGES

    run = start(*arguments, setup=ENCODES_NO_MORE)
    wait_for_a_file(output, run)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 130 and "Traceback" not in printed
    assert printed.endswith("What is encoded is written. Run the same command again to resume.\n"), printed
    assert 16 < len(rows_of(output)) < IMAGES

    printed, _ = (run := start(*arguments)).communicate(timeout=600)
    assert run.returncode == 0 and "Traceback" not in printed, printed
    return output


@pytest.fixture(scope="module")
def killed_on_ray(head_repo: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of runs that were killed, and of one that lost a worker, from a folder that is not the code's."""
    pytest.importorskip("ray", reason="needs requirements-scale.txt")
    output, elsewhere = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("elsewhere")
    options = ("--num-workers", 2, "--rows-per-file", 16, "--patches-per-batch", 4096)
    arguments = command(head_repo, corpus, output, *options)
    moments = random.Random(0)
    for kill in range(KILLS):
        run = start(*arguments, cwd=elsewhere, setup="" if kill else PUBLISHES_NO_MORE)
        if kill:
            time.sleep(moments.uniform(0, 60))
        else:
            wait_for_a_file(output, run)
            assert run.poll() is None
        run.kill()
        run.wait()

    run, struck = start(*arguments, cwd=elsewhere), 0
    while run.poll() is None and struck < KILLS:
        for process in encoders(run)[:1]:
            process.kill()
            struck += 1
            time.sleep(moments.uniform(0, 20) if KILLS > 1 else 0)
        time.sleep(0.05)
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 0, printed
    assert struck
    return output


@pytest.fixture(params=["killed_in_process", "killed_on_ray"])
def killed(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_after_kills_each_image_has_one_row_and_its_features(killed: Path, corpus: Path, head_repo: Path) -> None:
    rows = rows_of(killed)
    assert sorted(rows) == sorted(str(file.relative_to(corpus)) for file in corpus.rglob("*") if file.is_file())
    assert {file.name for file in killed.iterdir() if file.suffix != ".parquet"} == {
        ".settings.json",
        ".inputs",
        ".lock",
    }
    encode = OneByOne(head_repo)
    for name, row in rows.items():
        assert (row["error"] is not None) == is_corrupt(name) == (row["embedding"] is None) == (row["grid_thw"] is None)
        if not is_corrupt(name):
            grid, output = encode((corpus / name).read_bytes())
            assert row["grid_thw"] == grid
            torch.testing.assert_close(torch.tensor(row["embedding"]), output.pooler_output[0], rtol=0, atol=1e-5)
