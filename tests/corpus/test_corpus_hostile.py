# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What somebody with bad intentions puts into an input, an output or a model's folder."""

import contextlib
import gzip
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import IMAGES, archive_of, command, copy_of, encoded_image, extract, rows_of, write_images
from PIL import Image
from reference import REPO
from test_corpus_archives import PNG, images_of

from corpus.inputs import corpus_of
from corpus.output import Output


FORMATS = ("PNG",)


@pytest.mark.parametrize("name", [".unfinished", "_unfinished"])
def test_nothing_is_removed_through_a_link(head_repo: Path, tmp_path: Path, name: str) -> None:
    other = write_images(tmp_path / "other", {"x/precious.txt": b"text", "y.txt": b"text"})
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output)
    (output / name).symlink_to(other)
    with pytest.raises(ValueError, match=f"{name} of `--output` .* is a symbolic link: remove it"):
        extract(head_repo, source, output)
    (output / name).unlink()
    (output / name).mkdir(exist_ok=True)
    (output / name / "linked").symlink_to(other)
    (output / name / "file.parquet").symlink_to(other / "y.txt")
    if name == "_unfinished":
        (output / ".settings.json").rename(output / "_settings.json")
    extract(head_repo, source, output)
    assert {str(file.relative_to(other)) for file in other.rglob("*")} == {"x", "x/precious.txt", "y.txt"}
    assert not (output / name).exists()


def test_a_run_that_is_refused_removes_nothing_of_others(head_repo: Path, tmp_path: Path) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    write_images(output / ".unfinished/deeper", {"x.txt": b"text"})
    with contextlib.suppress(OSError):
        extract(head_repo, source, output, pooling="mean")
    assert (output / ".unfinished/deeper/x.txt").exists()


def test_a_pickle_beside_other_weights_is_not_read(head_repo: Path, tmp_path: Path) -> None:
    """The weights that are hashed are those that are loaded."""
    repo, source = copy_of(head_repo, tmp_path / "model"), write_images(tmp_path / "in")
    torch.save({}, repo / "pytorch_model.bin")
    expected = extract(repo, source, tmp_path / "expected")
    (repo / "model.safetensors").rename(repo / "decoy.safetensors")
    with pytest.raises(ValueError, match=r"has no weights \(\.safetensors\): model\.safetensors is not there"):
        extract(repo, source, tmp_path / "out")
    shutil.copy(repo / "decoy.safetensors", repo / "model.safetensors")
    (repo / "decoy.safetensors").write_bytes(b"other")
    assert extract(repo, source, tmp_path / "expected") == expected
    index = {"weight_map": {"rms_norm.weight": "../decoy.safetensors"}}
    (repo / "model.safetensors").unlink()
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./decoy\.safetensors is not there"):
        extract(repo, source, tmp_path / "out")


@pytest.mark.parametrize("field", ["configuration_files", "transformers_weights", "adapter"])
def test_files_that_would_change_the_model_are_refused(head_repo: Path, tmp_path: Path, field: str) -> None:
    repo, source = copy_of(head_repo, tmp_path / "model"), write_images(tmp_path / "in")
    if field == "adapter":
        (repo / "adapter_config.json").write_text("{}")
        message = "holds an adapter"
    else:
        config = json.loads((repo / "config.json").read_text())
        config[field] = ["config.5.0.0.json"] if field == "configuration_files" else "other.safetensors"
        (repo / "config.json").write_text(json.dumps(config))
        message = f"names other files to read in config.json \\({field}\\)"
    with pytest.raises(ValueError, match=message):
        extract(repo, source, tmp_path / "out")


def test_large_files_are_errors_and_the_others_are_read(head_repo: Path, tmp_path: Path) -> None:
    large = encoded_image(400, 400)
    source = write_images(tmp_path / "in", {"a.png": IMAGES["0.png"], "b.png": large, "c": large})
    rows = extract(head_repo, source, tmp_path / "out", max_image_bytes=10**5)
    assert {id_: row["error"] for id_, row in rows.items()} == {
        "a.png": None,
        "b.png": "ValueError: the file is larger than --max-image-bytes",
        "c": "ValueError: the file is larger than --max-image-bytes",
    }
    rows = extract(head_repo, source, tmp_path / "out", retry_errors=True)
    assert not any(row["error"] for row in rows.values())
    images = [("a.png", IMAGES["0.png"]), ("b.png", large), ("c", large), ("d.png", IMAGES["0.png"])]
    archive = write_images(tmp_path / "archive", {"x.tar": archive_of(images)})
    rows = extract(head_repo, archive, tmp_path / "out2", max_image_bytes=10**5)
    assert {id_ for id_, row in rows.items() if row["error"]} == {"x.tar/b.png", "x.tar/c"} and len(rows) == 4


def test_images_of_many_pixels_are_errors(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"a.png": encoded_image(100, 100), "b.png": encoded_image(100, 101)})
    rows = extract(head_repo, source, tmp_path / "out", max_image_pixels=10_000)
    assert {id_: row["error"] for id_, row in rows.items()} == {
        "a.png": None,
        "b.png": "ValueError: the image has more pixels than --max-image-pixels",
    }


def sparse_member(size: int) -> bytes:
    """A member of one block that says to be `size` bytes of nothing, as GNU tar writes it."""
    member = tarfile.TarInfo("a.png")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % size, b"%011o\0" % 0
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_headers_that_expand_are_errors() -> None:
    images = images_of(sparse_member(3 * 2**30) + archive_of([("b.png", PNG)]))
    assert images["x.tar/a.png"].error == "ValueError: the file is larger than --max-image-bytes"
    assert images["x.tar/b.png"].data == PNG and len(images) == 2
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        member = tarfile.TarInfo("a")
        member.type, member.size = kind, 2**33
        images = images_of(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**16))
        assert images.keys() == {"x.tar"} and "larger than any name" in str(images["x.tar"].error)


def test_a_folder_is_walked_once(tmp_path: Path) -> None:
    """Two links at each level would double the walk with each: 2 ** 40 folders."""
    folder = tmp_path / "in/0"
    for level in range(40):
        folder.mkdir(parents=True)
        for name in "ab":
            (tmp_path / f"in/{name}{level}").symlink_to(folder)
        folder = folder / str(level + 1)
        for name in "ab":
            (folder.parent / name).symlink_to(folder)
    write_images(folder, {"a.png": b""})
    corpus = corpus_of((str(tmp_path / "in"),), "nowhere", FORMATS)
    assert [part.name for part in corpus.parts] == ["/".join(map(str, range(41))) + "/a.png"]
    assert len(corpus.skipped) == 160
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("one", "two"):
        (linked / name).symlink_to(folder)
    corpus = corpus_of((str(linked),), "nowhere", FORMATS)
    assert [part.name for part in corpus.parts] == ["one/a.png"]
    assert corpus.skipped == [("two", "a folder that is read by another name")]


def test_deep_folders(tmp_path: Path) -> None:
    start = os.getcwd()
    source = tmp_path / "in"
    source.mkdir()
    try:
        os.chdir(source)
        for _ in range(1100):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").write_bytes(b"")
    finally:
        os.chdir(start)
    parts = corpus_of((str(source),), "nowhere", FORMATS).parts
    # Python's own recursion does not get that deep.
    subprocess.run(["rm", "-r", str(source)], check=True)
    assert [part.name for part in parts] == ["d/" * 1100 + "a.png"]


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    write_images(tmp_path, {"a.png": b""})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    corpus = corpus_of((str(tmp_path),), "nowhere", FORMATS)
    assert [part.name for part in corpus.parts] == ["a.png"] and corpus.skipped[0][0] == "loop"


def test_names_forge_no_lines(head_repo: Path, tmp_path: Path, capsys) -> None:
    forged = {"a\nb.png\tsafe": b"x", "c\x1b[2Jd.txt": b"x", "e\nf.png": b"no image", "é.txt": b"x"}
    source, output = write_images(tmp_path / "in", {"ok.png": IMAGES["0.png"], **forged}), tmp_path / "out"
    rows = extract(head_repo, source, output)
    assert rows.keys() == {"ok.png", "e\nf.png"}
    lines = (output / ".skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["'a\\nb.png\\tsafe'", "'c\\x1b[2Jd.txt'", "é.txt"]
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "'e\\nf.png'" in printed and "e\nf.png" not in printed


@pytest.mark.parametrize(
    "content",
    [b"[]", b"1", b"{", b"\xff", b'{"weights": "a"}', b'{"weights": "a", "begun": {"model": "a"}}', b"[" * 10**5],
)
def test_records_that_are_none(head_repo: Path, tmp_path: Path, content: bytes) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output)
    (output / ".settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.settings\.json of `--output` .* is not what this command writes"):
        extract(head_repo, source, output)


@pytest.mark.parametrize("name", [".settings.json", ".inputs", "x.parquet"])
def test_pipes_in_an_output_do_not_block(head_repo: Path, tmp_path: Path, name: str) -> None:
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    extract(head_repo, source, output)
    (output / name).unlink(missing_ok=True)
    os.mkfifo(output / name)
    with pytest.raises(ValueError, match="no regular file"):
        extract(head_repo, source, output)


def test_an_output_below_the_input_through_a_link(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "real")
    (tmp_path / "linked").symlink_to(source)
    for given, output in (("linked", "real/out"), ("real", "linked/out"), ("linked", "linked/out")):
        for _ in range(2):
            assert extract(head_repo, tmp_path / given, tmp_path / output).keys() == IMAGES.keys()
        assert extract(head_repo, f"{tmp_path / given}/**", tmp_path / output).keys() == IMAGES.keys()
        shutil.rmtree(source / "out")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Files for whoever has the token, as object stores give them by presigned URLs."""
    folder = tmp_path / "served"
    write_images(folder, {"x.tar": archive_of(list(IMAGES.items())), "a.png": IMAGES["0.png"]})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "X-Amz-Signature=TOKEN" not in self.path:
                self.send_error(403)
            else:
                super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    handler = lambda *arguments: Handler(*arguments, directory=str(folder))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://user:PASSWORD@127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_presigned_urls(head_repo: Path, tmp_path: Path, server: str, capsys) -> None:
    query = "?X-Amz-Date=1&X-Amz-Signature=TOKEN"
    output = tmp_path / "out"
    for _ in range(2):
        rows = extract(head_repo, f"{server}/x.tar{query}", output)
        assert rows.keys() == {f"x.tar/{name}" for name in IMAGES}
    assert extract(head_repo, f"{server}/a.png{query}", tmp_path / "one").keys() == {"a.png"}
    with pytest.raises(FileNotFoundError) as missing:
        extract(head_repo, f"{server}/gone.tar{query}", output)
    printed = capsys.readouterr()
    written = b"".join(file.read_bytes() for file in output.iterdir() if file.is_file())
    for text in (printed.out, printed.err, written.decode("latin-1"), str(missing.value)):
        assert "TOKEN" not in text and "PASSWORD" not in text


def test_a_secret_in_the_address_of_the_output(tmp_path: Path) -> None:
    output = Output("memory://user:PASSWORD@store/out?token=TOKEN")
    assert output.shown == "memory://store/out"


def peak_memory(repo: Path, source: Path, output: Path, *options: object) -> int:
    """Bytes of the largest process of a command, which must end well."""
    arguments = command(repo, source, output, *options)
    run = subprocess.Popen([sys.executable, str(REPO / "extract_features.py"), *map(str, arguments)])
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0
    return usage.ru_maxrss * 1024


def test_bombs_take_no_memory(head_repo: Path, tmp_path: Path) -> None:
    """Files of a few bytes that expand to gigabytes, at the default limits."""
    ordinary = peak_memory(head_repo, write_images(tmp_path / "ordinary"), tmp_path / "out")
    good = archive_of([("good.png", IMAGES["0.png"])])
    member = tarfile.TarInfo("a.png")
    member.size = 2**31
    # A gzip file may be of several, one after the other.
    compressed = gzip.compress(member.tobuf()) + 2**7 * gzip.compress(bytes(2**24)) + gzip.compress(good)
    archives = {"sparse.tar": sparse_member(3 * 2**30) + good, "x.tar.gz": compressed}
    picture = io.BytesIO()
    Image.fromarray(np.zeros((13_300, 13_400), np.uint8)).save(picture, "png")
    tables = tmp_path / "tables"
    tables.mkdir()
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 64), pa.array([bytes(27_000_000)]))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "store_schema": False}
    pq.write_table(pa.table({"image": values}), tables / "a.parquet", **options)
    del values
    assert (tables / "a.parquet").stat().st_size < 5000
    for source in (
        write_images(tmp_path / "archives", archives),
        write_images(tmp_path / "pictures", {"a.png": picture.getvalue()}),
        tables,
    ):
        output = tmp_path / f"{source.name}-out"
        assert peak_memory(head_repo, source, output) < ordinary + 2**30
        rows = rows_of(output)
        assert {id_ for id_, row in rows.items() if not row["error"]} == (
            {"sparse.tar/good.png", "x.tar.gz/good.png"} if source.name == "archives" else set()
        )
