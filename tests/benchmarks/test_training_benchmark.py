# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/training.py and profile_training.py with a tiny model."""

import json
import sys
from pathlib import Path

import profile_training
import pytest
import training
import workloads


def test_every_way_is_measured_and_has_the_gradients_of_the_original(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(workloads.GEOMETRIES, "large", (64, 96, 2))
    output = tmp_path / "training.json"
    options = ["--layers", "2", "--patches", "300", "--mixes", "small", "--repeats", "2", "--steps", "4"]
    options += ["--dtype", "float32", "--peers", "looped", "grouped", "--output", str(output)]
    ways = ["checkpointed", "checkpointed, states saved"]
    monkeypatch.setattr(sys, "argv", ["training.py", *options, "--ways", *ways])
    training.main()

    results = json.loads(output.read_text())
    (run,) = results["runs"]
    assert run["steps"].keys() == {"plain", *ways, "looped", "grouped", "products and attention"}
    assert run["steps"]["plain"]["over_plain"] == 1 and run["fastest_peer"] in ("looped", "grouped")
    assert results["gradient_errors"].keys() == {"original", "plain", *ways}
    assert max(results["gradient_errors"].values()) < 1e-5
    assert len(results["losses"]["plain"]) == 4
    assert results["losses"]["largest_difference"] == pytest.approx(dict.fromkeys(["plain", *ways], 0), abs=1e-2)


def test_a_profile_counts_what_checkpointing_runs_again(monkeypatch, capsys) -> None:
    monkeypatch.setitem(workloads.GEOMETRIES, "large", (64, 96, 2))
    options = ["--layers", "2", "--patches", "300", "--mixes", "small", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["profile_training.py", *options, "--ways", "plain", "checkpointed"])
    profile_training.main()

    plain, checkpointed = map(json.loads, capsys.readouterr().out.splitlines())
    assert (plain["way"], checkpointed["way"]) == ("plain", "checkpointed")
    assert 100 < plain["operators"] < checkpointed["operators"]
    assert all(0 < line["returned_ms"] <= line["step_ms"] and line["host_ms"] > 0 for line in (plain, checkpointed))
    assert len(plain["largest_on_the_host"]) == 10 and plain["kernels"] == 0
