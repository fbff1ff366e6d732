# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks import each other by their files' names, as their commands do."""

import sys

from reference import REPO


sys.path.append(str(REPO / "benchmarks"))
