# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of a corpus."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scaling import make_model_repo

from corpus import in_process


@pytest.fixture(scope="session")
def head_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a head; not to be changed."""
    torch.manual_seed(0)
    return make_model_repo(tmp_path_factory.mktemp("models") / "tiny", use_head=True)


@pytest.fixture(autouse=True)
def same_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only a test that asks for them has processes that decode, which many cores bring, and these give no order."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(in_process, "decoders", lambda device: 0)
    yield
    # Decoders take some of this process's.
    torch.set_num_threads(threads)
