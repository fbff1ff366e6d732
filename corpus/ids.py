# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Sets of ids that are as large as a corpus."""

import base64
import hashlib
from collections.abc import Iterable

import numpy as np


class IdSet:
    """A set of ids as 16 bytes each, which all workers of a machine share: the ids of a corpus fill its memory."""

    def __init__(self, ids: Iterable[str] = ()):
        digests = bytearray()
        for id_ in ids:
            digests += self.digest(id_)
        self.sorted = np.sort(np.frombuffer(digests, dtype="S16"))

    @staticmethod
    def digest(id_: str) -> bytes:
        """96 bits, as text: NumPy drops zeros at the end of bytes."""
        return base64.b64encode(hashlib.blake2b(id_.encode(), digest_size=12).digest())

    def __contains__(self, id_: object) -> bool:
        digest = self.digest(str(id_))
        index = np.searchsorted(self.sorted, digest)
        return bool(index < len(self.sorted) and self.sorted[index] == digest)

    def __len__(self) -> int:
        return len(self.sorted)

    def has_duplicates(self) -> bool:
        return bool((self.sorted[1:] == self.sorted[:-1]).any())
