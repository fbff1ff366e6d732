# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serving.py: that servers answer under load, small and on a CPU."""

import json
import subprocess
import sys

import pytest
from reference import REPO


def test_open_load_of_each_server(tmp_path):
    pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    sizes = ["--layers", "1", "--width", "128", "--clients", "2", "--kinds", "packed", "padded"]
    load = ["--rates", "4", "8", "--seconds", "1", "--output", str(tmp_path / "serving.json")]
    command = [sys.executable, str(REPO / "benchmarks" / "serving.py"), *sizes, *load]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| asked", "packed", "padded |"]
    assert [line[0] for line in lines[2:]] == ["| 4/s", "| 8/s"] and all(len(line) == 3 for line in lines)
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(row["rate"], row["requests"]) for row in rows] == [(4, 4), (8, 8)] * 2
    assert all(row["answered"] == row["requests"] and not row["failed"] for row in rows)
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
