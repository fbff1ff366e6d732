# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The example that finds pictures by words, as a user runs it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import REPO, reference_model
from sentence_transformers import SentenceTransformer

from corpus.settings import weights_of


PHOTOGRAPHS = REPO / "examples" / "photographs"
QUERIES = ["a cat", "a rocket on its launch pad"]


def search(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "examples" / "search_by_words.py"), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    torch.manual_seed(0)
    return save_image_text_repo(tmp_path_factory.mktemp("image-text") / "repo", reference_image_text_model())


@pytest.fixture(scope="module")
def expected(repo) -> str:
    """The hits as printed, by Sentence Transformers."""
    encoder = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    similarity = encoder.similarity(encoder.encode(QUERIES), encoder.encode([str(path) for path in paths]))
    lines = []
    for query, scores in zip(QUERIES, similarity, strict=True):
        hits = scores.argsort(descending=True).tolist()[:3]
        lines += [query, *(f"  {scores[index]:.4f}  {paths[index]}" for index in hits)]
    return "\n".join(lines)


def projected(repo: Path, features: Path, pooling: str = "projection") -> Path:
    """What `extract_features.py` leaves, with one image that could not be read."""
    encoder = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    names = sorted(path.name for path in PHOTOGRAPHS.glob("*.jpg"))
    vectors = encoder.encode([str(PHOTOGRAPHS / name) for name in names]).tolist()
    kind = pa.list_(pa.float32(), len(vectors[0]))
    table = pa.table({"id": ["broken.jpg", *names], "embedding": pa.array([None, *vectors], kind)})
    features.mkdir()
    pq.write_table(table, features / "rows.parquet")
    (features / "_settings.json").write_text(json.dumps({"pooling": pooling}))
    return features


def test_pictures_are_found_and_shown(repo, expected, tmp_path):
    result = search(tmp_path, "--checkpoint", repo, "--top", 3, *QUERIES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{expected}\nContact sheet: hits.png"
    with PIL.Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 3 * 160 and sheet.height > 2 * 160
        assert len(sheet.getcolors(sheet.width * sheet.height)) > 1000


def test_every_format_is_searched_and_what_is_broken_is_said(repo, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    PIL.Image.open(PHOTOGRAPHS / "cat.jpg").save(pictures / "cat.tif")
    PIL.Image.open(PHOTOGRAPHS / "cat.jpg").save(pictures / "nameless", format="PNG")
    (pictures / "broken.jpg").write_bytes(b"none")
    result = search(tmp_path, "--checkpoint", repo, "--folder", pictures, "a cat")
    assert result.returncode == 0, result.stderr
    assert {line.split()[1] for line in result.stdout.splitlines()[1:3]} == {
        str(pictures / name) for name in ("cat.tif", "nameless")
    }
    assert f"skipped {pictures / 'broken.jpg'}: " in result.stderr


def test_features_spare_the_pictures_encoding(repo, expected, tmp_path):
    features = projected(repo, tmp_path / "features")
    result = search(tmp_path, "--checkpoint", repo, "--top", 3, "--features", features, *QUERIES)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{expected}\nContact sheet: hits.png"


def test_random_weights_are_said_to_be_random(tmp_path):
    result = search(tmp_path, "--output", "sheet.png", "a cat")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("No --checkpoint: the weights are random, and so are the hits.\n")
    assert (tmp_path / "sheet.png").exists()


def test_what_cannot_be_searched_is_one_line(repo, tmp_path):
    vision = save_vision_repo(tmp_path / "vision", reference_model(use_head=True, is_native=False))
    empty = tmp_path / "empty"
    empty.mkdir()
    features = projected(repo, tmp_path / "features", pooling="mean")
    for arguments, message in (
        (("--checkpoint", vision), "has no text encoder, only a vision tower"),
        (("--checkpoint", repo, "--folder", empty), "holds no image"),
        (("--checkpoint", repo, "--features", features), "only projected features compare with words"),
    ):
        result = search(tmp_path, *arguments, "a cat")
        assert result.returncode == 1
        lines = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
        assert not (tmp_path / "hits.png").exists()


def test_features_are_of_the_checkpoint_and_may_be_in_shards(repo, tmp_path, monkeypatch):
    """Those of another model of the same size would be near to any words."""
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    read_features = importlib.import_module("search_by_words").read_features
    schema = pa.schema({"id": pa.string(), "embedding": pa.list_(pa.float32())})
    for index in range(2):
        shard = tmp_path / f"features/shard={index}-of-2"
        shard.mkdir(parents=True)
        pq.write_table(pa.table({"id": [f"{index}.png"], "embedding": [[3.0, 4.0]]}, schema), shard / "a.parquet")
        (shard / ".settings.json").write_text(json.dumps({"pooling": "projection", "weights": weights_of(str(repo))}))
    paths, vectors = read_features(tmp_path / "features", tmp_path, str(repo))
    assert sorted(paths) == [tmp_path / "0.png", tmp_path / "1.png"] and torch.allclose(
        vectors, torch.tensor([0.6, 0.8])
    )
    (tmp_path / "features/shard=0-of-2/.settings.json").write_text(
        json.dumps({"pooling": "projection", "weights": "a"})
    )
    with pytest.raises(ValueError, match=f"made by other weights than those of --checkpoint {repo}"):
        read_features(tmp_path / "features", tmp_path, str(repo))
