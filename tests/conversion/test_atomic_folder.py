# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a folder shows after a power cut: each of its files and folders is on the disk before its name is."""

import os
from pathlib import Path

import pytest

from conversion import atomic_folder
from conversion.atomic_folder import atomic_folder as published_folder


@pytest.mark.parametrize("existing", ["nothing", "an empty folder", "exchanged", "moved away"])
def test_everything_is_on_the_disk_before_it_is_published(existing, tmp_path, monkeypatch):
    target = tmp_path / "target"
    if existing != "nothing":
        target.mkdir()
    if existing in ("exchanged", "moved away"):
        (target / "old").write_text("old")
    if existing == "moved away":
        monkeypatch.setattr(atomic_folder, "exchange", lambda first, second: False)
    forced: dict[bool, set[int]] = {False: set(), True: set()}

    def fsync(descriptor: int, real=os.fsync) -> None:
        real(descriptor)
        forced[(target / "new").exists()].add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with published_folder(target, overwrite=existing in ("exchanged", "moved away")) as folder:
        (folder / "new").write_text("new")
        (folder / "below" / "deeper").mkdir(parents=True)
        (folder / "below" / "deeper" / "file").write_bytes(bytes(100_000))
        (folder / "empty").touch()
    paths = [target, *target.rglob("*")]
    assert {path.relative_to(target) for path in paths[1:]} == set(
        map(Path, ("new", "empty", "below", "below/deeper", "below/deeper/file"))
    )
    assert {path.stat().st_ino for path in paths} <= forced[False]
    assert tmp_path.stat().st_ino in forced[True]


def test_a_disk_that_fails_publishes_nothing(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"), published_folder(tmp_path / "target", overwrite=False) as folder:
        (folder / "new").write_text("new")
    assert list(tmp_path.iterdir()) == []
