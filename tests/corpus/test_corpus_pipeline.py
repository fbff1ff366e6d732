# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Between the processes: buffers that workers fill, copies to and from a device, and the thread that writes."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from corpora import IMAGES, extract, rows_of, write_images
from reference import REPO

from corpus import in_process, ring
from corpus.inputs import Part, corpus_of
from corpus.output import Output
from corpus.readers import read
from corpus.stages import Encoder


MANY = {f"{copy:02}/{name}": data for copy in range(12) for name, data in {**IMAGES, "bad.png": b"no image"}.items()}
BATCHES = {"patches_per_batch": 256, "max_patches": 256}


@pytest.mark.parametrize("buffers", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_give_what_one_process_gives(
    head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int, dtype: str
) -> None:
    source = write_images(tmp_path / "in", MANY)
    expected = extract(head_repo, source, tmp_path / "alone", dtype=dtype, **BATCHES)
    monkeypatch.setattr(in_process, "decoders", lambda device: 2)
    monkeypatch.setattr(ring, "BUFFERS", buffers)
    rows = extract(head_repo, source, tmp_path / "out", dtype=dtype, **BATCHES)
    assert rows.keys() == expected.keys() == MANY.keys()
    for id_, row in rows.items():
        assert row["error"] == expected[id_]["error"] and row["grid_thw"] == expected[id_]["grid_thw"]
        if row["error"] is None:
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            np.testing.assert_allclose(row["embedding"], expected[id_]["embedding"], rtol=0, atol=tolerance)


def test_a_buffer_is_filled_again_only_when_it_was_read(
    head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that looks at its batches as late as it may, while workers have time to overwrite them."""
    source = write_images(tmp_path / "in", MANY)
    expected = extract(head_repo, source, tmp_path / "alone", **BATCHES)
    encode = Encoder.encode
    waiting: list = []

    def init(self: Encoder, *arguments) -> None:
        original(self, *arguments)
        self.batches_at_once = 2

    def late(self: Encoder, batch, encoded, done):
        waiting.append(len(batch.ids))
        time.sleep(0.02)
        row = encode(self, batch)
        table = self.table_of(batch, row)
        batch.release()
        return table

    original = Encoder.__init__
    monkeypatch.setattr(Encoder, "__init__", init)
    monkeypatch.setattr(Encoder, "finish", late)
    # Fewer than what is on its way.
    monkeypatch.setattr(ring, "BUFFERS", 3)
    monkeypatch.setattr(in_process, "decoders", lambda device: 2)
    rows = extract(head_repo, source, tmp_path / "out", **BATCHES)
    assert rows.keys() == MANY.keys() and len(waiting) > 20
    for id_, row in rows.items():
        if row["error"] is None:
            np.testing.assert_allclose(row["embedding"], expected[id_]["embedding"], rtol=0, atol=1e-5)


SCRIPT = """
import sys, time
from corpus import in_process
from corpus.options import Options
from corpus.run import run
from corpus.stages import Encoder

in_process.decoders = lambda device: 2
encode, batches = Encoder.encode, []


def stalling(self, batch):
    batches.append(batch)
    print("batch", flush=True)
    if len(batches) == 4:
        time.sleep(600)
    return encode(self, batch)


Encoder.encode = stalling
model, source, output = sys.argv[1:]
run(Options(model, [source], output, patches_per_batch=256, max_patches=256))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_command(head_repo: Path, tmp_path: Path, end: signal.Signals) -> None:
    """More are decoded than buffers take, so that all workers wait when the command goes."""
    source = write_images(tmp_path / "in", MANY)
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, head_repo, source, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(4):
        assert run.stdout is not None and run.stdout.readline() == "batch\n"
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    for process in (run.pid, *(worker.pid for worker in workers)):
        maps = Path(f"/proc/{process}/maps").read_text().splitlines()
        opened = [os.path.realpath(link) for link in Path(f"/proc/{process}/fd").iterdir()]
        # What has no name is gone with the last process that holds it, however that ends.
        assert not [name for name in maps + opened if "/dev/shm/" in name and not name.endswith(" (deleted)")]
    run.send_signal(end)
    run.wait(timeout=120)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive
    if end == signal.SIGINT:
        assert 0 < len(rows_of(tmp_path / "out")) < len(MANY)


def test_workers_have_no_copies_of_the_names(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, notes, count = write_images(tmp_path / "in"), tmp_path / "notes", 400_000
    notes.mkdir()

    def with_many_more(*arguments):
        corpus = corpus_of(*arguments)
        names = (f"{'x' * 80}{number}.png" for number in range(count))
        corpus.parts += [Part(0, f"/nowhere/{name}", name) for name in names]
        return corpus

    def noting(parts, *arguments):
        before = psutil.Process().memory_full_info().uss
        real = [part for part in parts if not part.path.startswith("/nowhere")]
        gc.collect()
        (notes / f"{os.getpid()}").write_text(str(psutil.Process().memory_full_info().uss - before))
        return read(real, *arguments)

    monkeypatch.setattr("corpus.run.corpus_of", with_many_more)
    monkeypatch.setattr(in_process, "read", noting)
    monkeypatch.setattr(in_process, "decoders", lambda device: 2)
    assert extract(head_repo, source, tmp_path / "out").keys() == IMAGES.keys()
    bytes_of_each = [int(note.read_text()) / count for note in notes.iterdir()]
    assert len(bytes_of_each) == 2 and max(bytes_of_each) < 80


def test_a_thread_writes_and_the_command_publishes(
    head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "in", MANY)
    threads: dict[str, set[int]] = {"write_rows": set(), "publish": set()}

    def noted(name: str, method: Callable) -> Callable:
        def noting(self: Output, *arguments):
            threads[name].add(threading.get_ident())
            return method(self, *arguments)

        return noting

    for name in threads:
        monkeypatch.setattr(Output, name, noted(name, getattr(Output, name)))
    rows = extract(head_repo, source, tmp_path / "out", rows_per_file=5, **BATCHES)
    assert rows.keys() == MANY.keys()
    assert threads["publish"] == {threading.get_ident()} and len(threads["write_rows"]) == 1
    assert threads["write_rows"] != threads["publish"]


def test_what_was_encoded_while_a_write_failed_is_written(
    head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = write_images(tmp_path / "in", MANY), []

    def failing(self: Output, table):
        calls.append(len(table))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write_rows(self, table)

    write_rows = Output.write_rows
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_rows", failing)
        with pytest.raises(OSError, match="No space left"):
            extract(head_repo, source, tmp_path / "out", rows_per_file=5, **BATCHES)
    assert len(rows_of(tmp_path / "out")) == sum(calls) - calls[1]
    assert extract(head_repo, source, tmp_path / "out", **BATCHES).keys() == MANY.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("patch_features", [None, "bfloat16"])
def test_a_gpu_gives_what_the_cpu_gives(head_repo: Path, tmp_path: Path, patch_features: str | None) -> None:
    source = write_images(tmp_path / "in", MANY)
    options = {"patch_features": patch_features, **BATCHES}
    expected = extract(head_repo, source, tmp_path / "cpu", device="cpu", **options)
    rows = extract(head_repo, source, tmp_path / "gpu", device="cuda", **options)
    assert rows.keys() == expected.keys() == MANY.keys()
    for id_, row in rows.items():
        assert row["error"] == expected[id_]["error"] and row["grid_thw"] == expected[id_]["grid_thw"]
        if row["error"] is None:
            np.testing.assert_allclose(row["embedding"], expected[id_]["embedding"], rtol=0, atol=1e-4)
            if patch_features:
                values, other = (
                    torch.frombuffer(bytearray(found[id_]["patch_features"]), dtype=torch.bfloat16).float()
                    for found in (rows, expected)
                )
                torch.testing.assert_close(values, other, rtol=2e-2, atol=2e-2)
