# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Manifests as people write them: what they hold is taken as it is, or refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES

from corpus import tables
from corpus.inputs import corpus_of
from corpus.readers import read
from corpus.rows import Image
from corpus.settings import Job, Settings
from corpus.tables import add_rows


def images_of(file: Path, keep: tuple[str, ...] = (), id_column: str | None = None) -> list[Image]:
    inputs = (str(file),)
    corpus = corpus_of(inputs, "nowhere", ("PNG",))
    schema = add_rows(corpus, inputs, "image", id_column, keep)
    settings = Settings("", {}, {}, "float32", "mean", None, "image", id_column)
    job = Job("", None, inputs, None, None, 1, ("PNG",), 10**6, 1, settings, schema if keep else None)
    return list(read(corpus.parts, "parquet", job, ()))


def test_what_looks_like_a_time_stays_text(tmp_path: Path) -> None:
    """Arrow takes it for one: its id would end in 00:00:00."""
    (tmp_path / "0.png").write_bytes(IMAGES["0.png"])
    file = tmp_path / "a.jsonl"
    days = ["2024-01-01", "2024-01-02"]
    file.write_text(
        "".join(
            f'{{"image": "0.png", "day": "{day}", "all": {{"days": ["{day}"], "at": "{day}T10:00:00Z"}}}}\n'
            for day in days
        )
    )
    images = images_of(file, keep=("day", "all"), id_column="day")
    assert [image.id for image in images] == days
    assert [image.kept for image in images] == [
        {"day": day, "all": {"days": [day], "at": f"{day}T10:00:00Z"}} for day in days
    ]
    assert all(image.data == IMAGES["0.png"] for image in images)


def test_texts_of_many_lines_in_a_long_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what is read at once, whose end may be within a text."""
    monkeypatch.setattr(tables, "BYTES_OF_BLOCK", 2**20)
    file = tmp_path / "a.csv"
    text = "a,\nb\n" * 100
    file.write_text("image,caption\n" + f'0.png,"{text}"\n' * 5000)
    images = images_of(file, keep=("caption",))
    assert len(images) == 5000 and all(image.kept == {"caption": text} for image in images)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_line_of_megabytes(tmp_path: Path, name: str) -> None:
    """As of a list of boxes, or of a long text."""
    (tmp_path / "0.png").write_bytes(IMAGES["0.png"])
    text = "x" * 3_000_000
    lines = {"a.csv": f"image,caption\n0.png,{text}\n0.png,b\n"}
    lines["a.jsonl"] = f'{{"image": "0.png", "caption": "{text}"}}\n{{"image": "0.png", "caption": "b"}}\n'
    (tmp_path / name).write_text(lines[name])
    assert [image.data for image in images_of(tmp_path / name)] == [IMAGES["0.png"]] * 2


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,image,key,key\n0.png,1.png,a,b\n")
    (tmp_path / "b.csv").write_text("image,key,key\n0.png,a,b\n")
    pq.write_table(pa.Table.from_arrays([pa.array([b""])] * 2, names=["image"] * 2), tmp_path / "c.parquet")
    for name in ("a.csv", "c.parquet"):
        with pytest.raises(ValueError, match=rf"{name} must have one column 'image', got \['image', 'image'"):
            images_of(tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.csv must have one column 'key', got"):
        images_of(tmp_path / "b.csv", keep=("key",))
    assert len(images_of(tmp_path / "b.csv")) == 1


def test_ids_of_more_digits_than_numbers_keep_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"image": "0.png", "key": 12345678901234567890}\n')
    with pytest.raises(ValueError, match=r"`--id-column` 'key' .* whole numbers below 2\*\*63, got double in a.jsonl"):
        images_of(file, id_column="key")
    file.write_text('{"image": "0.png", "key": 9007199254740993}\n')
    assert [image.id for image in images_of(file, id_column="key")] == ["9007199254740993"]
