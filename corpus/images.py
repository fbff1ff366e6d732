# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files are images of the formats that the image processor opens, as far as the name or the first bytes tell."""

from collections.abc import Iterable
from functools import cache

import PIL.Image


# All that PIL looks at to tell one format from another.
SIGNATURE_BYTES = 16


@cache
def image_suffixes(formats: tuple[str, ...]) -> frozenset[str]:
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats)


def has_image_name(name: str, formats: tuple[str, ...]) -> bool:
    return name[name.rfind(".") :].lower() in image_suffixes(formats)


def has_image_signature(start: bytes, formats: Iterable[str]) -> bool:
    """Whether a file that begins with these bytes, `SIGNATURE_BYTES` or more, is of one of the formats."""
    PIL.Image.init()
    accepts = (PIL.Image.OPEN[name][1] for name in formats if name in PIL.Image.OPEN)
    # A string is PIL's reason why it cannot read what it knows.
    return any(accept is not None and accept(start) is True for accept in accepts)
