# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Downloads the tests of the installed transformers, unless they are there: they are in its sdist only."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


BUILD = Path(__file__).parents[2] / "build"
VERSION = version("transformers")
TESTS = f"transformers-{VERSION}/tests"
# Written last.
STAMP = BUILD / TESTS / "__init__.py"

if not STAMP.is_file():
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*download, "--dest", BUILD, f"transformers=={VERSION}"], check=True)
    with tarfile.open(BUILD / f"transformers-{VERSION}.tar.gz") as sdist:
        sdist.extractall(BUILD, [part for part in sdist if part.name.startswith(f"{TESTS}/")], filter="data")
    STAMP.touch()
