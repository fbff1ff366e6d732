# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Every file of the input is a row, or in the list of those that were skipped."""

import io
import os
from pathlib import Path

import pytest
from corpora import IMAGES, archive_of, encoded_image, extract, write_images
from PIL import Image

from corpus import in_process
from corpus.inputs import corpus_of


FORMATS = ("JPEG", "PNG", "TIFF")


def listed(source: object, output: object = "nowhere") -> tuple[str, list[str], dict[str, str]]:
    sources = source if isinstance(source, list) else [source]
    corpus = corpus_of(tuple(map(str, sources)), str(output), FORMATS)
    return corpus.kind, [part.name for part in corpus.parts], dict(corpus.skipped)


def test_input_is_listed_below_its_root(tmp_path: Path) -> None:
    write_images(tmp_path, {"x/a.PNG": b"", "x/y/b.jpeg": b"", "notes.txt": b"notes"})
    expected = ("image", ["x/a.PNG", "x/y/b.jpeg"], {"notes.txt": "none of JPEG, PNG, TIFF"})
    assert listed(tmp_path) == listed(f"file://{tmp_path}/") == expected
    assert listed(f"{tmp_path}/**")[:2] == expected[:2]
    assert listed(f"{tmp_path}/x/y/*.jpeg")[1] == ["b.jpeg"]
    assert listed(f"{tmp_path}/x/*")[1:] == (["a.PNG"], {"y": "a folder: give it as an input, or ** in the pattern"})
    assert listed(tmp_path / "x/a.PNG")[1] == ["a.PNG"]
    for nothing in ("none/*.jpg", "notes.txt"):
        with pytest.raises(FileNotFoundError, match="must hold images"):
            listed(tmp_path / nothing)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        listed(tmp_path / "none")
    (tmp_path / "more.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="one kind of file, got 1 archive, 2 image files"):
        listed(tmp_path)


def test_names_do_not_decide(tmp_path: Path) -> None:
    jpeg = encoded_image(20, 20, form="jpeg")
    files = {"a.jfif": jpeg, "b": jpeg, "c.heic": jpeg, "d.JPG_large": jpeg, "a[1].jpg": jpeg}
    other = {"e.heic": b"\0\0\0\x18ftypheic", "f.eps": b"%!PS-Adobe-3.0", "empty": b""}
    kind, names, skipped = listed(write_images(tmp_path, files | other))
    assert (kind, set(names), set(skipped)) == ("image", set(files), set(other))
    assert skipped["empty"] == "empty"


def test_eps_is_never_opened(head_repo: Path, tmp_path: Path) -> None:
    file = tmp_path / "in/a.png"
    file.parent.mkdir()
    Image.new("RGB", (30, 30)).save(file, "eps")
    assert "holds no image of the formats" in extract(head_repo, file.parent, tmp_path / "out")["a.png"]["error"]


def test_symbolic_links_are_followed_and_cycles_are_not(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"a/x.png": b""})
    write_images(tmp_path / "elsewhere", {"y.png": b""})
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "a/up").symlink_to(source)
    (source / "gone.png").symlink_to(tmp_path / "nowhere")
    (source / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.png")
    kind, names, skipped = listed(source)
    assert (kind, names) == ("image", ["a/x.png", "gone.png", "linked/y.png"])
    assert skipped == {
        "a/up": "a symbolic link to a folder above it",
        "gone": "cannot be read: No such file or directory",
        "pipe.png": "no regular file",
    }


def test_several_inputs_make_one_corpus(head_repo: Path, tmp_path: Path) -> None:
    first = write_images(tmp_path / "first", {"0.png": IMAGES["0.png"]})
    second = write_images(tmp_path / "second", {"x/1.png": IMAGES["1.png"]})
    assert extract(head_repo, [first, second], tmp_path / "out").keys() == {"0.png", "x/1.png"}
    write_images(second, {"0.png": IMAGES["2.png"]})
    with pytest.raises(ValueError, match=r"'0\.png' comes twice"):
        extract(head_repo, [first, second], tmp_path / "out")


def test_output_below_the_input_is_no_input(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path)
    for _ in range(2):
        assert extract(head_repo, source, source / "features").keys() == IMAGES.keys()


def test_unreadable_files_and_odd_names(head_repo: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", {"caf\udce9 \n.png": IMAGES["0.png"], "*.png": IMAGES["1.png"]})
    (source / "gone.png").symlink_to(tmp_path / "nowhere")
    rows = extract(head_repo, source, tmp_path / "out")
    assert rows.keys() == {"gone.png", "caf\\xe9 \n.png", "*.png"}
    assert rows["gone.png"]["error"] == "FileNotFoundError: No such file or directory"
    assert rows["caf\\xe9 \n.png"]["error"] is None and rows["*.png"]["error"] is None


def test_every_file_is_a_row_or_skipped(head_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all formats that PIL writes, under right and wrong names."""
    Image.init()
    # Saving as SPIDER makes the file's suffix one of that format.
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    source = tmp_path / "in"
    source.mkdir()
    for form in sorted(Image.SAVE):
        for name in (f"{form}.{form.lower()}", f"{form}.jpg", f"{form}"):
            try:
                Image.new("RGB", (24, 24), (200, 100, 50)).save(source / name, form)
            except Exception:
                (source / name).unlink(missing_ok=True)
                break
    files = {file.name for file in source.iterdir()}
    rows = extract(head_repo, source, tmp_path / "out")
    skipped = {line.split("\t")[0] for line in (tmp_path / "out/.skipped.txt").read_text().splitlines()}
    assert rows.keys() | skipped == files and not rows.keys() & skipped
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        for name in (f"{form}.{form.lower()}", f"{form}.jpg", form):
            assert rows[name]["error"] is None
    assert rows["EPS.jpg"]["error"] and {"EPS", "EPS.eps"} <= skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_heic_is_read_where_its_plugin_is(head_repo: Path, tmp_path: Path, workers: int, monkeypatch) -> None:
    """By its name and by its first bytes, in this process and in those that decode."""
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (60, 40), "teal")).save(file)
    monkeypatch.setattr(in_process, "decoders", lambda device: workers)
    members = {"a.heic": file.getvalue(), "b": file.getvalue(), "c.png": IMAGES["0.png"]}
    assert not any(
        row["error"] for row in extract(head_repo, write_images(tmp_path / "in", members), tmp_path / "out").values()
    )
    source = write_images(tmp_path / "archives", {"x.tar": archive_of(list(members.items()))})
    rows = extract(head_repo, source, tmp_path / "out2")
    assert len(rows) == 3 and not any(row["error"] for row in rows.values())
