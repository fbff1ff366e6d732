# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/distributed.py and data_parallel.py in two processes, with tiny models."""

import json
from pathlib import Path

import pytest
import torch


pytest.importorskip("accelerate", reason="needs requirements-scale.txt")

from reference import REPO
from scaling import run_processes


SMALL = ["--small", "--patches", "512", "--steps", "2", "--repeats", "1"]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_every_part_runs_and_agrees_with_one_process(device: str, tmp_path: Path) -> None:
    output = tmp_path / "distributed.json"
    run_processes(REPO / "benchmarks" / "distributed.py", "--output", output, "--device", device, *SMALL)
    parts = json.loads(output.read_text())["parts"]
    assert all("failed" not in part for part in parts.values())

    strategies = parts["correctness_float32"]
    del strategies["part_seconds"]
    assert {"ddp_empty", "fsdp", "fsdp_empty", "fsdp_config", "tp"} <= strategies.keys()
    for name, strategy in strategies.items():
        for result in (strategy["gradients"], strategy["checkpoint"]):
            assert result["wrong"] == [] and result["error"] <= 1e-5, (name, result)
        assert (strategy["held_by_one_process"] < 0.6 * strategy["parameters"]) == (not name.startswith("ddp")), name

    for name in ("tensor_parallel_large", "tensor_parallel_3B"):
        # Two roundings to bfloat16 of one model; sharded weights keep the engines out.
        assert parts[name]["difference_to_plain"] < 0.02
        assert parts[name]["one"]["engine"] == device and parts[name]["many"]["engine"] is None
    for name in ("training_large", "training_3B"):
        assert all(patches <= 512 for work in parts[name]["by_patches"]["patches"] for patches in work)


def test_parts_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    output = tmp_path / "distributed.json"
    names = ["correctness_float32", "correctness_bfloat16", "encoding_large", "training_3B", "training_large"]
    names += ["tensor_parallel_large", "tensor_parallel_3B"]
    left = {"parts": {name: {"failed": True} for name in names if name != "encoding_large"}}
    output.write_text(json.dumps(left))
    run_processes(REPO / "benchmarks" / "distributed.py", "--output", output, "--device", "cpu", *SMALL)
    parts = json.loads(output.read_text())["parts"]
    assert {name: part for name, part in parts.items() if name != "encoding_large"} == left["parts"]
    assert parts["encoding_large"]["many"] > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_every_setting_of_ddp_is_measured_against_one_process(device: str) -> None:
    options = ["--patches", "128", "--steps", "1", "--repeats", "1"]
    output = run_processes(REPO / "benchmarks" / "data_parallel.py", "--device", device, "--small", *options)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {"alone", "beside", "DDP, no_sync", "DDP", "views, static"} <= {line["way"] for line in lines}
    assert len(lines) == 10 and all(line["step_ms"] > 0 and line["efficiency"] > 0 for line in lines)
    assert lines[0]["way"] == "alone" and lines[0]["efficiency"] == 1
