# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files are images, and how one is opened: only those of a list of formats."""

import io
from functools import cache

import PIL.Image


# Left out: what PIL hands to another program (EPS, to Ghostscript), and what has no signature to know it by.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")

# All that PIL looks at to tell one format from another.
SIGNATURE_BYTES = 16


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `IMAGE_FORMATS` that this PIL reads, its plugins included."""
    PIL.Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in PIL.Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    return frozenset(s for s, name in PIL.Image.registered_extensions().items() if name in readable_formats())


def has_image_name(name: str) -> bool:
    return name[name.rfind(".") :].lower() in image_suffixes()


def has_image_signature(start: bytes) -> bool:
    """Whether a file that begins with these bytes, `SIGNATURE_BYTES` or more, is of one of the formats."""
    accepts = (PIL.Image.OPEN[name][1] for name in readable_formats())
    # A string is PIL's reason why it cannot read what it knows.
    return any(accept is not None and accept(start) is True for accept in accepts)


def open_image(data: bytes) -> PIL.Image.Image:
    """
    Raises:
        Exception: anything, from the decoders of PIL.
    """
    return PIL.Image.open(io.BytesIO(data), formats=readable_formats())
