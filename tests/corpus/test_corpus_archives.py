# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Damaged archives: each image is a row of its own bytes, or its archive has an error.

`AIMV2_PACKING_ARCHIVES=10000` mutates more of them.
"""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from corpora import IMAGES, archive_of, extract, write_images

from corpus.inputs import Part
from corpus.readers import read
from corpus.rows import IMAGE_SCHEMA, Image
from corpus.settings import Job
from corpus.tasks import read_stage


ARCHIVES = int(os.environ.get("AIMV2_PACKING_ARCHIVES", "300"))
PNG = b"\x89PNG\r\n\x1a\n"
SIZES = (100, 512, 1500, 40)
FOUR = {f"{name}.png": PNG + bytes([index]) * SIZES[index] for index, name in enumerate("abcd")}


def job_of(folder: Path | str, **options) -> Job:
    fields = {"max_image_bytes": 2**20, "max_image_pixels": 10**6, "image_formats": ("PNG",), "settings": None}
    return Job(
        model="",
        revision=None,
        inputs=(str(folder),),
        max_patches=None,
        image_size=None,
        patches_per_batch=1,
        **{**fields, **options},  # type: ignore[arg-type]
    )


def images_of(data: bytes, **options) -> dict[str, Image]:
    """The images of an archive by their ids, of which none comes twice."""
    fsspec.filesystem("memory").pipe("/archives/x.tar", data)
    job = job_of("memory://archives", **options)
    found = list(read([Part(0, "/archives/x.tar", "x.tar")], "archive", job, ()))
    by_id = {image.id: image for image in found}
    assert len(by_id) == len(found)
    return by_id


def assert_nothing_is_lost(images: dict[str, Image], members: dict[str, bytes]) -> None:
    """Each image holds the bytes of a member, and where one is missing the archive has an error."""
    opened = {id_: image for id_, image in images.items() if (image.data or b"").startswith(PNG)}
    held = [image.data for image in opened.values()]
    assert set(held) <= set(members.values()) and len(set(held)) == len(held)
    assert len(held) == len(members) or "x.tar" in images
    for name, data in members.items():
        assert f"x.tar/{name}" not in opened or opened[f"x.tar/{name}"].data == data


def headers_of(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member.offset for member in archive]


def pax_of(members: dict[str, bytes]) -> bytes:
    """With headers that go on in others: long names, and records of PAX."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 0.5
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("make", [lambda members: archive_of(list(members.items())), pax_of], ids=["ustar", "pax"])
def test_headers_cut_and_flipped_at_every_byte(make) -> None:
    whole = make(FOUR)
    assert {id_: image.data for id_, image in images_of(whole).items()} == {
        f"x.tar/{name}": data for name, data in FOUR.items()
    }
    second = headers_of(whole)[1]
    payload = whole.index(FOUR["b.png"])
    for at in range(second, payload):
        images = images_of(whole[:at])
        assert images["x.tar/a.png"].data == FOUR["a.png"] and images["x.tar"].error and len(images) == 2
        for bit in (0, 7):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            assert_nothing_is_lost(images_of(bytes(flipped)), FOUR)


def test_mutated_headers() -> None:
    generator = random.Random(0)
    damaged = 0
    for index in range(ARCHIVES):
        members = {
            f"{'n' * generator.choice((1, 120))}{i}.png": PNG + generator.randbytes(generator.randrange(2000))
            for i in range(4)
        }
        data = bytearray((archive_of(list(members.items())), pax_of(members))[index % 2])
        header = generator.choice(headers_of(bytes(data)))
        at = header + generator.randrange(512)
        match generator.randrange(6):
            case 0:
                data[at] ^= 1 << generator.randrange(8)
            case 1:
                data[at : at + 4] = generator.randbytes(4)
            case 2:
                del data[at]
            case 3:
                data[header : header + 512] = bytes(512)
            case 4:
                del data[at:]
            case 5:
                data[at:at] = generator.randbytes(generator.choice((1, 512)))
        images = images_of(bytes(data))
        assert_nothing_is_lost(images, members)
        damaged += "x.tar" in images
    assert damaged > ARCHIVES / 2


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress, lambda data: pa.compress(data, "zstd", asbytes=True)]
)
def test_compressed_archives_are_read_to_their_end(compress) -> None:
    whole = archive_of(list(FOUR.items()))
    # As pigz and others write: parts that are compressed each for itself.
    parts = compress(whole[:1000]) + compress(whole[1000:])
    assert len(images_of(parts)) == len(FOUR)
    images = images_of(compress(whole)[:-20])
    assert_nothing_is_lost(images, FOUR)
    assert images["x.tar"].error


def test_what_follows_the_end_is_an_error() -> None:
    first, second = archive_of(list(FOUR.items())[:2]), archive_of(list(FOUR.items())[2:])
    images = images_of(first + second)
    assert_nothing_is_lost(images, FOUR)
    assert "data follows the end" in str(images["x.tar"].error)
    assert "x.tar" not in images_of(first + bytes(10**6))
    assert not images_of(bytes(10240))
    assert "x.tar" in images_of(b"")


def test_links_are_errors_under_their_own_ids() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("a.png", "plain", "notes"):
            member = tarfile.TarInfo(name)
            data = b"notes" if name == "notes" else PNG + name.encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        links = [
            ("b.png", tarfile.LNKTYPE, "a.png"),
            ("c.png", tarfile.SYMTYPE, "elsewhere"),
            ("d", tarfile.LNKTYPE, "plain"),
        ]
        links += [("e.png", tarfile.FIFOTYPE, ""), ("f", tarfile.SYMTYPE, "notes"), ("g", tarfile.SYMTYPE, "a.png")]
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    images = images_of(file.getvalue())
    assert {id_.removeprefix("x.tar/") for id_ in images} == {"a.png", "plain", "b.png", "c.png", "d", "e.png", "g"}
    errors = {id_[-5:]: str(image.error) for id_, image in images.items() if image.error}
    assert "a hard link" in errors["b.png"] and "a symbolic link" in errors["c.png"] and len(errors) == 5


def test_copies_of_a_name_have_ids_of_their_own() -> None:
    for order in (["a.png", "a.png", "a.png#2", "a.png"], ["a.png#2", "a.png", "a.png"]):
        members = [(name, PNG + bytes([index])) for index, name in enumerate(order)]
        images = images_of(archive_of(members), image_formats=("PNG",))
        assert len(images) == len(order) and images["x.tar/a.png"].data == members[order.index("a.png")][1]


def test_damage_on_a_disk_and_on_ray(tmp_path: Path) -> None:
    """A disk passes over what is done without reading it."""
    whole = archive_of(list(FOUR.items()))
    file = write_images(tmp_path, {"x.tar": whole[: headers_of(whole)[2] - 1]}) / "x.tar"
    job, part = job_of(tmp_path), Part(0, str(file), "x.tar")
    expected = {"x.tar/a.png", "x.tar/b.png", "x.tar"}
    assert {image.id for image in read([part], "archive", job, ())} == expected
    assert {image.id for image in read([part], "archive", job, {"x.tar/a.png", "x.tar/b.png"})} == {"x.tar"}
    table = pa.Table.from_pylist([{**part._asdict(), "path": os.fsencode(file)}])
    table = pa.concat_tables(read_stage(table, "archive", job, ()))
    assert table.schema == IMAGE_SCHEMA and set(table["id"].to_pylist()) == expected


def test_a_damaged_archive_is_a_row_and_its_images_too(head_repo: Path, tmp_path: Path) -> None:
    whole = bytearray(archive_of(list(IMAGES.items())))
    whole[headers_of(bytes(whole))[2] + 150] ^= 1
    source = write_images(tmp_path / "in", {"x.tar": bytes(whole)})
    rows = extract(head_repo, source, tmp_path / "out")
    assert rows.keys() == {"x.tar/0.png", "x.tar/1.png", "x.tar"}
    assert rows["x.tar"]["error"].startswith("ReadError: a header cannot be read (bad checksum)")
    assert rows["x.tar/0.png"]["error"] is None
