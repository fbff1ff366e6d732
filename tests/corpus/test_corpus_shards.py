# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""A corpus divided among jobs: every id once, whatever dies, and one output for readers."""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES, archive_of, command, encoded_image, extract, rows_of, start, write_images
from test_corpus_faults import KilledError, Killer
from test_corpus_keep import EXPECTED, KEEP, MEMBERS, kept

import extract_features
from corpus.options import Options
from corpus.run import run
from corpus.shards import name_of, shard_of, status_lines


def all_rows(output: Path, count: int) -> dict[str, dict]:
    """The rows of all shards, of which none comes twice."""
    shards = [rows_of(output / name_of(index, count)) for index in range(count)]
    rows = {id_: row for shard in shards for id_, row in shard.items()}
    assert len(rows) == sum(map(len, shards))
    return rows


def write_input(folder: Path, kind: str) -> Path:
    if kind == "image":
        return write_images(folder, {**IMAGES, "bad.png": b"no image", "notes.txt": b"text"})
    folder.mkdir()
    for number, (name, data) in enumerate(IMAGES.items()):
        if kind == "archive":
            write_images(folder, {f"{number}.tar": archive_of([(name, data)])})
        else:
            pq.write_table(
                pa.table({"image": [data, None], "key": [name, f"none{number}"]}), folder / f"{number}.parquet"
            )
    return folder


@pytest.mark.parametrize("kind", ["image", "archive", "parquet", "ids"])
def test_shards_are_what_one_run_is(head_repo: Path, tmp_path: Path, kind: str) -> None:
    source = write_input(tmp_path / "in", kind)
    options = {"id_column": "key"} if kind == "ids" else {}
    expected = extract(head_repo, source, tmp_path / "whole", **options)
    output = tmp_path / "out"
    for index in range(7):
        run_shard(head_repo, source, output, index, 7, **options)
        assert status_lines(str(output))[0].endswith(f"{index + 1} complete, 0 begun, {6 - index} missing.")
    rows = all_rows(output, 7)
    assert rows.keys() == expected.keys()
    for id_, row in rows.items():
        assert row["error"] == expected[id_]["error"]
        if row["error"] is None:
            np.testing.assert_allclose(row["embedding"], expected[id_]["embedding"], rtol=0, atol=1e-5)
    # Some have nothing, and are complete.
    assert any(not rows_of(output / name_of(index, 7)) for index in range(7)) or kind == "parquet"
    skipped = [file.read_text() for file in output.glob("*/.skipped.txt")]
    assert len(skipped) == (kind == "image") and all(text.startswith("notes.txt\t") for text in skipped)


def run_shard(repo: Path, source: Path | list[Path], output: Path, index: int, count: int, **options) -> None:
    sources = source if isinstance(source, list) else [source]
    run(Options(str(repo), [*map(str, sources)], str(output), num_shards=count, shard_index=index, **options))


@pytest.mark.parametrize("id_column", [None, "key"])
def test_the_rows_of_a_manifest_are_divided(head_repo: Path, tmp_path: Path, id_column: str | None) -> None:
    """With columns that are kept. Beside it is a Parquet file, which is of one shard."""
    write_images(tmp_path / "in/images")
    manifest, table, output = tmp_path / "in/list.csv", tmp_path / "in/x.parquet", tmp_path / "out"
    pq.write_table(pa.table({"image": list(IMAGES), "key": [f"p{index}" for index in range(5)]}), table)
    write_images(tmp_path / "in")
    options: dict = {"id_column": id_column, "keep": ("key",), "max_patches": 64, "patches_per_batch": 256}
    count, columns = 3, ("error", "grid_thw", "key")

    def write(keys: list[str]) -> None:
        lines = [f"images/{sum(map(ord, key)) % 5}.png,{key}" for key in keys[:-1]] + [f"gone.png,{keys[-1]}"]
        manifest.write_text("\n".join(["image,key", *lines, ""]))

    def run_shards() -> list[dict[str, dict]]:
        for index in range(count):
            run_shard(head_repo, [manifest, table], output, index, count, **options)
        return [rows_of(output / name_of(index, count)) for index in range(count)]

    keys = [f"{index:04}" for index in range(60)]
    write(keys)
    expected = extract(head_repo, [manifest, table], tmp_path / "whole", **options)
    assert len(expected) == 65
    before = run_shards()
    rows = all_rows(output, count)
    assert rows.keys() == expected.keys()
    assert all(rows[id_][name] == expected[id_][name] for id_ in rows for name in columns)
    in_parquet = {f"p{index}" for index in range(5)}
    shares = [sum(row["key"] not in in_parquet for row in shard.values()) for shard in before]
    assert sum(shares) == 60 and min(shares) > 10
    assert sum(any(row["key"] in in_parquet for row in shard.values()) for shard in before) == 1
    assert run_shards() == before
    assert status_lines(str(output))[0].endswith("3 complete, 0 begun, 0 missing.")

    # Rows that are new, of which those before have the ids that they had.
    write([*keys, "0060", "0061"] if id_column is None else ["0061", "0060", *keys])
    after = run_shards()
    assert all_rows(output, count).keys() == expected.keys() | (
        {"list.csv#60", "list.csv#61"} if id_column is None else {"0060", "0061"}
    )
    assert all(old.items() <= new.items() for old, new in zip(before, after, strict=True))


def test_the_shard_of_a_name_never_changes() -> None:
    assert [shard_of(name, 16) for name in ("a.png", "b/c.tar", "é.parquet")] == [6, 1, 13]
    counts = np.bincount([shard_of(f"{number}.png", 16) for number in range(16_000)], minlength=16)
    assert counts.min() > 850 and counts.max() < 1150


def test_ids_that_come_twice_are_found_over_all_shards(head_repo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        pq.write_table(
            pa.table({"image": [IMAGES["0.png"]], "key": [f"{number % 3}"]}), tmp_path / f"in/{number}.parquet"
        )
    for index in range(4):
        with pytest.raises(ValueError, match="must hold a different value in each row"):
            run_shard(head_repo, tmp_path / "in", tmp_path / "out", index, 4, id_column="key")


def test_other_divisions_are_refused(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    run_shard(head_repo, source, output, 0, 2)
    with pytest.raises(ValueError, match="is divided into 2 shards, got --num-shards 3: give the same, or another"):
        run_shard(head_repo, source, output, 0, 3)
    with pytest.raises(ValueError, match="is divided into shards: give --num-shards 2"):
        extract(head_repo, source, output)
    extract(head_repo, source, tmp_path / "whole")
    with pytest.raises(ValueError, match="was begun without shards"):
        run_shard(head_repo, source, tmp_path / "whole", 0, 2)
    for index in (-1, 2, None):
        with pytest.raises(ValueError, match="the index from 0 to below the number"):
            run_shard(head_repo, source, tmp_path / "new", index, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is for an output of `--num-shards N`, one N for all, got none in"):
        status_lines(str(tmp_path / "whole"))


def test_shards_are_made_alike(head_repo: Path, tmp_path: Path) -> None:
    """A shard without rows binds none, as an output without rows takes any settings."""
    source, output, count = write_images(tmp_path / "in", {"a.png": IMAGES["0.png"]}), tmp_path / "out", 3
    full = shard_of("a.png", count)
    run_shard(head_repo, source, output, (full + 1) % count, count, pooling="mean")
    run_shard(head_repo, source, output, full, count)
    other = (full + 2) % count
    for options, found in (
        ({"pooling": "mean"}, "pooling is 'mean', was 'head'"),
        ({"embedding_dtype": "float16"}, "embedding_dtype is 'float16', was 'float32'"),
    ):
        with pytest.raises(ValueError, match=rf"/shard={full}-of-3 was begun with .*: {found}"):
            run_shard(head_repo, source, output, other, count, **options)
        assert "1 missing" in status_lines(str(output))[0]
    run_shard(head_repo, source, output, other, count)
    assert "3 complete" in status_lines(str(output))[0]


def test_an_output_below_the_input_holds_no_input(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    for index in (0, 1, 0):
        run_shard(head_repo, source, source / "out", index, 2)
    assert all_rows(source / "out", 2).keys() == IMAGES.keys()


def test_status_of_the_command(head_repo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    source, output = write_input(tmp_path / "in", "image"), tmp_path / "out"
    biggest = max(range(3), key=lambda index: sum(shard_of(name, 3) == index for name in [*IMAGES, "bad.png"]))
    run_shard(head_repo, source, output, biggest, 3, limit=1)
    run_shard(head_repo, source, output, (biggest + 1) % 3, 3)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["extract_features.py", "--output", str(output), "--status"])
    extract_features.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 shards of {output}: 1 complete, 1 begun, 1 missing."
    assert lines[1 + biggest].startswith(f"shard={biggest}-of-3  begun  1 rows, ")
    rows = rows_of(output / name_of((biggest + 1) % 3, 3))
    errors = sum(row["error"] is not None for row in rows.values())
    assert (
        lines[1 + (biggest + 1) % 3] == f"shard={(biggest + 1) % 3}-of-3  complete  {len(rows)} rows, {errors} errors"
    )
    # What is new is to be done.
    run_shard(head_repo, source, output, biggest, 3)
    assert status_lines(str(output))[0].endswith("2 complete, 0 begun, 1 missing.")


def test_a_marker_that_its_rows_do_not_bear_out(head_repo: Path, tmp_path: Path) -> None:
    """Cut short, of another content, or of files that were lost or damaged since; the other shard is told of still."""
    source, output = write_input(tmp_path / "in", "image"), tmp_path / "out"
    options = {"rows_per_file": 1, "patches_per_batch": 256, "max_patches": 256}
    for index in range(2):
        run_shard(head_repo, source, output, index, 2, **options)
    index = max(range(2), key=lambda index: len(rows_of(output / name_of(index, 2))))
    shard, other = output / name_of(index, 2), status_lines(str(output))[2 - index]
    marker, whole = shard / ".complete", (shard / ".complete").read_bytes()
    for content in (b"", whole[:-3], b"[]", b"\xff", b"[" * 100_000, json.dumps({"rows": 1, "errors": 0}).encode()):
        marker.write_bytes(content)
        lines = status_lines(str(output))
        assert lines[0].endswith("1 complete, 1 begun, 0 missing.") and lines[2 - index] == other
        assert lines[1 + index].startswith(f"shard={index}-of-2  begun  ")
        run_shard(head_repo, source, output, index, 2, **options)
        assert marker.read_bytes() == whole and status_lines(str(output))[0].endswith("2 complete, 0 begun, 0 missing.")
    file = min(shard.glob("*.parquet"))
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    lines = status_lines(str(output))
    assert lines[0].endswith("1 complete, 1 begun, 0 missing.") and lines[2 - index] == other
    assert lines[1 + index].startswith(f"shard={index}-of-2  begun  {file.name} of `--output` {shard} cannot be read")
    assert lines[1 + index].endswith("delete it to redo its rows.")
    file.unlink()
    assert status_lines(str(output))[0].endswith("1 complete, 1 begun, 0 missing.")
    run_shard(head_repo, source, output, index, 2, **options)
    assert status_lines(str(output))[0].endswith("2 complete, 0 begun, 0 missing.")
    assert all_rows(output, 2).keys() == {*IMAGES, "bad.png"}


def test_shards_that_die_and_one_that_is_lost(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"{number % 5}/{number:03}.png": encoded_image(20 + number % 7, 30, number) for number in range(60)}
    source, output, count = write_images(tmp_path / "in", images), tmp_path / "out", 4
    generator = random.Random(0)
    options = {"patches_per_batch": 128, "max_patches": 128, "rows_per_file": 2}
    killed = 0
    for index in range(count):
        for attempt in itertools.count():
            try:
                with monkeypatch.context() as patch:
                    if attempt < 3:
                        Killer(generator.randrange(8, 60)).install(patch)
                    run_shard(head_repo, source, output, index, count, **options)
                break
            except KilledError:
                killed += 1
    assert killed > 4
    shutil.rmtree(output / name_of(2, count))
    assert all_rows(output, count).keys() < images.keys()
    assert "1 missing" in status_lines(str(output))[0]
    run_shard(head_repo, source, output, 2, count, **options)
    assert all_rows(output, count).keys() == images.keys()
    assert "4 complete" in status_lines(str(output))[0]


def test_a_shard_on_ray_is_that_in_process(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun in process and resumed on Ray, with texts that go along."""
    pytest.importorskip("ray", reason="needs requirements-scale.txt")
    archives = {}
    for number in range(6):
        images = {f"{index}.png": encoded_image(40, 60 + index, 50 * number + index) for index in range(50)}
        texts = {f"{index}.txt": f"{number} {index}".encode() for index in range(0, 50, 2)}
        members = sorted({**images, **texts, "bad.png": b"no image"}.items())
        archives[f"{number}.tar"] = archive_of(members)
    # The larger one.
    index = max(range(2), key=lambda index: sum(shard_of(name, 2) == index for name in archives))
    archive = next(name for name in map("x{}.tar".format, itertools.count()) if shard_of(name, 2) == index)
    archives[archive] = archive_of(MEMBERS)
    source, output = write_images(tmp_path / "in", archives), tmp_path / "out"
    run_shard(head_repo, source, tmp_path / "alone", index, 2, keep=KEEP)
    expected = rows_of(tmp_path / "alone" / name_of(index, 2))

    shard = output / name_of(index, 2)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        Killer(40).install(patch)
        run_shard(head_repo, source, output, index, 2, keep=KEEP, rows_per_file=8, patches_per_batch=4096)
    before = rows_of(shard)
    assert 0 < len(before) < len(expected)
    assert status_lines(str(output))[1 + index].startswith(f"shard={index}-of-2  begun  {len(before)} rows, ")

    options = ("--num-shards", 2, "--shard-index", index, "--num-workers", 1, "--keep", "txt, json,cls")
    arguments = command(head_repo, source, output, *options, "--rows-per-file", 8)
    printed, _ = (resumed := start(*arguments)).communicate(timeout=300)
    assert resumed.returncode == 0, printed
    assert f"{len(before):,} were done before" in printed
    rows = rows_of(shard)
    assert rows.keys() == expected.keys() and before.keys().isdisjoint(f"{archive}/{name}" for name in EXPECTED)
    assert {name: kept(rows[f"{archive}/{name}"]) for name in EXPECTED} == EXPECTED
    for id_, row in rows.items():
        for name in ("error", "error_detail", "grid_thw", *KEEP):
            assert row[name] == expected[id_][name]
        if row["error"] is None:
            np.testing.assert_allclose(row["embedding"], expected[id_]["embedding"], rtol=0, atol=1e-5)
    line = status_lines(str(output))[1 + index]
    errors = sum(row["error"] is not None for row in rows.values())
    assert line == f"shard={index}-of-2  complete  {len(rows)} rows, {errors} errors" and errors >= 3


def test_readers_take_all_shards_as_one(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_input(tmp_path / "in", "image"), tmp_path / "out"
    for index in range(3):
        run_shard(head_repo, source, output, index, 3)
    ids = sorted(all_rows(output, 3))
    loaded = datasets.load_dataset("parquet", data_dir=str(output), cache_dir=str(tmp_path / "cache"), split="train")
    assert sorted(loaded["id"]) == ids
    frame = pd.read_parquet(output)
    assert sorted(frame["id"]) == ids and {"0-of-3", "1-of-3", "2-of-3"} >= set(frame["shard"])
    assert sorted(ds.dataset(output, format="parquet", partitioning="hive").to_table()["id"].to_pylist()) == ids
    connection = duckdb.connect()
    rows = connection.execute(f"select id, shard from '{output}/*/*.parquet'").fetchall()
    assert sorted(id_ for id_, _ in rows) == ids and all(shard.endswith("-of-3") for _, shard in rows)
    size = len(next(row["embedding"] for row in all_rows(output, 3).values() if row["embedding"]))
    best = connection.execute(
        f"with v as (select id, embedding::float[{size}] as e from '{output}/*/*.parquet' where error is null) "
        "select b.id from v a, v b where a.id = '3.png' order by array_cosine_similarity(a.e, b.e) desc limit 1"
    ).fetchall()
    assert best == [("3.png",)]
