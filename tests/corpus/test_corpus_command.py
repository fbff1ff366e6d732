# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the command says, and how it ends: one line for each thing that goes wrong, and never a traceback."""

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import IMAGES, copy_of, extract, rows_of, write_images
from reference import REPO

import extract_features
from corpus import in_process
from corpus.inputs import InputError
from corpus.output import Output
from corpus.shards import status_lines
from corpus.stages import Batch, Encoder, Preparer


# One image a batch.
BATCHES = {"patches_per_batch": 128, "max_patches": 128}


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str | int | None:
    """The message or the status that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        extract_features.main()
    return ended.value.code


@pytest.fixture
def arguments(head_repo: Path, tmp_path: Path) -> list[object]:
    return ["--model", head_repo, "--input", write_images(tmp_path / "in"), "--output", tmp_path / "out"]


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_help_needs_no_package_and_a_run_names_the_missing_one(package: str, arguments: list[object]) -> None:
    code = (
        "import runpy, sys; sys.modules[sys.argv.pop(1)] = None; sys.path.insert(0, sys.argv[1]);"
        "sys.argv = ['extract_features.py', *sys.argv[2:]];"
        "runpy.run_path(f'{sys.path[0]}/extract_features.py', run_name='__main__')"
    )
    for options in (["--help"], [*arguments, "--num-workers", "1"]):
        command = [sys.executable, "-c", code, package, str(REPO), *map(str, options)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if options == ["--help"]:
            assert result.returncode == 0 and "--retry-errors" in result.stdout
        else:
            line = f"extract_features.py: {package} is not installed: pip install -r requirements-scale.txt\n"
            assert (result.returncode, result.stderr) == (1, line)


def test_impossible_numbers_are_refused(arguments: list[object], monkeypatch, capsys) -> None:
    for option, value in (("--num-workers", "0"), ("--limit", "-1"), ("--flush-minutes", "nan")):
        assert main(monkeypatch, *arguments, option, value) == 2
        assert f"argument {option}: must be" in capsys.readouterr().err


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, stop) -> None:
    """Calls `stop` when batch `number` is to be encoded."""
    encode, batches = Encoder.encode, []

    def stopping(self: Encoder, batch: Batch):
        batches.append(batch)
        if len(batches) == number:
            stop()
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "encode", stopping)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_what_is_encoded(arguments: list[object], number: int, monkeypatch, capsys) -> None:
    options = [*arguments, "--patches-per-batch", "128", "--max-patches", "128"]
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: os.kill(os.getpid(), number))
        assert main(patch, *options) == 130
    assert signal.getsignal(number) == handler
    assert "interrupted. What is encoded is written. Run the same command again to resume." in capsys.readouterr().err
    output = Path(str(arguments[-1]))
    assert len(rows_of(output)) == 3 and not (output / ".unfinished").exists()
    assert extract(arguments[1], arguments[3], output, **BATCHES).keys() == IMAGES.keys()


def test_interruption_waits_for_a_file_to_be_published(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    source = write_images(tmp_path / "in")
    publish = Output.publish

    def interrupted(self: Output, name: str, retried: dict[str, str]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        publish(self, name, retried)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(head_repo, source, tmp_path / "out", rows_per_file=2, **BATCHES)
    assert len(rows_of(tmp_path / "out")) == 2
    assert extract(head_repo, source, tmp_path / "out", **BATCHES).keys() == IMAGES.keys()


def test_a_killed_decoder_ends_the_run_and_loses_nothing(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    images = {f"{copy}/{name}": data for copy in range(20) for name, data in IMAGES.items()}
    source = write_images(tmp_path / "in", images)

    def kill_a_decoder() -> None:
        # No other children: a tracker of resources, say.
        for process in multiprocessing.active_children():
            process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "decoders", lambda device: 2)
        stop_at(patch, 5, kill_a_decoder)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            extract(head_repo, source, tmp_path / "out", **BATCHES)
        assert len(rows_of(tmp_path / "out")) < len(images)
        assert extract(head_repo, source, tmp_path / "out", **BATCHES).keys() == images.keys()


def test_a_full_disk_is_one_line(arguments: list[object], monkeypatch) -> None:
    def full(self: Output, *_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", full)
        assert str(main(patch, *arguments)).startswith(
            "extract_features.py: [Errno 28] No space left on device - free some space, or choose another disk."
        )
    output = Path(str(arguments[-1]))
    assert {file.name for file in output.iterdir()} <= {".settings.json", ".inputs", ".lock"}
    assert extract(arguments[1], arguments[3], output).keys() == IMAGES.keys()


def test_too_little_memory_is_one_line_and_what_is_encoded_is_written(arguments: list[object], monkeypatch) -> None:
    def exhausted() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        stop_at(patch, 4, exhausted)
        options = [*arguments, "--patches-per-batch", "128", "--max-patches", "128"]
        assert main(patch, *options) == "extract_features.py: not enough memory"
    assert len(rows_of(arguments[-1])) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_input_that_vanishes_is_no_error_of_its_images(
    head_repo: Path, tmp_path: Path, workers: int, monkeypatch
) -> None:
    images = {f"{index:03}.png": data for index, data in enumerate([*IMAGES.values()] * 20)}
    source, output = write_images(tmp_path / "in", images), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(in_process, "decoders", lambda device: workers)
        stop_at(patch, 3, lambda: source.rename(tmp_path / "elsewhere"))
        with pytest.raises(InputError, match=r"`--input` .* can no longer be read"):
            extract(head_repo, source, output, **BATCHES)
    assert 0 < len(rows_of(output)) < len(images)
    (tmp_path / "elsewhere").rename(source)
    rows = extract(head_repo, source, output, **BATCHES)
    assert rows.keys() == images.keys() and not any(row["error"] for row in rows.values())


def test_an_output_that_cannot_be_written_is_one_line(arguments: list[object], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    message = main(monkeypatch, *arguments[:-1], tmp_path / "file/out")
    assert isinstance(message, str) and "Not a directory" in message and "\n" not in message


def test_an_object_store_whose_package_is_missing_is_one_line(arguments: list[object], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = main(monkeypatch, *arguments[:-1], "gs://bucket/out")
    assert (
        message
        == "extract_features.py: gs://bucket/out cannot be opened: Please install gcsfs to access Google Storage"
    )


def test_a_wrong_address_is_one_line(arguments: list[object], monkeypatch) -> None:
    pytest.importorskip("ray", reason="needs requirements-scale.txt")
    # Held without listening, so that no other process takes the port.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        message = main(monkeypatch, *arguments, "--address", address)
    assert message == f"extract_features.py: Nothing answers at `--address` {address} (Connection refused)."


def test_a_model_on_the_hub_is_held_by_its_commit(head_repo: Path, tmp_path: Path) -> None:
    paths = [REPO, REPO / "tests", REPO / "tests/corpus"]
    result = subprocess.run(
        [sys.executable, str(REPO / "tests/corpus/model_on_the_hub.py"), str(head_repo), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_summary_names_kinds_of_errors_and_skipped_files(head_repo: Path, tmp_path: Path, capsys) -> None:
    junk = {f"{index}.jpg": b"junk" * index for index in range(1, 6)}
    source = write_images(tmp_path / "in", {**IMAGES, **junk, "empty.png": b"", "notes.txt": b"x", "more": b"y"})
    extract(head_repo, source, tmp_path / "out")
    printed = capsys.readouterr()
    assert "6 could not be read or decoded" in printed.out and "1.jpg, 2.jpg, 3.jpg, ..." in printed.out
    assert "2 files of the input were skipped" in printed.out and "more, notes.txt" in printed.out
    assert "11/11 images" in printed.err


@pytest.mark.parametrize("listener", ["of ASCII", "that has left", "on a full disk"])
def test_what_cannot_be_said_changes_nothing_that_is_done(head_repo: Path, tmp_path: Path, listener: str) -> None:
    source, output = write_images(tmp_path / "in", {**IMAGES, "é.png": b"junk"}), tmp_path / "out"
    shard = ["--num-shards", "1", "--shard-index", "0"]
    arguments = ["--model", head_repo, "--input", source, "--output", output, *shard]
    reading, writing = os.pipe()
    if listener == "on a full disk":
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    if listener != "of ASCII":
        os.close(reading)
    process = subprocess.Popen(
        [sys.executable, str(REPO / "extract_features.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert process.communicate()[1].splitlines() == [b"100% 6/6 images, 1 errors"] and process.returncode == 0
    if listener == "of ASCII":
        with open(reading, "rb") as printed:
            assert b": \\xe9.png" in printed.read()
    assert rows_of(output / "shard=0-of-1").keys() == {*IMAGES, "é.png"}
    assert "1 complete" in status_lines(str(output))[0]


def test_preparer_and_encoder_check_their_model(head_repo: Path, tmp_path: Path, monkeypatch) -> None:
    """As a worker does whose folder of that path is another."""
    repo, source = copy_of(head_repo, tmp_path / "model"), write_images(tmp_path / "in")
    jobs = []
    with monkeypatch.context() as patch:
        patch.setattr(in_process, "encode", lambda job, *_: jobs.append(job))
        with pytest.raises(RuntimeError, match="5 images of the input have no row"):
            extract(repo, source, tmp_path / "out")
    config = (repo / "preprocessor_config.json").read_text()
    (repo / "preprocessor_config.json").write_text(config.replace("4096", "200"))
    with pytest.raises(ValueError, match="A worker found a model whose processor"):
        Preparer(jobs[0])
    weights = (repo / "model.safetensors").read_bytes()
    (repo / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="A worker found a model whose weights"):
        Encoder(jobs[0], "cpu")
    shutil.rmtree(repo)


def test_what_a_worker_raises_is_one_line() -> None:
    ray = pytest.importorskip("ray", reason="needs requirements-scale.txt")
    from corpus.on_ray import plain

    cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = ray.exceptions.RayTaskError("write", "Traceback ...\n  File ...", cause)
    assert str(plain(error)) == "[Errno 28] No space left on device"
    advised = ray.exceptions.RayTaskError("read", "Traceback ...", InputError("It is gone.\nFailed after 1 attempt."))
    assert str(plain(advised)) == "It is gone."
