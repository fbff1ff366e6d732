# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs commands `python SCRIPT ...` in processes of their own that have the large libraries imported already: reads
{"arguments", "folder", "output"} a line, writes the exit code a line.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import PIL.Image  # noqa: F401
import torch  # noqa: F401
import transformers
import transformers.models.aimv2.modeling_aimv2
import transformers.trainer  # noqa: F401


def run_script(arguments: list[str], folder: str) -> int:
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = run_script(request["arguments"], request["folder"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
