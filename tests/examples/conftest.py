# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the server: its module, and what it serves."""

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import REPO, reference_model


@pytest.fixture(scope="module")
def serve() -> Iterator:
    sys.path.insert(0, str(REPO / "examples"))
    yield importlib.import_module("serve")
    sys.path.remove(str(REPO / "examples"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_image_text_repo(tmp_path_factory.mktemp("lit"), reference_image_text_model()))


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_vision_repo(tmp_path_factory.mktemp("native"), reference_model()))


@pytest.fixture(scope="module")
def encoder(serve, checkpoint):
    return serve.Encoder(checkpoint, "cpu")


@pytest.fixture(scope="module")
def native_encoder(serve, native):
    return serve.Encoder(native, "cpu")


@pytest.fixture
def batchers(serve, monkeypatch) -> list:
    """Those of the applications that a test creates."""
    made: list = []

    class Kept(serve.Batcher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(serve, "Batcher", Kept)
    return made
