# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
transformers' common tests, from the sdist that download.py fetches: a wheel has no tests.

The sdist holds the files of `tests/` and none of its folders. What the common tests import from there has a stand-in
here.
"""

import importlib
import sys
from types import ModuleType

import pytest
import transformers
from reference import REPO


# Of the version that is installed: `tests/` of another one may not fit.
TESTS = REPO / "build" / f"transformers-{transformers.__version__}" / "tests"
PACKAGE = "transformers_sdist_tests"

# Fields that every configuration has, each with a value that is not its default.
CONFIG_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "is_encoder_decoder": True,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
    "label2id": {"cat": 0, "dog": 1, "owl": 2},
    "problem_type": "regression",
}


def stand_in(name: str, **attributes: object) -> None:
    """Makes an import of this module of the package give `attributes`."""
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(attributes)
    sys.modules[module.__name__] = module


def common_tests(name: str) -> ModuleType:
    """The file `tests/{name}.py` of the sdist as a module; the test file that asks is skipped where there is none."""
    if not (TESTS / "__init__.py").is_file():
        pytest.skip(
            f"transformers {transformers.__version__}'s own tests are not in {TESTS.relative_to(REPO)}: python "
            "tests/transformers_common/download.py",
            allow_module_level=True,
        )
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(TESTS)]
        sys.modules[PACKAGE] = package
        # This repo has its own tests of export, and the model generates nothing.
        stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        stand_in("utils.test_configuration_utils", config_common_kwargs=CONFIG_FIELDS)
    return importlib.import_module(f"{PACKAGE}.{name}")
