# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The code that a model repo carries, and that loading it with `trust_remote_code` runs."""

from pathlib import Path


REPO = Path(__file__).resolve().parent.parent
CODE_FILES = sorted(REPO.glob("*_aimv2_packing.py"))
