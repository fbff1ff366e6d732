# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
A conversion that is killed, runs out of disk or meets an error leaves either the finished repo or what was there.

Both kinds of kill are run in full with AIMV2_PACKING_KILLS=100: so many at random moments, and one at every single
file-system operation, which takes `--timeout 0` too; by default a few of each.
"""

import errno
import fcntl
import filecmp
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import checkpoints
import pytest
import torch
from reference import REPO, reference_model

import conversion.model_card
import conversion.model_repo
from conversion import atomic_folder
from convert_weights import parse_arguments, run


KILLS = int(os.environ.get("AIMV2_PACKING_KILLS", "0"))
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def convert(source: Path, output: Path, *arguments: str) -> None:
    run(parse_arguments([str(source), str(output), *arguments]))


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """Cards name the clone's commit, which may change while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion.model_card, "origin", lambda: "commit 1 of a clone")
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two checkpoints of one shape, large enough for a conversion to be killed inside it."""
    folder = tmp_path_factory.mktemp("sources")
    paths = []
    for index in range(2):
        model = reference_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=4 + index)
        tensors, config = checkpoints.apple(model), checkpoints.apple_config(model)
        paths.append(checkpoints.save(folder / f"source{index}", tensors, config))
    return paths


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> list[Path]:
    """What each checkpoint becomes."""
    folder = tmp_path_factory.mktemp("finished")
    for index, source in enumerate(sources):
        convert(source, folder / f"{index}" / "out", "--max-shard-size", "5MB")
    return [folder / "0" / "out", folder / "1" / "out"]


def same(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    if names != sorted(path.name for path in second.iterdir()):
        return False
    return filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


def run_in_child(action: Callable[[], None], kill_after: float | None = None) -> int:
    """Runs `action` in a forked process, kills that after so many seconds, and returns its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            # Threads of the parent do not exist here, nor may pytest's output be written twice.
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            action()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_after_kill(source: Path, output: Path, before: Path | None, after: Path) -> None:
    """The output is whole, old or new; the next run works and leaves nothing else behind."""
    if before is not None or output.exists():
        assert same(output, after) or (before is not None and same(output, before))
    convert(source, output, "--max-shard-size", "5MB", "--overwrite")
    assert same(output, after)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_file_system_operations(tmp_path, sources, finished, overwrite, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic_folder, "exchange", lambda first, second: False)
    output = tmp_path / "parent" / "out"
    output.parent.mkdir()
    fate = {"killed": 0, "old": 0, "new": 0, "none": 0}

    def killed_at(operation: int) -> None:
        left = operation

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in FILE_EVENTS and str(output) in str(arguments).replace(".out", "out"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        convert(sources[1], output, "--max-shard-size", "5MB", "--overwrite")

    operation, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        if overwrite:
            convert(sources[0], output, "--max-shard-size", "5MB", "--overwrite")
        status = run_in_child(partial(killed_at, operation))
        if status == -signal.SIGKILL:
            fate["killed"] += 1
            fate["none" if not output.exists() else "new" if same(output, finished[1]) else "old"] += 1
        if overwrite and not exchange and not output.exists():
            # Between two renames the old repo stands beside its place, until the next run puts it back.
            assert same(output.with_name(".out.previous"), finished[0])
        check_after_kill(sources[1], output, finished[0] if overwrite and output.exists() else None, finished[1])
        if not overwrite:
            shutil.rmtree(output)
        operation += 1 if KILLS else 7
    assert status == 0
    assert fate["killed"] >= (30 if KILLS else 5)
    print(fate)


def test_killed_at_random_moments(tmp_path, sources, finished):
    output = tmp_path / "parent" / "out"
    output.parent.mkdir()
    draw = random.Random(0)

    def action() -> None:
        convert(sources[1], output, "--max-shard-size", "5MB", "--overwrite")

    start = time.perf_counter()
    assert run_in_child(action) == 0
    duration = time.perf_counter() - start
    killed = 0
    while killed < (KILLS or 4):
        convert(sources[0], output, "--max-shard-size", "5MB", "--overwrite")
        if run_in_child(action, kill_after=draw.uniform(0, duration)) == -signal.SIGKILL:
            killed += 1
        else:
            # It was faster than the first, which a busy machine had slowed down.
            duration *= 0.9
        check_after_kill(sources[1], output, finished[0], finished[1])
    print(f"{killed} killed")


def test_existing_output_is_not_touched(tmp_path, sources, finished):
    output = tmp_path / "out"
    convert(sources[0], output, "--max-shard-size", "5MB")
    with pytest.raises(FileExistsError, match=r"out exists. Choose another folder, or replace it with --overwrite"):
        convert(sources[1], output)
    assert same(output, finished[0])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_overwrite_replaces_conversions_only(tmp_path, sources, existing):
    output = tmp_path / "out"
    if existing == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out is no converted model repo: --overwrite does not replace it"):
        convert(sources[0], output, "--overwrite")
    with pytest.raises(FileExistsError):
        convert(sources[0], output)
    assert os.listdir(tmp_path) == ["out"]
    assert existing != "folder" or (output / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_empty_folder_is_filled(tmp_path, sources, finished, arguments):
    (tmp_path / "out").mkdir()
    convert(sources[0], tmp_path / "out", "--max-shard-size", "5MB", *arguments)
    assert same(tmp_path / "out", finished[0])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_output_that_holds_the_source(tmp_path, sources, finished, place, monkeypatch):
    source = tmp_path / "a" / "out"
    convert(sources[0], source, "--max-shard-size", "5MB")
    monkeypatch.chdir(source)
    with pytest.raises(ValueError, match="holds the source"):
        convert(source, Path(place), "--overwrite")
    assert same(source, finished[0])


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk(tmp_path, sources, finished, overwrite):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    output = tmp_path / "out"
    if overwrite:
        convert(sources[0], output, "--max-shard-size", "5MB")

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        try:
            convert(sources[1], output, "--overwrite")
        except OSError as error:
            assert "File too large" in str(error)
            os._exit(7)

    assert run_in_child(action) == 7
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or same(output, finished[0])


def test_disk_that_is_too_small_is_noticed_before_writing(tmp_path, sources, monkeypatch):
    usage = conversion.model_repo.shutil.disk_usage(tmp_path)._replace(free=12_300)
    monkeypatch.setattr(conversion.model_repo.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(conversion.model_repo, "write_checkpoint", None)
    with pytest.raises(ValueError, match=r"out needs 17\.4MB, but only 12\.3kB are free there: free some space"):
        convert(sources[0], tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_errors_leave_nothing(tmp_path, sources, monkeypatch, error):
    def fail(*arguments) -> None:
        raise error

    monkeypatch.setattr(conversion.model_repo, "write_card", fail)
    with pytest.raises(error):
        convert(sources[0], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_interrupt_between_two_renames_restores(tmp_path, sources, finished, monkeypatch):
    output = tmp_path / "out"
    convert(sources[0], output, "--max-shard-size", "5MB")

    def interrupted(work: Path, target: Path, previous: Path) -> None:
        target.rename(previous)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_folder, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(sources[1], output, "--overwrite")
    assert os.listdir(tmp_path) == ["out"]
    assert same(output, finished[0])


def test_two_processes_do_not_share_an_output(tmp_path, sources, finished):
    with atomic_folder.atomic_folder(tmp_path / "out", overwrite=False) as work:
        with pytest.raises(BlockingIOError, match="is being made by another process"):
            convert(sources[0], tmp_path / "out")
        assert work.is_dir()
        (work / "done").write_text("")
    assert os.listdir(tmp_path / "out") == ["done"]
    assert os.listdir(tmp_path) == ["out"]


def test_locks_as_nfs_gives_them(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock on a descriptor that may not write."""
    flock = fcntl.flock

    def flock_on_nfs(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_on_nfs)
    with atomic_folder.atomic_folder(tmp_path / "out", overwrite=False):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_without_fcntl(tmp_path):
    """As on Windows and some other systems."""
    code = """
        import sys
        sys.modules["fcntl"] = None
        from pathlib import Path
        from conversion.atomic_folder import atomic_folder

        with atomic_folder(Path("out"), overwrite=False):
            try:
                with atomic_folder(Path("out"), overwrite=False):
                    pass
            except BlockingIOError:
                print("locked")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=False
    )
    assert result.stdout == "locked\n", result.stderr
    assert os.listdir(tmp_path) == ["out"]


def test_output_through_a_link_and_into_new_folders(tmp_path, sources, finished):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(sources[0], tmp_path / "link", "--max-shard-size", "5MB")
    assert (tmp_path / "link").is_symlink() and not same(tmp_path / "real", finished[1])
    convert(sources[0], tmp_path / "a" / "b" / "out", "--max-shard-size", "5MB")
    assert same(tmp_path / "a" / "b" / "out", finished[0])
