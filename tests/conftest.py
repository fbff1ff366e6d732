# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests. Nothing here touches the network or the user's caches."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version


# Before the first import of huggingface_hub, which reads them once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="aimv2-packing-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"


import hypothesis
import pytest
import torch
from hypothesis import settings
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


# Far more cases, and others each time, for a change of what is fuzzed:
# `pytest --hypothesis-profile thorough --timeout 0`.
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, since many tests wait for others."""
    return (os.cpu_count() or 1) + 1


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


class TorchRandom:
    """torch's generator as hypothesis takes it: seeded with each example, so that a failure can be replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()
hypothesis.register_random(TORCH_RANDOM)


# Libraries seldom give the stack level of a warning, so a filter cannot tell our use from theirs: all are errors, and
# what is not ours to repair is listed. The last that matches counts.
DEPRECATIONS = [
    "error::DeprecationWarning",
    "error::PendingDeprecationWarning",
    "error::FutureWarning",
    # Its successor, `activation_checkpointing_enable`, came with transformers 5.23, far above the floor.
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    # Asked for by peft.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # huggingface_hub's uploads through httpx.
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning",
    # torch's own compiler on a GPU.
    "ignore:`torch.jit.script_method` is deprecated",
    # Ray sets its own deprecated fields.
    "ignore::DeprecationWarning:ray.data.context",
]

# For the scripts and examples that tests start.
os.environ["PYTHONWARNINGS"] = ",".join(DEPRECATIONS)


class RaiseDeprecations(logging.Handler):
    """transformers and huggingface_hub announce some deprecations by logging, which no filter of warnings sees."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


for library in ("transformers", "huggingface_hub"):
    logging.getLogger(library).addHandler(RaiseDeprecations())


def pytest_configure(config: pytest.Config) -> None:
    for line in DEPRECATIONS:
        config.addinivalue_line("filterwarnings", line)


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "huggingface_hub"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


REGISTRIES = (
    *(CONFIG_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, MODEL_MAPPING),
    *(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING),
)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers with transformers' `Auto` classes, which prefer it to a repo's own code, ends with it."""
    before = [dict(registry._extra_content) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry._extra_content = content


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
