# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serving.py: that servers answer under load, small and on a CPU."""

import http.server
import importlib
import json
import subprocess
import sys
import threading

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


def test_a_server_that_answers_with_errors_is_not_waited_for(monkeypatch):
    pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    serving = importlib.import_module("serving")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            with pytest.raises(SystemExit, match="error: the server answers with 501"):
                serving.wait_until_up(process, server.server_port, b"POST / HTTP/1.1\r\nConnection: close\r\n\r\n")
            process.communicate(b"\n")
        server.shutdown()
