# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of a corpus."""

from pathlib import Path

import pytest
import torch
from scaling import make_model_repo


@pytest.fixture(scope="session")
def head_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a head; not to be changed."""
    torch.manual_seed(0)
    return make_model_repo(tmp_path_factory.mktemp("models") / "tiny", use_head=True)
