# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of the input that were replaced under their names, and what reads an output beside this command."""

import os
import shutil
import sys
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES, archive_of, extract, rows_of, write_images
from filelock import FileLock

from corpus.output import OLD_NAMES, Output


FIRST, SECOND, THIRD = (IMAGES[f"{index}.png"] for index in range(3))


def write_input(folder: Path, kind: str, images: dict[str, bytes]) -> Path:
    """One file of each image, or one file of all."""
    if kind == "image":
        for name, data in images.items():
            if not (folder / name).exists() or (folder / name).read_bytes() != data:
                write_images(folder, {name: data})
        for file in folder.iterdir():
            if file.name not in images:
                file.unlink()
        return folder
    folder.mkdir(exist_ok=True)
    if kind == "archive":
        return write_images(folder, {"x.tar": archive_of(list(images.items()))})
    pq.write_table(pa.table({"image": list(images.values()), "key": list(images)}), folder / "x.parquet")
    return folder


def is_of(row: dict, data: bytes, expected: dict[bytes, list[float]]) -> bool:
    return row["embedding"] == pytest.approx(expected[data], abs=1e-5)


@pytest.fixture(scope="module")
def expected(head_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, list[float]]:
    folder = tmp_path_factory.mktemp("expected")
    rows = extract(head_repo, write_images(folder / "in"), folder / "out")
    return {IMAGES[name]: row["embedding"] for name, row in rows.items()}


@pytest.mark.parametrize("kind", ["image", "archive", "ids"])
def test_replaced_images_are_said_and_done_again(
    head_repo: Path, tmp_path: Path, kind: str, expected: dict, capsys
) -> None:
    """One image replaced, one gone, one new, one broken that is not tried again."""
    prefix = "x.tar/" if kind == "archive" else ""
    options = {"id_column": "key"} if kind == "ids" else {}
    source, output = tmp_path / "in", tmp_path / "out"
    images = {"a.png": FIRST, "b.png": SECOND, "bad.png": b"no image", "gone.png": THIRD}
    write_input(source, kind, images)
    extract(head_repo, source, output, **options)
    assert "changed since" not in capsys.readouterr().out
    extract(head_repo, source, output, **options)
    assert "changed since" not in capsys.readouterr().out

    images = {"a.png": FIRST, "b.png": THIRD, "bad.png": b"no image", "new.png": SECOND}
    write_input(source, kind, images)
    for _ in range(2):
        rows = extract(head_repo, source, output, **options)
        printed = capsys.readouterr().out
        assert "1 files of the input changed since their rows were made, such as " in printed
        assert "--redo-changed does their rows again" in printed
        assert is_of(rows[f"{prefix}b.png"], SECOND, expected) and is_of(rows[f"{prefix}new.png"], SECOND, expected)
    before = rows[f"{prefix}a.png"]
    rows = extract(head_repo, source, output, redo_changed=True, **options)
    assert is_of(rows[f"{prefix}b.png"], THIRD, expected) and is_of(rows[f"{prefix}a.png"], FIRST, expected)
    assert rows[f"{prefix}bad.png"]["error"] and (kind != "image" or rows["a.png"] == before)
    # What an archive no longer holds goes with it; a file or an id that is gone is kept.
    assert rows.keys() == {f"{prefix}{name}" for name in images} | (set() if kind == "archive" else {"gone.png"})
    capsys.readouterr()
    assert extract(head_repo, source, output, redo_changed=True, **options) == rows
    assert "changed since" not in capsys.readouterr().out


def test_rows_of_a_damaged_archive_are_kept(head_repo: Path, tmp_path: Path, expected: dict) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    whole = archive_of(list(IMAGES.items()))
    extract(head_repo, write_images(source, {"x.tar": whole}), output)
    write_images(source, {"x.tar": whole[: whole.index(IMAGES["2.png"])]})
    rows = extract(head_repo, source, output, redo_changed=True)
    assert rows.keys() == {f"x.tar/{name}" for name in IMAGES} | {"x.tar"}
    assert rows["x.tar/2.png"]["error"] and is_of(rows["x.tar/4.png"], IMAGES["4.png"], expected)
    # And its error goes when it was put back.
    write_images(source, {"x.tar": whole})
    rows = extract(head_repo, source, output, retry_errors=True, redo_changed=True)
    assert rows.keys() == {f"x.tar/{name}" for name in IMAGES}
    assert all(is_of(rows[f"x.tar/{name}"], data, expected) for name, data in IMAGES.items())


def test_fewer_rows_of_a_parquet_file(head_repo: Path, tmp_path: Path, expected: dict) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    extract(head_repo, write_input(source, "parquet", {"a": FIRST, "b": SECOND, "c": THIRD}), output)
    write_input(source, "parquet", {"a": SECOND})
    rows = extract(head_repo, source, output, redo_changed=True)
    assert rows.keys() == {"x.parquet#0"} and is_of(rows["x.parquet#0"], SECOND, expected)


def test_an_unfinished_redo_goes_on(head_repo: Path, tmp_path: Path, expected: dict) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    extract(head_repo, write_input(source, "image", {"a.png": FIRST, "b.png": FIRST, "c.png": FIRST}), output)
    write_input(source, "image", {"a.png": SECOND, "b.png": SECOND, "c.png": FIRST})
    rows = extract(head_repo, source, output, redo_changed=True, limit=1)
    assert [is_of(rows[name], SECOND, expected) for name in sorted(rows)] == [True, False, False]
    rows = extract(head_repo, source, output, redo_changed=True, limit=1)
    assert [is_of(rows[name], SECOND, expected) for name in sorted(rows)] == [True, True, False]


def test_paths_move_with_their_times(head_repo: Path, tmp_path: Path, capsys) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output)
    shutil.copytree(source, tmp_path / "copy")
    extract(head_repo, tmp_path / "copy", output)
    assert "changed since" not in capsys.readouterr().out
    os.utime(tmp_path / "copy/0.png", (0, 0))
    extract(head_repo, tmp_path / "copy", output)
    assert "1 files of the input changed since" in capsys.readouterr().out


def test_outputs_with_old_names_resume_and_say_what_they_cannot_tell(head_repo: Path, tmp_path: Path, capsys) -> None:
    source, output = write_images(tmp_path / "in", {"a.png": FIRST, "bad.txt": b"text"}), tmp_path / "out"
    before = extract(head_repo, source, output)
    (output / ".inputs").unlink()
    for old, new in OLD_NAMES.items():
        if (output / new).exists():
            (output / new).rename(output / old)
    (output / "_unfinished").mkdir()
    shutil.copy(next(output.glob("*.parquet")), output / "_unfinished")
    (source / "bad.txt").unlink()
    write_images(source, {"b.png": SECOND})
    capsys.readouterr()
    with FileLock(output / "_lock"), pytest.raises(ValueError, match="being written by another run"):
        extract(head_repo, source, output)
    rows = extract(head_repo, source, output)
    assert rows.keys() == {"a.png", "b.png"} and rows["a.png"] == before["a.png"]
    assert "whether files of the input changed since cannot be told" in capsys.readouterr().out
    assert {file.name for file in output.iterdir() if file.suffix != ".parquet"} == {
        ".settings.json",
        ".inputs",
        ".lock",
    }
    extract(head_repo, source, output)
    assert "cannot be told" not in capsys.readouterr().out


def test_readers_see_nothing_but_rows(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run is under way, with an unfinished file, an error, a lock and a list of what was skipped."""
    output = tmp_path / "out"
    source = write_images(tmp_path / "in", {**IMAGES, "bad.png": b"no image", "notes.txt": b"text"})
    extract(head_repo, source, output, rows_per_file=2, patches_per_batch=128, max_patches=128)
    with Output(str(output)).opened():
        unfinished = output / ".unfinished"
        shutil.copy(next(output.glob("*.parquet")), unfinished / "x.parquet")
        assert {file.name for file in output.iterdir() if file.suffix != ".parquet"} == set(OLD_NAMES.values()) | {
            ".inputs"
        }
        ids = sorted(rows_of(output))
        loaded = datasets.load_dataset(
            "parquet", data_dir=str(output), cache_dir=str(tmp_path / "cache"), split="train"
        )
        assert sorted(loaded["id"]) == ids
        assert sorted(ds.dataset(output, format="parquet").to_table()["id"].to_pylist()) == ids
        assert sorted(pd.read_parquet(output)["id"]) == ids
        if duckdb := sys.modules.get("duckdb"):
            assert sorted(duckdb.sql(f"select id from '{output}/*.parquet'").df()["id"]) == ids
