# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`extract_features.py` of an image-text repo: vectors in the joint space, which the example searches by words."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.dataset
import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import REPO, reference_model
from sentence_transformers import SentenceTransformer


PHOTOGRAPHS = REPO / "examples" / "photographs"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def extract(repo: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess:
    return run("extract_features.py", "--model", repo, "--input", PHOTOGRAPHS, "--output", output, *arguments)


def embeddings(output: Path) -> dict[str, list[float]]:
    table = pyarrow.dataset.dataset(output, format="parquet").to_table(["id", "embedding"])
    return dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    torch.manual_seed(0)
    return save_image_text_repo(tmp_path_factory.mktemp("image-text") / "repo", reference_image_text_model())


def test_projection_is_the_default_of_an_image_text_model_and_is_searched(repo, tmp_path):
    result = extract(repo, tmp_path / "features", "--patch-features", "float16")
    assert result.returncode == 0, result.stderr
    encoder = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    found = embeddings(tmp_path / "features")
    assert sorted(found) == sorted(path.name for path in PHOTOGRAPHS.glob("*.jpg"))
    for name, vector in found.items():
        np.testing.assert_allclose(vector, encoder.encode(str(PHOTOGRAPHS / name)), atol=1e-5)

    hits = ("examples/search_by_words.py", "a cat", "--checkpoint", repo, "--output", tmp_path / "hits.png")
    searched, encoded = run(*hits, "--features", tmp_path / "features"), run(*hits)
    assert searched.returncode == 0, searched.stderr
    assert searched.stdout == encoded.stdout
    with PIL.Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.format == "PNG"


def test_head_of_an_image_text_model(repo, tmp_path):
    result = extract(repo, tmp_path / "features", "--pooling", "head")
    assert result.returncode == 0, result.stderr
    encoder = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    encoder[0].model.visual_projection = torch.nn.Identity()
    for name, vector in embeddings(tmp_path / "features").items():
        np.testing.assert_allclose(vector, encoder.encode(str(PHOTOGRAPHS / name)), atol=1e-5)


def test_projection_of_a_vision_tower_is_refused(tmp_path):
    vision = save_vision_repo(tmp_path / "vision", reference_model())
    result = extract(vision, tmp_path / "features", "--pooling", "projection")
    assert result.returncode == 1
    assert "`--pooling projection` needs an image-text model" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "features").exists()
