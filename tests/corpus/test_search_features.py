# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The example that searches an output, against a sort in plain Python."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import IMAGES, extract, write_images
from reference import REPO


@pytest.fixture(scope="module")
def rows(head_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Several files, an error among the rows, and one that was done later than its name says."""
    folder = tmp_path_factory.mktemp("search")
    source, output = write_images(folder / "in", {**IMAGES, "bad.png": b"no image"}), folder / "out"
    options = {"rows_per_file": 2, "patches_per_batch": 128, "max_patches": 128}
    extract(head_repo, source, output, **options)
    write_images(source, {"00.png": IMAGES["1.png"]})
    return output, extract(head_repo, source, output, **options)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["search_features.py", *map(str, arguments)])
    # As Python itself does for a script.
    monkeypatch.syspath_prepend(REPO / "examples")
    runpy.run_path(str(REPO / "examples/search_features.py"), run_name="__main__")


def test_neighbours_are_in_order(rows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    output, by_id = rows
    query = np.array(by_id["1.png"]["embedding"])
    expected = {}
    for id_, row in by_id.items():
        if row["error"] is None:
            vector = np.array(row["embedding"])
            expected[id_] = float(query @ vector / np.linalg.norm(query) / np.linalg.norm(vector))
    run(monkeypatch, output, "--query", "1.png", "--count", 100)
    found = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert {id_ for _, id_ in found[:2]} == {"1.png", "00.png"} and len(found) == len(IMAGES) + 1
    values = [float(value) for value, _ in found]
    assert values == sorted(values, reverse=True)
    for value, id_ in found:
        assert float(value) == pytest.approx(expected[id_], abs=1e-4)


def test_a_query_without_a_vector_is_refused(rows, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for query in ("bad.png", "none.png"):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, rows[0], "--query", query)
        assert f"{query} is no id of" in capsys.readouterr().err
