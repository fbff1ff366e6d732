# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes along with the features: columns of Parquet files, texts beside the images of archives."""

import datetime
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES, archive_of, extract, write_images
from test_corpus_faults import KilledError, Killer


PNGS = list(IMAGES.values())

MEMBERS = [
    ("a/0.png", PNGS[0]),
    ("a/0.txt", "ein Café".encode()),
    ("a/0.json", b'{"n": 1}'),
    ("a/0.cls", b"\xff7"),
    # Before its image, shared by two, and of one of them in capitals.
    ("a/1.txt", b"two pictures"),
    ("a/1.left.png", PNGS[1]),
    ("a/1.right.PNG", PNGS[2]),
    ("b/1.png", PNGS[3]),
    ("b/2.TXT", b"of no image"),
    ("b/3.png", b"no image"),
    ("b/3.txt", b"of a broken one"),
    # No neighbours: the text of another group lies between.
    ("c/0.png", PNGS[4]),
    ("c/9.txt", b""),
    ("c/0.txt", b"too late"),
    ("without_a_dot", PNGS[0]),
    # Joined archives: the same names again.
    ("d.png", PNGS[0]),
    ("d.txt", b"first"),
    ("d.png", PNGS[1]),
    ("d.txt", b"second"),
]

EXPECTED = {
    "a/0.png": ("ein Café", '{"n": 1}', "\\xff7"),
    "a/1.left.png": ("two pictures", None, None),
    "a/1.right.PNG": ("two pictures", None, None),
    "b/1.png": (None, None, None),
    "b/3.png": ("of a broken one", None, None),
    "c/0.png": (None, None, None),
    "without_a_dot": (None, None, None),
    "d.png": ("first", None, None),
    "d.png#2": ("second", None, None),
}

KEEP = ("txt", "json", "cls")


def kept(row: dict, names: tuple[str, ...] = KEEP) -> tuple:
    return tuple(row[name] for name in names)


def test_texts_beside_the_images_of_an_archive(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"x.tar": archive_of(MEMBERS)})
    rows = extract(head_repo, source, tmp_path / "out", keep=KEEP, pooling="mean")
    plain = extract(head_repo, source, tmp_path / "plain", pooling="mean")
    assert {id_.removeprefix("x.tar/"): kept(row) for id_, row in rows.items()} == EXPECTED
    for id_, row in plain.items():
        assert row["error"] == rows[id_]["error"] and (row["error"] is None) == (id_ != "x.tar/b/3.png")
        if row["error"] is None:
            np.testing.assert_allclose(row["embedding"], rows[id_]["embedding"], rtol=0, atol=1e-5)
    schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert schema.names[-3:] == list(KEEP) and {schema.field(name).type for name in KEEP} == {pa.string()}


def test_webdataset_groups_as_here(head_repo: Path, tmp_path: Path) -> None:
    """The independent reference, where it takes the archive: datasets reads WebDataset's convention too."""
    datasets = pytest.importorskip("datasets")
    members = [
        (f"{key}.{suffix}", data)
        for key, data in zip("abc", PNGS, strict=False)
        for suffix, data in (("png", data), ("txt", key.encode()))
    ]
    source = write_images(tmp_path / "in", {"x.tar": archive_of(members)})
    rows = extract(head_repo, source, tmp_path / "out", keep=("txt",))
    loaded = datasets.load_dataset("webdataset", data_files=str(source / "x.tar"), split="train", streaming=True)
    expected = {
        f"x.tar/{row['__key__']}.png": row["txt"] for row in loaded.cast_column("png", datasets.Image(decode=False))
    }
    assert {id_: row["txt"] for id_, row in rows.items()} == expected


def test_a_damaged_archive_gives_what_it_holds(head_repo: Path, tmp_path: Path) -> None:
    whole = archive_of([("0.png", PNGS[0]), ("0.txt", b"whole"), ("1.png", PNGS[1]), ("1.txt", b"x" * 2000)])
    source = write_images(tmp_path / "in", {"x.tar": whole[: whole.index(b"x" * 100) + 700]})
    rows = extract(head_repo, source, tmp_path / "out", keep=("txt",))
    assert {id_: row["txt"] for id_, row in rows.items()} == {
        "x.tar/0.png": "whole",
        "x.tar/1.png": None,
        "x.tar": None,
    }
    assert rows["x.tar/1.png"]["error"] is None and "unexpected end of data" in rows["x.tar"]["error"]


@pytest.mark.parametrize("text", [b"t" * 30_000, b"t"], ids=["text", "images"])
def test_a_group_that_is_too_large_is_an_error_of_its_images(head_repo: Path, tmp_path: Path, text: bytes) -> None:
    sizes = [len(data) for data in PNGS]
    members = [("0.png", PNGS[0]), ("0.txt", b"small"), ("1.a.png", PNGS[1]), ("1.txt", text), ("1.b.png", PNGS[2])]
    source = write_images(tmp_path / "in", {"x.tar": archive_of(members)})
    limit = max(sizes[1], sizes[2]) + 1
    assert sizes[1] + sizes[2] > limit > sizes[0] + 5
    rows = extract(head_repo, source, tmp_path / "out", keep=("txt",), max_image_bytes=limit)
    assert rows["x.tar/0.png"]["error"] is None and rows["x.tar/0.png"]["txt"] == "small"
    for name in ("1.a.png", "1.b.png"):
        assert "share a name up to its first dot" in rows[f"x.tar/{name}"]["error"]


def columns() -> dict[str, list | pa.Array]:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678)
    return {
        "image": [PNGS[0], None, PNGS[1]],
        "caption": ["ein Café", None, "b"],
        "key": [7, 8, 9],
        "tags": [["a", "b"], [], None],
        "pair": [{"x": 1, "y": None}, None, {"x": 2, "y": "z"}],
        "when": pa.array([moment, None, moment], pa.timestamp("us", "UTC")),
        "coded": pa.array(["u", "v", "u"]).dictionary_encode(),
        "nothing": pa.nulls(3),
        "patches": [b"\0", b"1", b""],
    }


def test_columns_of_parquet_keep_their_types(head_repo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table(columns())
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=2)
    names = tuple(name for name in reversed(table.column_names) if name != "image")
    rows = extract(head_repo, tmp_path / "in", tmp_path / "out", keep=names)
    for index, row in enumerate(table.to_pylist()):
        found = rows[f"a.parquet#{index}"]
        assert (found["error"] is None) == (row["image"] is not None)
        assert kept(found, names) == kept(row, names)
    schema = pq.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert schema.names[-len(names) :] == list(names)
    before = pq.read_schema(tmp_path / "in/a.parquet")
    expected = {**{name: before.field(name).type for name in names}, "coded": pa.string(), "nothing": pa.string()}
    assert {name: str(schema.field(name).type) for name in names} == {n: str(t) for n, t in expected.items()}


def test_the_id_column_may_be_kept_and_text_need_not_be_text(head_repo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = pa.array([b"a\xff", b"b"]).view(pa.string())
    pq.write_table(pa.table({"image": PNGS[:2], "key": ["x", "y"], "text": text}), tmp_path / "in/a.parquet")
    rows = extract(head_repo, tmp_path / "in", tmp_path / "out", id_column="key", keep=("key", "text"))
    assert {id_: kept(row, ("error", "key", "text")) for id_, row in rows.items()} == {
        "x": (None, "x", "a\\xff"),
        "y": (None, "y", "b"),
    }


def test_files_whose_types_differ_have_one_that_holds_both(head_repo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, values in enumerate((pa.nulls(1), pa.array([2], pa.int32()), pa.array([2**40]))):
        pq.write_table(pa.table({"image": PNGS[:1], "n": values}), tmp_path / f"in/{number}.parquet")
    rows = extract(head_repo, tmp_path / "in", tmp_path / "out", keep=("n",))
    assert [rows[f"{number}.parquet#0"]["n"] for number in range(3)] == [None, 2, 2**40]
    pq.write_table(pa.table({"image": PNGS[:1], "n": ["text"]}), tmp_path / "in/3.parquet")
    with pytest.raises(ValueError, match=r"`--keep` needs columns of one type, got another in 3\.parquet"):
        extract(head_repo, tmp_path / "in", tmp_path / "new", keep=("n",))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_columns_of_a_manifest(head_repo: Path, tmp_path: Path, form: str) -> None:
    write_images(tmp_path / "in/images")
    manifest = tmp_path / f"in/list.{form}"
    if form == "csv":
        manifest.write_text('image,code,more\nimages/0.png,0001,"a, b"\nimages/1.png,2,\n')
    else:
        manifest.write_text('{"image": "images/0.png", "code": "0001"}\n{"image": "images/1.png", "code": "2"}\n')
    rows = extract(head_repo, manifest, tmp_path / "out", keep=("code",))
    assert [rows[f"list.{form}#{index}"]["code"] for index in range(2)] == ["0001", "2"]
    with pytest.raises(ValueError, match="must have a column 'caption', got"):
        extract(head_repo, manifest, tmp_path / "none", keep=("caption",))


def test_what_cannot_be_kept_is_refused(head_repo: Path, tmp_path: Path) -> None:
    archive = write_images(tmp_path / "in", {"x.tar": archive_of(MEMBERS)})
    images = write_images(tmp_path / "images")
    for name in ("id", "error", "error_detail", "grid_thw", "embedding", "patch_features", "shard", ""):
        with pytest.raises(ValueError, match=f"must not name columns of the output itself, got '{name}'"):
            extract(head_repo, archive, tmp_path / "out", keep=("txt", name))
    with pytest.raises(ValueError, match="must name each column once, got txt,txt"):
        extract(head_repo, archive, tmp_path / "out", keep=("txt", "txt"))
    for name in ("png", "left.png", "TXT"):
        with pytest.raises(ValueError, match=f"names suffixes of texts, .* got '{name}'"):
            extract(head_repo, archive, tmp_path / "out", keep=(name,))
    with pytest.raises(ValueError, match="needs Parquet files or archives, got txt with files of images"):
        extract(head_repo, images, tmp_path / "out", keep=("txt",))
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_a_setting_of_the_output(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in", {"x.tar": archive_of(MEMBERS)}), tmp_path / "out"
    extract(head_repo, source, output, keep=("txt",), limit=2)
    with pytest.raises(ValueError, match=r"keep is None, was {'txt': 'string'}"):
        extract(head_repo, source, output)
    with pytest.raises(ValueError, match=r"keep\.json is 'string', was None"):
        extract(head_repo, source, output, keep=("txt", "json"))
    rows = extract(head_repo, source, output, keep=("txt",))
    assert {id_.removeprefix("x.tar/"): (row["txt"],) for id_, row in rows.items()} == {
        id_: texts[:1] for id_, texts in EXPECTED.items()
    }


def test_kept_through_kills_and_retries(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_images(tmp_path / "in", {"x.tar": archive_of(MEMBERS)}), tmp_path / "out"
    options = {"keep": KEEP, "rows_per_file": 2, "patches_per_batch": 256, "max_patches": 256}
    for step in itertools.count(5, 3):
        try:
            with monkeypatch.context() as patch:
                Killer(step).install(patch)
                extract(head_repo, source, output, **options)
            break
        except KilledError:
            continue
    assert step > 8
    rows = extract(head_repo, source, output, **options, retry_errors=True)
    assert {id_.removeprefix("x.tar/"): kept(row) for id_, row in rows.items()} == EXPECTED
