# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What is done is decided by ids; what an output was made with is decided by content."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import IMAGES, archive_of, copy_of, extract, rows_of, write_images
from filelock import FileLock
from safetensors.torch import load_file, save_file
from scaling import make_model_repo

from corpus import settings as corpus_settings
from corpus.settings import file_hash


GOOD, BAD = IMAGES["0.png"], b"no image"


def files_of(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*.parquet")}


def change_weights(repo: Path) -> None:
    weights = load_file(repo / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * 1.5}, repo / "model.safetensors", {"format": "pt"})


def test_a_renamed_image_is_encoded(head_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_images(tmp_path / "in", {"a.png": GOOD, "b.png": IMAGES["1.png"]})
    output = tmp_path / "out"
    extract(head_repo, source, output)
    (source / "b.png").rename(source / "c.png")
    assert extract(head_repo, source, output).keys() == {"a.png", "b.png", "c.png"}
    assert "1 rows of the output are of images that are not in the input; they are kept." in capsys.readouterr().out
    before = files_of(output)
    extract(head_repo, source, output)
    assert "All 2 images were done before." in capsys.readouterr().out and files_of(output) == before


@pytest.mark.parametrize("kind", ["archive", "parquet", "ids"])
def test_only_what_is_missing_is_encoded(head_repo: Path, tmp_path: Path, kind: str, capsys) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    options = {"id_column": "key"} if kind == "ids" else {}

    def write(count: int) -> None:
        images = dict(list(IMAGES.items())[:count])
        if kind == "archive":
            write_images(source, {"a.tar": archive_of(list(images.items()))})
        else:
            write_images(source, {})
            source.mkdir(exist_ok=True)
            table = pa.table({"image": list(images.values()), "key": list(images)})
            pq.write_table(table, source / "a.parquet", row_group_size=2)

    write(3)
    extract(head_repo, source, output, **options)
    capsys.readouterr()
    write(5)
    assert len(extract(head_repo, source, output, **options)) == 5
    printed = capsys.readouterr().out
    assert "2 images" in printed and "3 were done before" in printed and "not in the input" not in printed
    (source / ("a.tar" if kind == "archive" else "a.parquet")).rename(
        source / f"b{'.tar' if kind == 'archive' else '.parquet'}"
    )
    rows = extract(head_repo, source, output, **options)
    assert len(rows) == (5 if kind == "ids" else 10)
    assert ("5 rows of the output are of images that are not in the input" in capsys.readouterr().out) == (
        kind != "ids"
    )


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ("weights", {}, "weights is "),
        ("config", {}, "config.rms_norm_eps is 0.01, was 1e-05"),
        ("processor", {}, "processor.max_patches is 100, was 4096"),
        (None, {"max_patches": 100}, "processor.max_patches is 100, was 4096"),
        (None, {"image_size": 56}, "processor.image_size is 56, was None"),
        (None, {"dtype": "bfloat16"}, "dtype is 'bfloat16', was 'float32'"),
        (None, {"pooling": "mean"}, "pooling is 'mean', was 'head'"),
        (None, {"patch_features": "float16"}, "patch_features is 'float16', was None"),
    ],
)
def test_other_content_is_refused(
    head_repo: Path, tmp_path: Path, change: str | None, options: dict, named: str
) -> None:
    repo, output = copy_of(head_repo, tmp_path / "model"), tmp_path / "out"
    source = write_images(tmp_path / "in", {"a.png": GOOD})
    extract(repo, source, output)
    before = files_of(output)
    write_images(source, {"b.png": GOOD})
    if change == "weights":
        change_weights(repo)
    elif change:
        file = repo / ("config.json" if change == "config" else "preprocessor_config.json")
        fields = {"rms_norm_eps": 0.01} if change == "config" else {"max_patches": 100, "min_patches": 100}
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match="was begun with") as refusal:
        extract(repo, source, output, **options)
    assert named in str(refusal.value) and files_of(output) == before


def test_paths_may_move(head_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    repo = copy_of(head_repo, tmp_path / "model")
    source = write_images(tmp_path / "in", {"a.png": GOOD})
    extract(repo, source, tmp_path / "out")
    for name in ("model", "in", "out"):
        (tmp_path / name).rename(tmp_path / f"{name}[1]")
    write_images(tmp_path / "in[1]", {"b.png": GOOD})
    assert extract(tmp_path / "model[1]", tmp_path / "in[1]", tmp_path / "out[1]").keys() == {"a.png", "b.png"}
    assert "This output was last given --input" in capsys.readouterr().out


def test_names_are_no_patterns(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in[1]")
    for _ in range(2):
        assert extract(head_repo, source, tmp_path / "run[1]").keys() == IMAGES.keys()


def test_changed_code_only_warns(head_repo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    source = write_images(tmp_path / "in", {"a.png": GOOD})
    extract(head_repo, source, tmp_path / "out")
    monkeypatch.setattr("corpus.run.code_hash", lambda folder: "other")
    write_images(source, {"b.png": GOOD})
    assert len(extract(head_repo, source, tmp_path / "out")) == 2
    assert "The code has changed" in capsys.readouterr().out
    extract(head_repo, source, tmp_path / "out")
    assert "The code has changed" not in capsys.readouterr().out


def test_an_output_without_rows_takes_any_settings(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"a.png": GOOD})
    output = tmp_path / "out"
    extract(head_repo, source, output)
    for file in output.glob("*.parquet"):
        file.unlink()
    assert extract(head_repo, source, output, dtype="bfloat16").keys() == {"a.png"}


def test_parquet_files_without_a_record_are_no_output(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output)
    (output / ".settings.json").unlink()
    with pytest.raises(ValueError, match="no record of what they were made with"):
        extract(head_repo, source, output)


def test_errors_are_tried_again_under_their_ids(head_repo: Path, tmp_path: Path, capsys) -> None:
    source, output = write_images(tmp_path / "in", {"a.png": GOOD, "b.png": BAD, "c.png": BAD}), tmp_path / "out"
    first = extract(head_repo, source, output)
    assert "2 could not be read or decoded; --retry-errors" in capsys.readouterr().out
    names = set(files_of(output))
    write_images(source, {"b.png": GOOD, "d.png": IMAGES["1.png"]})
    before = extract(head_repo, source, output)
    assert "2 rows from before hold an error; --retry-errors tries them again." in capsys.readouterr().out
    assert before["b.png"] == first["b.png"] and set(files_of(output)) > names
    names = set(files_of(output))
    write_images(source, {"e.png": GOOD})
    rows = extract(head_repo, source, output, retry_errors=True)
    assert rows.keys() == {"a.png", "b.png", "c.png", "d.png", "e.png"}
    assert rows["b.png"]["error"] is None
    np.testing.assert_allclose(rows["b.png"]["embedding"], rows["a.png"]["embedding"], rtol=0, atol=1e-5)
    assert rows["c.png"] == first["c.png"] and rows["a.png"] == first["a.png"]
    assert set(files_of(output)) > names and len(files_of(output)) == len(names) + 1


def test_limit_encodes_so_many_more(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    for count in (2, 4, 5):
        assert len(extract(head_repo, source, output, limit=2)) == count
    archive = write_images(tmp_path / "archives", {"a.tar": archive_of(list(IMAGES.items()))})
    for count in (2, 4, 5):
        assert len(extract(head_repo, archive, tmp_path / "out2", limit=2)) == count


def test_rows_per_file_and_flush(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    batches = {"patches_per_batch": 128, "max_patches": 128}
    extract(head_repo, source, tmp_path / "one", **batches)
    extract(head_repo, source, tmp_path / "rows", rows_per_file=2, **batches)
    extract(head_repo, source, tmp_path / "time", flush_minutes=1e-9, **batches)
    counts = [
        [pq.read_metadata(file).num_rows for file in (tmp_path / name).glob("*.parquet")]
        for name in ("one", "rows", "time")
    ]
    assert sorted(counts[0]) == [5] and sorted(counts[1]) == [1, 2, 2] and counts[2] == [1] * 5


def test_what_cannot_work_is_refused_before_anything_starts(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    plain = make_model_repo(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a model with a head"):
        extract(plain, source, output, pooling="head")
    (plain / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config"):
        extract(plain, source, output)
    with pytest.raises(ValueError, match="at most 4096 patches"):
        extract(head_repo, source, output, patches_per_batch=4095)
    with pytest.raises(ValueError, match="`--device` nonsense is not there"):
        extract(head_repo, source, output, device="nonsense")
    with pytest.raises(ValueError, match=r"`--model` \./none does not exist: give a folder that .* or a Hub id"):
        extract("./none", source, output)
    with pytest.raises(
        ValueError, match=r"alice/none is .* the Hub .* cannot be reached .* Check the connection, or give"
    ):
        extract("alice/none", source, output)
    with pytest.raises(ValueError, match="--revision is for sources on the Hub"):
        extract(head_repo, source, output, revision="main")
    (plain / "config.json").write_text('{"model_type": "aimv2_vision_model"}')
    with pytest.raises(ValueError, match=r"convert it first: python .*convert_weights\.py"):
        extract(plain, source, output)
    with pytest.raises(ValueError, match="cannot be opened: Protocol not known: nothing"):
        extract(head_repo, source, "nothing://there")
    assert not output.exists()

    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(ValueError, match="being written by another run"):
        extract(head_repo, source, output)
    extract(head_repo, source, output)
    (output / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet of `--output` .* cannot be read .*: delete it"):
        extract(head_repo, source, output)


def test_missing_weights_are_refused(head_repo: Path, tmp_path: Path) -> None:
    repo, source = copy_of(head_repo, tmp_path / "model"), write_images(tmp_path / "in")
    weights = load_file(repo / "model.safetensors")
    weights.pop("rms_norm.weight")
    save_file(weights, repo / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack"):
        extract(repo, source, tmp_path / "out")
    assert not rows_of(tmp_path / "out")


def test_everything_is_on_the_disk_before_it_has_its_name(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    """What a power cut leaves under the name of a file is that file: rows, rows done again, record and hashes."""
    monkeypatch.setattr(corpus_settings.constants, "HF_HOME", str(tmp_path / "home"))
    source, output = write_images(tmp_path / "in", {"a.png": GOOD, "b.png": BAD, "c.png": GOOD}), tmp_path / "out"
    forced: set[int] = set()
    published: list[Path] = []
    names_forced = 0

    def fsync(descriptor: int, real=os.fsync) -> None:
        nonlocal names_forced
        real(descriptor)
        forced.add(os.fstat(descriptor).st_ino)
        if os.path.samestat(os.fstat(descriptor), os.stat(output)):
            names_forced = len(published)

    def replace(before: str, after: str, real=os.replace) -> None:
        assert os.stat(before).st_ino in forced, after
        real(before, after)
        published.append(Path(after))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    extract(head_repo, source, output, rows_per_file=2)
    write_images(source, {"b.png": GOOD})
    extract(head_repo, source, output, retry_errors=True)
    assert {file.name for file in published} >= {".settings.json", *files_of(output)}
    assert any(file.is_relative_to(tmp_path / "home") for file in published)
    assert published[names_forced - 1].parent == output
    assert not any(file.parent == output for file in published[names_forced:])


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    first = file_hash(file)
    with monkeypatch.context() as patched:
        patched.setattr(corpus_settings.hashlib, "file_digest", lambda *_: pytest.fail("was hashed again"))
        assert file_hash(file) == first
    before = file.stat()
    # A file system's clock may stand still for milliseconds.
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(b"two")
    assert file_hash(file) != first


def test_settings_name_what_differs() -> None:
    settings = corpus_settings.Settings(
        weights="0" * 64,
        config={},
        processor={"a": 1},
        dtype="float32",
        pooling="mean",
        patch_features=None,
        image_column=None,
        id_column=None,
    )
    assert settings.differences(vars(settings)) == []
    other = {**vars(settings), "weights": "1" * 64, "processor": {"a": 2, "b": 3}}
    assert settings.differences(other) == [
        "weights is 000000000000, was 111111111111",
        "processor.a is 1, was 2",
        "processor.b is None, was 3",
    ]
