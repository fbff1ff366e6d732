# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that dies before or after any change to the file system, on a local disk and on an object store."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
from corpora import IMAGES, extract, rows_of, write_images
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from moto.server import ThreadedMotoServer


BEFORE = {"a.png": IMAGES["0.png"], "b.png": b"no image", "c.png": b"no image", "notes.txt": b"notes"}
AFTER = {"b.png": IMAGES["1.png"], "d.png": IMAGES["2.png"], "e.png": b"no image", "more.txt": b"notes"}
IDS = {"a.png", "b.png", "c.png", "d.png", "e.png"}


class KilledError(Exception):
    """What nothing in the code catches; fsspec's own thread passes no `BaseException` on."""


class Killer:
    """Dies at moment number `at`, of those before and after each change; nothing that comes after it happens."""

    def __init__(self, at: int):
        self.at, self.moments = at, 0

    def moment(self) -> None:
        self.moments += 1
        if self.moments > self.at:
            raise KilledError

    def wrap(self, function: Callable, is_change: Callable = lambda *args: True) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if not is_change(*args):
                return function(*args, **kwargs)
            self.moment()
            result = function(*args, **kwargs)
            self.moment()
            return result

        return wrapped

    def wrap_calls(self, function: Callable) -> Callable:
        changes = ("put_", "copy_", "delete_", "create_", "upload_", "complete_")

        @functools.wraps(function)
        async def wrapped(fs, method, *args, **kwargs):
            if not method.startswith(changes):
                return await function(fs, method, *args, **kwargs)
            self.moment()
            result = await function(fs, method, *args, **kwargs)
            self.moment()
            return result

        return wrapped

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(os, "replace", self.wrap(os.replace))
        for name in ("makedirs", "pipe_file", "rm_file", "rmdir", "cp_file"):
            patch.setattr(LocalFileSystem, name, self.wrap(getattr(LocalFileSystem, name)))
        opened = self.wrap(LocalFileOpener._open, is_change=lambda file: "w" in file.mode)
        patch.setattr(LocalFileOpener, "_open", opened)
        patch.setattr(s3fs.S3FileSystem, "_call_s3", self.wrap_calls(s3fs.S3FileSystem._call_s3))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        options = {"endpoint_url": f"http://{host}:{port}", "key": "any", "secret": "any"}
        patch.setitem(fsspec.config.conf, "s3", options)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")


def unfinished(output: str) -> bool:
    fs, path = fsspec.core.url_to_fs(output)
    fs.invalidate_cache()
    return fs.exists(f"{path}/.unfinished")


def test_a_run_that_dies_anywhere_leaves_one_row_per_id(
    head_repo: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New images and error rows that are tried again, so that files appear and are replaced."""
    source = write_images(tmp_path / "in", BEFORE)
    options = {"patches_per_batch": 128, "max_patches": 128, "rows_per_file": 2}
    for at in itertools.count():
        output = f"{place}/{at}"
        for file in source.iterdir():
            file.unlink()
        before = extract(head_repo, write_images(source, BEFORE), output, **options)
        write_images(source, AFTER)
        with monkeypatch.context() as patch:
            Killer(at).install(patch)
            try:
                extract(head_repo, source, output, retry_errors=True, **options)
                break
            except KilledError:
                pass
        rows = rows_of(output)
        assert before.keys() <= rows.keys() <= IDS and rows["a.png"] == before["a.png"]
        rows = extract(head_repo, source, output, retry_errors=True, **options)
        assert rows.keys() == IDS and {id_ for id_ in rows if rows[id_]["error"]} == {"c.png", "e.png"}
        assert not unfinished(output)
    assert at > 10


def test_an_object_store_as_input(head_repo: Path, bucket: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    for name, data in {**IMAGES, "x/nameless": IMAGES["0.png"], "a[1]*.png": IMAGES["1.png"], "t.txt": b"t"}.items():
        fs.pipe_file(f"bucket/in/{name}", data)
    for _ in range(2):
        rows = extract(head_repo, f"{bucket}/in", f"{bucket}/out[1]")
        assert rows.keys() == IMAGES.keys() | {"x/nameless", "a[1]*.png"}
        assert all(row["error"] is None for row in rows.values())
