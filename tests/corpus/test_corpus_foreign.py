# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Outputs and models in which somebody else's hands have been: one line that says what to do."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import copy_of, extract, rows_of, write_images

from corpus.output import Output
from corpus.rows import output_schema
from corpus.shards import mark_complete, status_lines


def an_output(folder: Path, rows: dict[str, str | None], weights: str = "a") -> Path:
    """With its rows, ids to errors, in a file of its own for each."""
    schema = output_schema(2, "float32", None, 4, None, {"weights": weights, "pooling": "mean", "dtype": "float32"})
    folder.mkdir(parents=True, exist_ok=True)
    for id_, error in rows.items():
        row = {"id": id_, "error": error}
        pq.write_table(pa.Table.from_pylist([row], schema), folder / f"{Path(id_).stem}-{weights}.parquet")
    return folder


FOREIGN = {
    "no id": {"x": [1]},
    "numbers": {"id": [1], "error": pa.nulls(1, pa.string())},
    "no text": {"id": pa.nulls(1, pa.string()), "error": pa.nulls(1, pa.string())},
    "no errors": {"id": ["a"], "error": [1]},
}


@pytest.mark.parametrize("columns", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else(tmp_path: Path, columns: dict) -> None:
    shard = an_output(tmp_path / "shard=0-of-1", {"0.png": None})
    output = Output(str(shard))
    with output.opened():
        mark_complete(output)
    pq.write_table(pa.table(columns), shard / "foreign.parquet")
    with pytest.raises(
        ValueError, match=r"foreign\.parquet of `--output` .* not what this command writes.*: remove it"
    ):
        list(output.rows())
    first, line = status_lines(str(tmp_path))
    assert "0 complete, 1 begun" in first and line.startswith("shard=0-of-1  begun")


def test_a_record_of_inputs_that_is_none(tmp_path: Path) -> None:
    output = an_output(tmp_path / "out", {})
    pq.write_table(pa.table({"x": [1]}), output / ".inputs")
    with pytest.raises(ValueError, match=r"\.inputs of `--output` .* not what this command writes.*: remove it"):
        Output(str(output)).stamps()


def test_rows_that_come_twice_are_said(head_repo: Path, tmp_path: Path) -> None:
    """Of a file that was copied, or of two runs at once on an object store, which has no lock."""
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    expected = extract(head_repo, source, output)
    (file,) = output.glob("*.parquet")
    shutil.copy(file, output / "copy.parquet")
    with pytest.raises(ValueError, match=rf"holds 5 images twice, such as .*\.png in .*{file.name}.*: delete one of"):
        extract(head_repo, source, output)
    (output / "copy.parquet").unlink()
    assert extract(head_repo, source, output) == expected


def test_rows_of_another_model_are_not_taken_for_done(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output, limit=3)
    (file,) = an_output(tmp_path / "other", {"4.png": None}, weights="b").iterdir()
    shutil.copy(file, output)
    with pytest.raises(
        ValueError, match=r"4-b\.parquet of `--output` .* was made with something else \(weights .*: remove it"
    ):
        extract(head_repo, source, output)
    (output / file.name).unlink()
    assert len(extract(head_repo, source, output)) == 5


def test_weights_that_were_cut_short_are_one_line(head_repo: Path, tmp_path: Path) -> None:
    repo = copy_of(head_repo, tmp_path / "model")
    weights = (repo / "model.safetensors").read_bytes()
    for size in (3, len(weights) - 7):
        (repo / "model.safetensors").write_bytes(weights[:size])
        with pytest.raises(
            ValueError, match=r"The weights in .*model cannot be read .*: copy or convert the model again"
        ):
            extract(repo, write_images(tmp_path / "in"), tmp_path / "out")
    assert not rows_of(tmp_path / "out")


def test_a_configuration_that_makes_no_sense_is_one_line(head_repo: Path, tmp_path: Path) -> None:
    repo = copy_of(head_repo, tmp_path / "model")
    text = (repo / "config.json").read_text()
    for value in ('"a"', "77"):
        (repo / "config.json").write_text(text.replace('"num_attention_heads": 2', f'"num_attention_heads": {value}'))
        with pytest.raises(ValueError, match=r"(?s)`--model` .*model: its config.json .*num_attention_heads"):
            extract(repo, write_images(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
