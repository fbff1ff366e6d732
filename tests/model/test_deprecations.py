# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Deprecations fail the tests, whether warned of here or in a script that a test starts, or logged."""

import logging
import subprocess
import sys
import warnings

import pytest


CATEGORIES = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_warning_is_an_error(category):
    with pytest.raises(category):
        warnings.warn("old", category, stacklevel=1)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_warning_is_an_error_in_a_script(category):
    code = f"import warnings; warnings.warn('old', {category.__name__})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and f"{category.__name__}: old" in result.stderr


@pytest.mark.parametrize("library", ["transformers", "huggingface_hub"])
def test_a_logged_deprecation_is_an_error(library):
    with pytest.raises(DeprecationWarning, match="`old` is deprecated"):
        logging.getLogger(f"{library}.module").warning("`%s` is deprecated", "old")
