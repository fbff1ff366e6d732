# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Converts AIMv2 checkpoints into packed model repos, verifies and uploads them."""
