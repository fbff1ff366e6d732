# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of training and of extraction at scale share: a model repo on disk, and several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from reference import REPO, packing_model, reference_model


def make_model_repo(folder: Path, **config) -> Path:
    """A small model repo with random weights and its code, as `convert_weights.py` would leave it."""
    packing_model(reference_model(**config)).save_pretrained(folder)
    for file in [*REPO.glob("*_aimv2_packing.py"), REPO / "preprocessor_config.json"]:
        shutil.copy(file, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = json.loads((REPO / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def run_processes(script: Path, *args: object, processes: int = 2, timeout: float = 300) -> str:
    """Runs `script` under torchrun; a rank that hangs is an error after `timeout` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'tests'}{os.pathsep}{REPO}"}
    result = subprocess.run(
        [*command, str(script), *map(str, args)],
        check=False,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=environment,
    )
    if result.returncode:
        raise RuntimeError(f"{script.name} failed with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.stdout


def assert_tensors_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Same names, and each tensor within `tolerance` of the largest value of the one that is expected."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
