# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it works: on a terminal of any width, in a log, and of which archive."""

import io
import sys
from pathlib import Path

import pytest
from corpora import IMAGES, archive_of, encoded_image, extract, write_images

from corpus import progress
from corpus.inputs import corpus_of
from corpus.output import Counts
from corpus.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 200])
def test_errors_and_the_time_left_stay_visible(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 20))
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    shown = Progress(1_000_000_000, 0, lambda id_: "archive 3 of 6")
    shown.bar.file = terminal
    for _ in range(3):
        shown.add(Counts(100_000_000, 5_000_000, {"text": (12, ["a"])}, "a"))
        shown.bar.refresh()
    last = terminal.getvalue().split("\r")[-1]
    assert " 30% 300000000/1000000000 images, 36 errors, 00:35 left" in last and len(last.rstrip("\n")) <= columns
    assert ("archive 3 of 6, 1,000,000 patches/s |" in last) == (columns == 200)


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    shown = Progress(1000, 100)
    for second in range(1, 151):
        now = float(second)
        shown.add(Counts(2, 10, {}, "a"))
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        " 22% 220/1,000 images, 0 errors, 06:30 left, 10 patches/s",
        " 34% 340/1,000 images, 0 errors, 05:30 left, 10 patches/s",
        " 40% 400/1,000 images, 0 errors, 05:00 left, 10 patches/s",
    ]


def test_the_number_of_the_archive_is_shown(head_repo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    members = {f"{name}.tar": archive_of(list(IMAGES.items())) for name in "abc"}
    source = write_images(tmp_path / "in", members)
    extract(head_repo, source, tmp_path / "out", patches_per_batch=128, max_patches=128)
    numbers = [int(line.split("archive ")[1].split()[0]) for line in capsys.readouterr().err.splitlines()]
    assert numbers == sorted(numbers) and set(numbers) == {1, 2, 3}
    position = corpus_of((str(source),), "nowhere", ("PNG",)).position()
    assert position is not None and position("b.tar/x/0.png") == "archive 2 of 3"


def test_details_keep_the_numbers_of_errors(head_repo: Path, tmp_path: Path) -> None:
    images = {f"strip{seed}.png": encoded_image(1, 300 + seed) for seed in range(3)}
    rows = extract(head_repo, write_images(tmp_path / "in", {**images, "ok.png": IMAGES["0.png"]}), tmp_path / "out")
    assert rows["ok.png"]["error"] is None and rows["ok.png"]["error_detail"] is None
    assert len({rows[name]["error"] for name in images}) == 1
    assert ["1 x 300 pixels" in rows[name]["error_detail"] for name in images] == [True, False, False]
