# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""examples/serve.py in a process of its own, at a port that it takes itself: one that was free may be taken since."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path


def start_server(log: Path, *options: object, folder: Path) -> tuple[subprocess.Popen, int]:
    """The server, from the clone in `folder`, and its port. What it says is in the file `log`."""
    command = [sys.executable, "examples/serve.py", "--port", "0", *map(str, options)]
    with log.open("w") as opened:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=opened)
    end = time.monotonic() + 300
    while not (said := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
        if server.poll() is not None or time.monotonic() > end:
            server.kill()
            raise RuntimeError(f"The server does not start:\n{log.read_text()}")
        time.sleep(0.1)
    return server, int(said[1])
