# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Options that have no meaning for a run are refused, before anything is done."""

import sys
from pathlib import Path

import pytest
from corpora import IMAGES, archive_of, extract, write_images

import extract_features
from corpus.output import Output


@pytest.mark.parametrize("option", ["image_column", "id_column"])
@pytest.mark.parametrize("kind", ["image", "archive"])
def test_columns_of_what_has_none(head_repo: Path, tmp_path: Path, option: str, kind: str) -> None:
    files = {"a.tar": archive_of(list(IMAGES.items()))} if kind == "archive" else IMAGES
    source = write_images(tmp_path / "in", files)
    message = f"`--{option.replace('_', '-')}` is for Parquet files and manifests, got files of kind {kind}"
    with pytest.raises(ValueError, match=message):
        extract(head_repo, source, tmp_path / "out", **{option: "key"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", [{"num_workers": 1}, {"address": "127.0.0.1:9"}])
@pytest.mark.parametrize("device", ["cuda:1", "meta"])
def test_one_device_on_ray(head_repo: Path, tmp_path: Path, where: dict, device: str) -> None:
    """Which has one for each worker."""
    with pytest.raises(ValueError, match=f"`--device` must be cuda or cpu with `--num-workers` .* got {device}"):
        extract(head_repo, write_images(tmp_path / "in"), tmp_path / "out", device=device, **where)
    assert not (tmp_path / "out").exists()


def test_a_gpu_where_the_cluster_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray = pytest.importorskip("corpus.on_ray")
    assert on_ray.gpus_of({"CPU": 4.0}, None) == on_ray.gpus_of({"CPU": 4.0, "GPU": 2.0}, "cpu") == 0
    assert on_ray.gpus_of({"CPU": 4.0, "GPU": 2.0}, None) == on_ray.gpus_of({"CPU": 4.0, "GPU": 2.0}, "cuda") == 2
    with pytest.raises(ValueError, match="`--device` cuda needs a GPU, and Ray has none"):
        on_ray.gpus_of({"CPU": 4.0}, "cuda")


def test_an_empty_path_is_no_working_folder(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a variable of the shell has no value."""
    source = write_images(tmp_path / "in")
    monkeypatch.chdir(source)
    for given, output, name in (
        ("", tmp_path / "out", "input"),
        (["0.png", ""], "out", "input"),
        ("0.png", "", "output"),
    ):
        with pytest.raises(ValueError, match=f"`--{name}` must be a folder, a file or a URL, got ''"):
            extract(head_repo, given, output)
    assert {file.name for file in source.iterdir()} == IMAGES.keys() and not (tmp_path / "out").exists()


def test_an_input_that_is_the_output_is_said(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in")
    for output in (source, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"what lies in `--output` {output} is no input"):
            extract(head_repo, source, output)
    assert {file.name for file in source.iterdir()} == IMAGES.keys()


def test_the_record_finds_the_model_from_any_folder(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    """A relative path would be another model there, or one of the Hub."""
    source = write_images(tmp_path / "in", {"0.png": IMAGES["0.png"]})
    monkeypatch.chdir(head_repo.parent)
    extract(head_repo.name, source, tmp_path / "out")
    record = Output(str(tmp_path / "out")).record()
    assert record is not None and record["begun"]["model"] == str(head_repo)


def test_an_object_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its package raises is no OSError."""
    exceptions = pytest.importorskip("botocore.exceptions")
    endpoint = "https://somebody:secret@store.example/x?token=secret"
    monkeypatch.setattr(sys, "argv", ["extract_features.py", "--output", "s3://bucket/out", "--status"])
    for error, text in (
        (exceptions.NoCredentialsError(), "Unable to locate credentials"),
        (exceptions.EndpointConnectionError(endpoint_url=endpoint), 'endpoint URL: "https://store.example/x"'),
    ):

        def fail(location: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("corpus.shards.status_lines", fail)
        with pytest.raises(SystemExit) as ended:
            extract_features.main()
        message = str(ended.value)
        assert (
            text in message and "check the URL, the credentials and the connection" in message and "\n" not in message
        )
