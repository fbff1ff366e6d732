# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Parquet files of the input: what their columns may hold, whom they are hidden from, what they expand to."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES, extract, write_images

from corpus import tables
from corpus.inputs import Corpus, InputError, corpus_of
from corpus.readers import read
from corpus.rows import Image
from corpus.settings import Job, Settings


PNGS = list(IMAGES.values())


def write_table(file: Path, columns: dict, **options) -> Path:
    """The folder of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, **options)
    return file.parent


def test_paths_are_opened_relative_to_the_table(head_repo: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "in/images")
    write_images(tmp_path / "elsewhere", {"a.png": PNGS[0]})
    os.mkfifo(tmp_path / "in/pipe.png")
    paths = ["images/1.png", str(tmp_path / "elsewhere/a.png"), f"file://{tmp_path}/elsewhere/a.png", "images/gone.png"]
    paths += ["pipe.png", "../elsewhere/a.png"]
    expected = extract(head_repo, tmp_path / "in/images", tmp_path / "expected")
    columns = {
        "text": paths,
        "pair": [{"bytes": None, "path": path} for path in paths],
        "mixed": [{"bytes": PNGS[1], "path": "images/gone.png"}]
        + [{"bytes": None, "path": path} for path in paths[1:]],
        "large": pa.array(paths, pa.large_string()),
        "coded": pa.array(paths).dictionary_encode(),
        "viewed": pa.array(paths, pa.string_view()),
    }
    table = write_table(tmp_path / "in/t.parquet", columns) / "t.parquet"
    for column in columns:
        rows = extract(head_repo, table, tmp_path / column, image_column=column)
        assert rows["t.parquet#0"]["embedding"] == pytest.approx(expected["1.png"]["embedding"], abs=1e-5)
        for row in (1, 2, 5):
            assert rows[f"t.parquet#{row}"]["embedding"] == pytest.approx(expected["0.png"]["embedding"], abs=1e-5)
        assert rows["t.parquet#3"]["error"] == "FileNotFoundError: No such file or directory"
        assert "no regular file" in rows["t.parquet#4"]["error"]


@pytest.mark.parametrize(
    "column",
    [[1, 2], [[1], [2]], [None, None], [{"pixels": b"a"}] * 2, [{"bytes": "text", "path": None}] * 2, [0.5, 0.5]],
    ids=str,
)
def test_what_is_neither_bytes_nor_paths_is_refused(head_repo: Path, tmp_path: Path, column: list) -> None:
    source = write_table(tmp_path / "in/a.parquet", {"image": column})
    with pytest.raises(ValueError, match=r"'image' must hold bytes, paths or .* in a\.parquet"):
        extract(head_repo, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_are_decoded_or_refused(head_repo: Path, tmp_path: Path) -> None:
    keys = {
        "binary": pa.array([b"img-0001", "é".encode()]),
        "number": pa.array([1, 2]),
        "coded": pa.array(["img-0001", "é"]).dictionary_encode(),
    }
    source = write_table(tmp_path / "in/a.parquet", {"image": PNGS[:2], **keys})
    for name in keys:
        rows = extract(head_repo, source, tmp_path / name, id_column=name)
        assert rows.keys() == ({"1", "2"} if name == "number" else {"img-0001", "é"})
    not_text = pa.array([b"a", b"\xff"])
    bad = {
        "bytes": (not_text, "'bytes' of a.parquet must hold text, got bytes that are not UTF-8"),
        "text": (not_text.view(pa.string()), "'text' of a.parquet must hold text, got bytes that are not UTF-8"),
        "list": (pa.array([[1], [2]]), "must hold text or numbers, got list"),
        "long": (pa.array(["a", "b" * 5000]), "at most 4096 letters in a row"),
        "longer": (pa.array(["a", "b" * 2**21]), "at most 4096 bytes in a row"),
    }
    write_table(tmp_path / "in/a.parquet", {"image": PNGS[:2], **{name: values for name, (values, _) in bad.items()}})
    for name, (_, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            extract(head_repo, source, tmp_path / "out", id_column=name)


def test_bytes_and_ids_that_are_views(tmp_path: Path) -> None:
    columns = {"image": pa.array(PNGS[:2], pa.binary_view()), "key": pa.array(["a", "b"], pa.string_view())}
    write_table(tmp_path / "a.parquet", columns)
    images = images_of(tmp_path / "a.parquet", "key")
    assert [(image.id, image.data) for image in images] == [("a", PNGS[0]), ("b", PNGS[1])]


def test_what_spark_and_hadoop_hide_is_skipped(head_repo: Path, tmp_path: Path) -> None:
    hidden = ["_temporary/0/part-0.parquet", ".part-0.parquet", "_part.parquet", "day=1/.hive-staging/part.parquet"]
    for name in ("part-0.parquet", "_day=1/part-0.parquet", *hidden):
        write_table(tmp_path / "in" / name, {"image": PNGS[:1]})
    rows = extract(head_repo, tmp_path / "in", tmp_path / "out")
    assert rows.keys() == {"part-0.parquet#0", "_day=1/part-0.parquet#0"}
    listed = dict(line.split("\t") for line in (tmp_path / "out/.skipped.txt").read_text().splitlines())
    assert listed.keys() == set(hidden) and set(listed.values()) == {
        "hidden, as Spark and Hadoop hide what is unfinished"
    }
    # What is given by its own name is meant.
    assert len(extract(head_repo, tmp_path / "in/.part-0.parquet", tmp_path / "one")) == 1


def corpus_and_job(file: Path, id_column: str | None = None, max_image_bytes: int = 10**6) -> tuple[Corpus, Job]:
    corpus = corpus_of((str(file),), "nowhere", ("PNG",))
    tables.add_rows(corpus, (str(file),), "image", id_column)
    settings = Settings("", {}, {}, "float32", "mean", None, "image", id_column)
    return corpus, Job("", None, (str(file),), None, None, 1, ("PNG",), max_image_bytes, 1, settings)


def images_of(file: Path, *arguments, **options) -> list[Image]:
    corpus, job = corpus_and_job(file, *arguments, **options)
    return list(read(corpus.parts, "parquet", job, ()))


def test_a_row_group_that_cannot_be_read_is_an_error_of_each_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_table(
        file,
        {"image": [bytes([i]) * 1000 for i in range(6)], "key": list("abcdef")},
        row_group_size=2,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(file.read_bytes())
    for value in (2, 4):
        at = data.index(bytes([value]) * 1000)
        data[at - 25 : at] = bytes(25)
    file.write_bytes(bytes(data))
    for id_column, ids in ((None, [f"a.parquet#{i}" for i in range(6)]), ("key", list("abcdef"))):
        images = images_of(file, id_column)
        assert [image.id for image in images] == ids
        assert [image.error is None for image in images] == [True, True] + [False] * 4


def test_a_file_that_changes_meanwhile_ends_the_run(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_table(file, {"image": PNGS})
    corpus, job = corpus_and_job(file)
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet of `--input` can no longer be read"):
        list(read(corpus.parts, "parquet", job, ()))


def test_values_are_decoded_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of a dictionary for all rows: 64 of them at once were gigabytes."""
    file = tmp_path / "a.parquet"
    value = bytes(10**6)
    write_table(file, {"image": pa.array([value] * 64)}, compression="zstd")
    assert file.stat().st_size < 5000
    monkeypatch.setattr(tables, "BYTES_AT_ONCE", 4 * 10**6)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        images = images_of(file, max_image_bytes=2 * 10**6)
    finally:
        pa.set_memory_pool(before)
    assert len(images) == 64 and all(image.data == value for image in images)
    assert pool.max_memory() < 20 * 10**6


def test_values_beyond_the_limit_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_table(file, {"image": [b"a" * 10, os.urandom(2000), b"c" * 10]})
    assert [image.error is None for image in images_of(file, max_image_bytes=1500)] == [True, False, True]
    write_table(file, {"image": [bytes(10**6)]}, compression="zstd", use_dictionary=False)
    assert [image.error for image in images_of(file, max_image_bytes=10**5)] == [
        "ValueError: the file is larger than --max-image-bytes"
    ]
    write_table(file, {"image": [bytes([i]) * 10**6 for i in range(3)]}, compression="zstd", use_dictionary=False)
    errors = {image.error for image in images_of(file, max_image_bytes=2 * 10**6)}
    assert errors == {"ValueError: the row group is compressed more than 100 times, as no images are"}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_manifest_of_paths_and_urls(head_repo: Path, tmp_path: Path, form: str) -> None:
    write_images(tmp_path / "in/images")
    expected = extract(head_repo, tmp_path / "in/images", tmp_path / "expected")
    paths = ["images/0.png", f"file://{tmp_path}/in/images/1.png", str(tmp_path / "in/images/2.png"), "images/gone.png"]
    keys = [f"{index:04}" for index in range(len(paths))]
    manifest = tmp_path / f"in/list.{form}"
    if form == "csv":
        manifest.write_text(
            "key,url,number\n" + "".join(f'{key},"{path}",1\n' for key, path in zip(keys, paths, strict=True))
        )
    else:
        records = [{"key": key, "url": path, "more": {"a": [1]}} for key, path in zip(keys, paths, strict=True)]
        manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    for id_column, ids in ((None, [f"list.{form}#{row}" for row in range(4)]), ("key", keys)):
        output = tmp_path / f"out-{id_column}"
        for _ in range(2):
            rows = extract(head_repo, manifest, output, image_column="url", id_column=id_column)
        assert list(rows) == sorted(ids)
        for index, id_ in enumerate(ids[:3]):
            assert rows[id_]["embedding"] == pytest.approx(expected[f"{index}.png"]["embedding"], abs=1e-5)
        assert rows[ids[3]]["error"] == "FileNotFoundError: No such file or directory"
    with pytest.raises(ValueError, match=rf"list\.{form} must have a column 'image', got .*'url'"):
        extract(head_repo, manifest, tmp_path / "none")
    # In a folder it is none.
    assert extract(head_repo, tmp_path / "in", tmp_path / "folder").keys() == {f"images/{name}" for name in IMAGES}
    manifest.write_text("{" if form == "jsonl" else "a,b\n1\n")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        extract(head_repo, manifest, tmp_path / "none")


def test_a_pattern_that_matches_nothing_is_said(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    with pytest.raises(FileNotFoundError, match=r"the pattern .*/none\*\.png matches nothing"):
        extract(head_repo, [source, tmp_path / "none*.png"], tmp_path / "out")
