# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The example that searches an output, against a sort in plain Python."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import IMAGES, extract, write_images
from image_text_checkpoints import reference_image_text_model, save_image_text_repo
from reference import REPO
from safetensors.torch import load_file, save_file
from scaling import make_model_repo
from sentence_transformers import SentenceTransformer


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


def test_names_forge_no_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": ["a.png", "b\n1.0000  c.png"], "embedding": vectors}), tmp_path / "a.parquet")
    run(monkeypatch, tmp_path, "--query", "a.png")
    assert capsys.readouterr().out.splitlines() == ["1.0000  a.png", r"0.0000  'b\n1.0000  c.png'"]


def test_a_query_without_a_vector_is_refused(rows, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for query in ("bad.png", "none.png"):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, rows[0], "--query", query)
        assert f"{query} is no id of" in capsys.readouterr().err


def test_what_is_no_output_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "other", "texts"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other/a.parquet")
    (tmp_path / "texts/a.txt").write_text("a")
    for name in ("empty", "other", "texts"):
        with pytest.raises(SystemExit, match=f"error: {tmp_path / name} is no output of extract_features.py"):
            run(monkeypatch, tmp_path / name, "--query", "a")


def found(capsys: pytest.CaptureFixture) -> list[tuple[str, float]]:
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return [(id_, float(value)) for value, id_ in lines]


@pytest.mark.parametrize("missing", [None, "faiss"])
def test_a_picture_finds_itself(rows, tmp_path: Path, missing: str | None, monkeypatch, capsys) -> None:
    """With FAISS and with NumPy, by the settings of the output, which are not those of the model's folder."""
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    else:
        pytest.importorskip("faiss")
    output, _ = rows
    picture = write_images(tmp_path, {"x.png": IMAGES["3.png"]}) / "x.png"
    run(monkeypatch, output, "--query", "3.png", "--count", 100)
    expected = found(capsys)
    run(monkeypatch, output, "--query-image", picture, "--count", 100)
    actual = found(capsys)
    assert actual[0] == ("3.png", 1.0) and [id_ for id_, _ in actual] == [id_ for id_, _ in expected]
    assert [value for _, value in actual] == pytest.approx([value for _, value in expected], abs=2e-4)


def test_a_picture_finds_itself_in_shards(head_repo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    for index in range(2):
        extract(head_repo, source, output, num_shards=2, shard_index=index, pooling="mean")
    capsys.readouterr()
    run(monkeypatch, output, "--query", "3.png", "--count", 100)
    expected = found(capsys)
    assert len(expected) == len(IMAGES)
    run(monkeypatch, output, "--query-image", source / "3.png", "--count", 100)
    actual = found(capsys)
    assert [id_ for id_, _ in actual] == [id_ for id_, _ in expected] and actual[0] == ("3.png", 1.0)
    assert [value for _, value in actual] == pytest.approx([value for _, value in expected], abs=2e-4)


def test_words_find_pictures(tmp_path: Path, monkeypatch, capsys) -> None:
    """Against the image-text model's own pooled features."""
    torch.manual_seed(0)
    repo = save_image_text_repo(tmp_path / "repo", reference_image_text_model())
    output = tmp_path / "out"
    by_id = extract(repo, write_images(tmp_path / "in"), output)
    encoder = SentenceTransformer(str(repo), trust_remote_code=True, device="cpu")
    words = encoder.encode("a cat", normalize_embeddings=True)
    expected = {}
    for id_, row in by_id.items():
        vector = np.array(row["embedding"])
        expected[id_] = float(words @ vector / np.linalg.norm(vector))
    capsys.readouterr()
    run(monkeypatch, output, "--query-text", "a cat")
    actual = found(capsys)
    assert [id_ for id_, _ in actual] == sorted(expected, key=expected.__getitem__, reverse=True)
    assert all(value == pytest.approx(expected[id_], abs=2e-4) for id_, value in actual)


def test_words_and_other_weights_are_refused(rows, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match="--query-text needs projected features, got those of --pooling head"):
        run(monkeypatch, rows[0], "--query-text", "a cat")
    other = make_model_repo(tmp_path / "other", use_head=True)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "rms_norm.weight": weights["rms_norm.weight"] * 2}, other / "model.safetensors")
    with pytest.raises(SystemExit, match="was made by other weights"):
        run(monkeypatch, rows[0], "--query-text", "a cat", "--model", other)
