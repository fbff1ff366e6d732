# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Archives of the input to images. What `tarfile` takes for the end of an archive without a word is an error here."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Container, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from corpus.inputs import SIGNATURE_BYTES, Part, file_system, has_image_name, has_image_signature, utf8_name
from corpus.rows import TOO_LARGE, Image, detail_of
from corpus.settings import Job


DECOMPRESSORS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"]\0\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}

# Of one member's headers: names of thousands of letters, not bombs.
HEADER_BYTES = 2**20
SKIPPED_AT_ONCE = 2**18

GROUP_TOO_LARGE = "ValueError: the members that share a name up to its first dot are larger than --max-image-bytes"


class Source:
    """
    The file of `tarfile`, which only goes forward.

    Args:
        file (binary file): An archive, compressed or not.
        can_seek (`bool`): Whether what is passed over in an archive that is not compressed need not be read.
    """

    def __init__(self, file: BinaryIO, can_seek: bool):
        buffered = io.BufferedReader(file, SKIPPED_AT_ONCE)  # type: ignore[type-var]
        start = buffered.peek(8)
        decompress: Any = next((make for magic, make in DECOMPRESSORS.items() if start.startswith(magic)), None)
        self.file = decompress(buffered) if decompress else buffered
        self.can_seek = can_seek and decompress is None
        self.position = 0
        # Of the headers that are being read; None where members are.
        self.budget: int | None = None
        self.is_whole = False

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        """
        Raises:
            tarfile.ReadError: the position was passed, or the file ends before it.
        """
        if position < self.position:
            raise tarfile.ReadError("a header gives an impossible size")
        if self.can_seek:
            self.file.seek(position)
            self.position = position
        while self.position < position:
            if not self.read(min(position - self.position, SKIPPED_AT_ONCE)):
                raise tarfile.ReadError("unexpected end of data")

    def read(self, size: int) -> bytes:
        """Fewer bytes than `size` only at the end of the file."""
        if self.budget is not None:
            self.budget -= size
            if self.budget < 0:
                raise tarfile.ReadError("a header is larger than any name")
        data = self.file.read(size)
        while len(data) < size and (more := self.file.read(size - len(data))):
            data += more
        self.position += len(data)
        return data

    def check_end(self) -> None:
        """
        Raises:
            tarfile.ReadError: data follows the end.
        """
        while data := self.read(SKIPPED_AT_ONCE):
            if data.count(0) < len(data):
                raise tarfile.ReadError("data follows the end of the archive, as where archives were joined by cat")
        self.is_whole = True


class Header(tarfile.TarInfo):
    """Raises where a header cannot be read, or is missing."""

    size_in_header = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        member = super().frombuf(buf, encoding, errors)
        member.size_in_header = member.size
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "Header":
        source: Any = archive.fileobj
        # A header that goes on in another calls this again.
        if source.budget is not None:
            return super().fromtarfile(archive)
        source.budget = HEADER_BYTES
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            source.budget = None
            source.check_end()
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header cannot be read ({error}): members from here on are lost") from None
        finally:
            source.budget = None
        sizes = {member.size, member.size_in_header or member.size}
        if "size" in member.pax_headers and not member.issparse() and len(sizes) > 1:
            raise tarfile.ReadError("a header gives two sizes")
        return member


def members_of(source: Source) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """
    Raises:
        tarfile.ReadError: the archive does not end as archives do.
    """
    archive = tarfile.TarFile(fileobj=source, tarinfo=Header)  # type: ignore[arg-type]
    while member := archive.next():
        # Or all headers of a long archive would stay in memory.
        archive.members.clear()  # type: ignore[attr-defined]
        yield archive, member
    if not source.is_whole:
        raise tarfile.ReadError("a header gives an impossible size")


class UniqueIds:
    """tar allows several members of one name: the second is NAME#2, or what no other member is called."""

    def __init__(self) -> None:
        self.copies: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        copy = self.copies.get(name, 0)
        id_ = name
        while copy and (id_ in self.copies or id_ == name):
            copy += 1
            id_ = f"{name}#{copy}"
        self.copies[name] = copy or 1
        self.copies.setdefault(id_, 1)
        return id_


def read_archive(part: Part, job: Job, done: Container[str]) -> Iterator[Image]:
    """
    The images of an archive that are not done.

    Raises:
        Exception: whatever reading and decompressing raise where the archive is damaged, cut short or gone.
    """
    members = read_members(part, job, done)
    if job.keep is None:
        return (found for _, found in members if isinstance(found, Image))
    return with_neighbours(members, job.max_image_bytes)


def with_neighbours(members: Iterator[tuple[str, Image | bytes | None]], max_bytes: int) -> Iterator[Image]:
    """
    Images with the texts of the members beside them, as WebDataset groups them: neighbours that share a name up to the
    first dot of its last part. A suffix that comes again begins another group.
    """
    key: str | None = None
    waiting: list[Image] = []
    texts: dict[str, str] = {}
    suffixes: set[str] = set()
    size = 0
    end: Exception | None = None
    try:
        for name, found in members:
            # Names that WebDataset passes over.
            named = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name, re.DOTALL)
            if named is None:
                if isinstance(found, Image):
                    yield found
                continue
            suffix = named[2].lower()
            if named[1] != key or suffix in suffixes:
                yield from (image._replace(kept=texts) for image in waiting)
                key, waiting, texts, suffixes, size = named[1], [], {}, set(), 0
            suffixes.add(suffix)
            size += len(found) if isinstance(found, bytes) else len(found.data or b"") if found else 0
            if isinstance(found, Image):
                waiting.append(found)
            elif found is not None and size <= max_bytes:
                texts[suffix] = found.decode("utf-8", "backslashreplace")
            # They are in memory together.
            if size > max_bytes:
                waiting = [Image(image.id, image.error or GROUP_TOO_LARGE, None) for image in waiting]
    except Exception as error:
        end = error
    yield from (image._replace(kept=texts) for image in waiting)
    if end:
        raise end


def read_members(part: Part, job: Job, done: Container[str]) -> Iterator[tuple[str, Image | bytes | None]]:
    """
    The name of each member with the image that is not done, the bytes of what is kept beside images, or None.

    Raises:
        Exception: as above.
    """
    keep = frozenset(job.keep.names) if job.keep is not None else frozenset()
    fs, _ = file_system(job.inputs[part.source])
    unique = UniqueIds()
    images_without_suffix: set[str] = set()
    with fs.open(part.path, "rb") as file:
        source = Source(file, isinstance(fs, LocalFileSystem))
        for archive, member in members_of(source):
            if member.isdir():
                continue
            is_named = has_image_name(member.name, job.image_formats)
            if not member.isreg():
                leads = is_named or has_image_name(member.linkname, job.image_formats)
                if leads or member.linkname in images_without_suffix:
                    id_ = unique(f"{part.name}/{utf8_name(member.name)}")
                    if id_ not in done:
                        yield member.name, Image(id_, special_member_error(member), None)
                continue
            id_ = unique(f"{part.name}/{utf8_name(member.name)}")
            if id_ in done:
                yield member.name, None
                continue
            try:
                opened: Any = archive.extractfile(member) if member.issparse() else source
                if opened is source:
                    source.seek(member.offset_data)
                data = opened.read(min(SIGNATURE_BYTES, member.size))
                if not is_named and not has_image_signature(data, job.image_formats):
                    if member.name.rpartition("/")[2].partition(".")[2].lower() not in keep:
                        yield member.name, None
                        continue
                    wanted = min(member.size, job.max_image_bytes + 1)
                    data += opened.read(wanted - len(data))
                    if len(data) < wanted:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member.name, data
                    continue
                if not is_named:
                    images_without_suffix.add(member.name)
                if member.size > job.max_image_bytes:
                    yield member.name, Image(id_, detail_of(ValueError(TOO_LARGE)), None)
                    continue
                data += opened.read(member.size - len(data))
                if len(data) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
            except Exception as error:
                # The archive has its own error too.
                if is_named:
                    yield member.name, Image(id_, detail_of(error), None)
                raise
            yield member.name, Image(id_, None, data)


def special_member_error(member: tarfile.TarInfo) -> str:
    kind = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}.get(member.type, "no regular file")
    return (
        f"ValueError: the member is {kind} and holds no image of its own: archive the file that it stands for (GNU "
        "tar: --hard-dereference, --dereference)"
    )
