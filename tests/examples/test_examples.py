# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user runs it."""

import runpy
import subprocess
import sys

import PIL.Image
import pytest
from reference import REPO


def run(name: str, *arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_feature_extraction(tmp_path):
    result = run("feature_extraction", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "cat.jpg: map (1, 21, 32, 256), mean (256,)" in result.stdout


def test_vision_language_model_learns_from_one_step(tmp_path):
    result = run("vision_language_model", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _, before, _, _, _, after, *_ = result.stdout.split()
    assert float(after) < float(before)


def test_image_retrieval_finds_the_query_first(tmp_path):
    query = str(REPO / "examples" / "photographs" / "rocket.jpg")
    result = run("image_retrieval", "--query", query, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and lines[0] == f"1.0000  {query}"
    (tmp_path / "empty").mkdir()
    result = run("image_retrieval", "empty", cwd=tmp_path)
    assert result.returncode == 2 and "holds no image" in result.stderr


def test_visualize_features(tmp_path):
    result = run("visualize_features", "--patch", "0.1", "1", "--output", "picture.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with PIL.Image.open(tmp_path / "picture.png") as picture:
        assert picture.height > 600 and len(picture.getcolors(picture.width * picture.height)) > 1000
    committed = REPO / "examples" / "features.png"
    assert committed.stat().st_size < 400_000
    with PIL.Image.open(committed) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("arguments", [("--patch", "2", "0"), ("--output", "picture.jpg")])
def test_visualize_features_refuses(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    monkeypatch.setattr(sys, "argv", ["visualize_features.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPO / "examples" / "visualize_features.py"), run_name="__main__")
    assert arguments[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
