"""Fixtures of all tests. Nothing here touches the network or the user's caches."""

import os
import tempfile


# Before the first import of huggingface_hub, which reads them once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="aimv2-packing-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings


# Chosen with `--hypothesis-profile thorough`; the default tries 100 cases of what does not say otherwise.
settings.register_profile("thorough", max_examples=2000)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
