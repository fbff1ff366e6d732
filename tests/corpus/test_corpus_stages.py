# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""From every kind of input to rows, compared with the model run on one image at a time."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import IMAGES, OneByOne, archive_of, copy_of, encoded_image, extract, write_images
from safetensors.torch import load_file, save_file

from corpus.rows import IdSet, stable_text
from corpus.stages import Batch, Encoder


def assert_is_mean(row: dict, encode: OneByOne, data: bytes) -> None:
    grid, output = encode(data)
    assert row["error"] is None and row["grid_thw"] == grid
    torch.testing.assert_close(torch.tensor(row["embedding"]), output.last_hidden_state.mean(0), rtol=0, atol=1e-5)


def test_archives_give_their_images_and_broken_ones_an_error(head_repo: Path, tmp_path: Path) -> None:
    members = [*IMAGES.items(), ("0.txt", b"caption"), ("0.png", IMAGES["1.png"]), ("bad.jpg", b"no image")]
    members += [("nameless", IMAGES["2.png"])]
    whole = archive_of(members)
    source = write_images(
        tmp_path / "in",
        {
            "part/a.tar": whole,
            "b.tar.gz": gzip.compress(archive_of(members[:1])),
            "c.tar": whole[: whole.index(IMAGES["1.png"]) + 100],
            "d.tar": b"no archive" * 100,
        },
    )
    rows = extract(head_repo, source, tmp_path / "out", pooling="mean")
    expected = {f"part/a.tar/{name}": data for name, data in IMAGES.items()}
    expected |= {
        "part/a.tar/0.png#2": IMAGES["1.png"],
        "part/a.tar/nameless": IMAGES["2.png"],
        "b.tar.gz/0.png": IMAGES["0.png"],
        "c.tar/0.png": IMAGES["0.png"],
    }
    encode = OneByOne(head_repo)
    for name, data in expected.items():
        assert_is_mean(rows.pop(name), encode, data)
    assert "holds no image" in rows.pop("part/a.tar/bad.jpg")["error"]
    assert "unexpected end of data" in rows.pop("c.tar/1.png")["error"]
    assert "ReadError" in rows.pop("d.tar")["error"]
    assert set(rows) <= {"c.tar"}


@pytest.mark.parametrize("with_paths", [False, True])
def test_parquet_rows_are_images(head_repo: Path, tmp_path: Path, with_paths: bool) -> None:
    values = [*IMAGES.values(), b"no image", None]
    column = [{"bytes": value, "path": None} for value in values] if with_paths else values
    keys = list(range(100, 100 + len(values)))
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"image": column, "key": keys}), source / "a.parquet", row_group_size=3)

    encode = OneByOne(head_repo)
    for id_column, ids in ((None, [f"a.parquet#{row}" for row in range(len(values))]), ("key", list(map(str, keys)))):
        rows = extract(head_repo, source, tmp_path / f"out-{id_column}", pooling="mean", id_column=id_column)
        assert set(rows) == set(ids)
        for id_, data in zip(ids, IMAGES.values(), strict=False):
            assert_is_mean(rows[id_], encode, data)
        assert "holds no image" in rows[ids[5]]["error"] and "NoneType" in rows[ids[6]]["error"]


def test_parquet_without_the_columns_is_refused(head_repo: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"picture": [b""] * 3, "same": [1, 2, 1], "missing": [1, 2, None]}), source / "a.parquet")
    with pytest.raises(ValueError, match="must have a column 'image', got"):
        extract(head_repo, source, tmp_path / "out")
    for column, message in (("same", "must hold a different value in each row"), ("missing", "a value in each row")):
        with pytest.raises(ValueError, match=message):
            extract(head_repo, source, tmp_path / "out", image_column="picture", id_column=column)
    (source / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet of `--input` cannot be read"):
        extract(head_repo, source, tmp_path / "out", image_column="picture")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_patch_features_are_those_of_the_model(head_repo: Path, tmp_path: Path, dtype: str) -> None:
    rows = extract(head_repo, write_images(tmp_path / "in"), tmp_path / "out", patch_features=dtype)
    encode = OneByOne(head_repo)
    for name, data in IMAGES.items():
        stored = torch.frombuffer(bytearray(rows[name]["patch_features"]), dtype=getattr(torch, dtype))
        grid, output = encode(data)
        assert rows[name]["grid_thw"] == grid
        actual = stored.view(-1, output.last_hidden_state.shape[1]).float()
        precision = torch.finfo(getattr(torch, dtype)).eps
        torch.testing.assert_close(actual, output.last_hidden_state, rtol=precision, atol=1e-5)


def test_features_do_not_depend_on_the_packing(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    alone = extract(head_repo, source, tmp_path / "alone", patches_per_batch=200, max_patches=200)
    together = extract(head_repo, source, tmp_path / "together", patches_per_batch=10**6, max_patches=200)
    assert alone.keys() == together.keys() == IMAGES.keys()
    for name, row in alone.items():
        np.testing.assert_allclose(row["embedding"], together[name]["embedding"], rtol=0, atol=1e-5)


def test_bfloat16_model_sees_what_its_processor_gives(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"0.png": IMAGES["0.png"]})
    rows = extract(head_repo, source, tmp_path / "out", dtype="bfloat16", patch_features="bfloat16")
    stored = torch.frombuffer(bytearray(rows["0.png"]["patch_features"]), dtype=torch.bfloat16)
    _, output = OneByOne(head_repo, torch.bfloat16)(IMAGES["0.png"])
    torch.testing.assert_close(stored.view_as(output.last_hidden_state), output.last_hidden_state, rtol=0, atol=0)


def test_max_patches_and_image_size(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    small = extract(head_repo, source, tmp_path / "small", max_patches=50)
    assert max(np.prod(row["grid_thw"]) for row in small.values()) <= 50
    square = extract(head_repo, source, tmp_path / "square", image_size=56)
    assert {tuple(row["grid_thw"]) for row in square.values()} == {(1, 4, 4)}
    with pytest.raises(ValueError, match="no meaning where every image is resized to 56 pixels"):
        extract(head_repo, source, tmp_path / "both", image_size=56, max_patches=50)
    with pytest.raises(ValueError, match="must be None or a positive multiple of `patch_size"):
        extract(head_repo, source, tmp_path / "odd", image_size=57)


def test_errors_are_texts_that_group(head_repo: Path, tmp_path: Path) -> None:
    cut = {f"cut{seed}.png": encoded_image(60 + seed, 90, seed)[: 900 + seed] for seed in range(3)}
    junk = {f"junk{seed}.jpg": bytes([seed]) * (50 + seed) for seed in range(3)}
    strips = {f"strip{seed}.png": encoded_image(1, 300 + seed) for seed in range(3)}
    rows = extract(head_repo, write_images(tmp_path / "in", cut | junk | strips | IMAGES), tmp_path / "out")
    assert sum(row["error"] is None for row in rows.values()) == len(IMAGES)
    for group in (cut, junk, strips):
        assert len({rows[name]["error"] for name in group}) == 1
    assert stable_text(FileNotFoundError(2, "No such file", "/a/b.jpg")) == "FileNotFoundError: No such file"
    assert stable_text(ValueError("got <x.Y object at 0x7f1b2c> of 3 x 4")) == "ValueError: got of N x N"
    assert stable_text(KeyError()) == "KeyError"


def test_id_sets_are_exact() -> None:
    done = IdSet(str(number) for number in range(0, 20000, 2))
    assert len(done) == 10000 and not done.has_duplicates()
    assert all((str(number) in done) == (number % 2 == 0) for number in range(20000))
    assert "0" not in IdSet()
    assert IdSet(["a", "b", "a"]).has_duplicates()


@pytest.mark.parametrize("setting", ["dtype", "patch_features"])
@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_features_that_are_not_finite_are_errors(
    head_repo: Path, tmp_path: Path, setting: str, pooling: str, capsys
) -> None:
    """A last norm that float16 does not hold, so that bfloat16 is what helps; of one image of two for patches."""
    repo = copy_of(head_repo, tmp_path / "model")
    weights = load_file(repo / "model.safetensors")
    weights["rms_norm.weight"] = weights["rms_norm.weight"] * 6e4
    save_file(weights, repo / "model.safetensors", {"format": "pt"})
    source = write_images(tmp_path / "in", {**IMAGES, "bad.png": b"no image"})
    for value in ("float16", "bfloat16"):
        options = {setting: value, "pooling": pooling}
        rows = extract(repo, source, tmp_path / value, **options)
        printed = capsys.readouterr().out
        assert rows.keys() == {*IMAGES, "bad.png"}
        failed = {id_ for id_, row in rows.items() if row["error"]}
        if value == "bfloat16":
            assert failed == {"bad.png"}
            continue
        assert failed == rows.keys()
        for row in [rows[id_] for id_ in IMAGES]:
            assert row["error"].startswith("ValueError: the features are not finite in float16")
            assert row["embedding"] is None and row["grid_thw"] is None and row.get("patch_features") is None
        assert (
            f"5  ValueError: the features are not finite in float16: give --{setting.replace('_', '-')} bf" in printed
        )


def test_one_image_that_is_not_finite_leaves_the_others(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    source = write_images(tmp_path / "in")
    expected = extract(head_repo, source, tmp_path / "before", patch_features="float16")
    encode = Encoder.encode

    def spoiled(self: Encoder, batch: Batch):
        encoded = encode(self, batch)
        first, second = (batch.ids.index(name) for name in ("1.png", "3.png"))
        with torch.inference_mode():
            encoded.are_finite[first] = False
            encoded.patches_are_finite[batch.grids.prod(1).cumsum(0)[second] - 1] = False
        return encoded

    monkeypatch.setattr(Encoder, "encode", spoiled)
    rows = extract(head_repo, source, tmp_path / "out", patch_features="float16")
    assert {id_ for id_, row in rows.items() if row["error"]} == {"1.png", "3.png"}
    assert all(rows[id_] == expected[id_] for id_ in ("0.png", "2.png", "4.png"))


def test_embeddings_are_lists_that_old_readers_take(head_repo: Path, tmp_path: Path) -> None:
    """pyarrow before 26 reads no null among lists of a fixed size. An output that has such lists keeps them."""
    source, output = write_images(tmp_path / "in", {**IMAGES, "bad.png": b"no image"}), tmp_path / "out"
    extract(head_repo, source, output, limit=3)
    file = next(output.glob("*.parquet"))
    table = pq.read_table(file)
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    size = len(table["embedding"][0].as_py() or table["embedding"][1].as_py())
    fixed = pa.list_(pa.float32(), size)
    table = table.set_column(table.schema.get_field_index("embedding"), "embedding", table["embedding"].cast(fixed))
    pq.write_table(table, file)
    rows = extract(head_repo, source, output, retry_errors=True)
    assert len(rows) == 6 and len(list(output.glob("*.parquet"))) == 2
    assert {pq.read_schema(file).field("embedding").type for file in output.glob("*.parquet")} == {
        pa.list_(pa.field("element", pa.float32()), size)
    }


def test_float16_embeddings_are_those_of_float32(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    exact = extract(head_repo, source, tmp_path / "exact")
    rows = extract(head_repo, source, tmp_path / "half", embedding_dtype="float16")
    for name, row in exact.items():
        expected = np.array(row["embedding"], np.float32).astype(np.float16)
        np.testing.assert_array_equal(np.array(rows[name]["embedding"], np.float16), expected)
    with pytest.raises(ValueError, match="embedding_dtype is 'float32', was 'float16'"):
        extract(head_repo, source, tmp_path / "half")


def test_embeddings_that_float16_does_not_hold(head_repo: Path, tmp_path: Path) -> None:
    repo = copy_of(head_repo, tmp_path / "model")
    weights = load_file(repo / "model.safetensors")
    weights["rms_norm.weight"] = weights["rms_norm.weight"] * 6e5
    save_file(weights, repo / "model.safetensors", {"format": "pt"})
    source = write_images(tmp_path / "in", {"a.png": IMAGES["0.png"]})
    row = extract(repo, source, tmp_path / "out", pooling="mean", embedding_dtype="float16")["a.png"]
    assert row["error"] == (
        "ValueError: the features are not finite in float16: give --embedding-dtype float32 and another output"
    )


def test_files_say_what_made_them(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in", {"bad.png": b"no image"}), tmp_path / "out"
    extract(head_repo, source, output, pooling="mean")
    write_images(source, {**IMAGES, "bad.png": IMAGES["0.png"]})
    extract(head_repo, source, output, pooling="mean", retry_errors=True)
    record = json.loads((output / ".settings.json").read_text())
    for file in output.glob("*.parquet"):
        metadata = {key.decode(): value.decode() for key, value in pq.read_schema(file).metadata.items()}
        assert metadata == {
            "aimv2_packing.model": head_repo.name,
            "aimv2_packing.commit": "",
            "aimv2_packing.weights": record["weights"],
            "aimv2_packing.pooling": "mean",
            "aimv2_packing.dtype": "float32",
            "aimv2_packing.patch_size": str(record["config"]["patch_size"]),
        }
