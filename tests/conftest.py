"""Fixtures of all tests. Nothing here touches the network or the user's caches."""

import os
import tempfile


# Before the first import of huggingface_hub, which reads them once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="aimv2-packing-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"


import hypothesis
import pytest
import torch
from hypothesis import settings


# Far more cases, for a change of what is fuzzed: `pytest --hypothesis-profile thorough`.
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")


class TorchRandom:
    """torch's generator as hypothesis takes it: seeded with each example, so that a failure can be replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()
hypothesis.register_random(TORCH_RANDOM)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
