# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""benchmarks/throughput.py on a CPU with a tiny model, against another checkout too; what a CUDA graph keeps alive."""

import contextlib
import gc
import json
import shutil
import weakref
from pathlib import Path

import candidates
import pytest
import throughput
import torch
import workloads
from reference import REPO, reference_model


ARGUMENTS = ["--mixes", "small", "one_224", "--repeats", "1", "--growth", "1", "2", "--dtype", "float32"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    reference_model().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def other_checkout(folder: Path) -> Path:
    """A checkout of another layout: its `config.json` names another class of another file."""
    folder.mkdir()
    for path in [*REPO.glob("*_aimv2_packing.py"), REPO / "config.json"]:
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    file, name = config["auto_map"]["AutoModel"].split(".")
    (folder / "older_aimv2_packing.py").write_text(f"from .{file} import {name}\n\n\nclass Older({name}):\n    pass\n")
    config["auto_map"]["AutoModel"] = "older_aimv2_packing.Older"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_candidate_is_measured_and_agrees_with_the_original(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--checkpoint", checkpoint, "--against", other_checkout(tmp_path / "older"), "--output", tmp_path]
    monkeypatch.setattr("sys.argv", ["throughput.py", *ARGUMENTS, *map(str, arguments)])
    throughput.main()
    (run,) = json.loads((tmp_path / "throughput.json").read_text())["runs"]
    assert [(mix["mix"], mix["images"], mix["patches"]) for mix in run["mixes"]][1] == ("one_224", 1, 256)
    for mix in run["mixes"]:
        assert {"packed sdpa", "older sdpa", "looped", "grouped", "padded"} <= mix["candidates"].keys()
        packed = mix["candidates"]["packed sdpa"]
        assert packed["max_difference_to_loop"] < 1e-4
        assert {"older sdpa", "looped", "grouped", "padded"} <= packed["speedup_over"].keys()
    assert [row["patches"] for row in run["growth"]] == [256, 512]
    assert "older sdpa x" in capsys.readouterr().out


def test_the_packed_model_has_weights_of_its_own_as_a_loaded_one(checkpoint):
    """Of weights that others share, the CUDA engine makes no merged products."""
    models = workloads.make_models(throughput.settings(checkpoint=str(checkpoint), against=None), torch.float32)
    theirs = {weight.untyped_storage().data_ptr() for weight in models.reference.parameters()}
    assert not any(weight.untyped_storage().data_ptr() in theirs for weight in models.packed.parameters())


def test_what_is_timed_is_the_forward_alone(checkpoint, monkeypatch):
    args = throughput.settings(checkpoint=str(checkpoint), against=None)
    models = workloads.make_models(args, torch.float32)
    forward = candidates.Candidates(models, [(2, 3), (4, 4)], args).forwards["packed sdpa"]
    next(forward())
    for name in ("train", "eval", "gradient_checkpointing_enable", "set_attn_implementation"):
        monkeypatch.setattr(models.packed, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    next(forward())


def test_another_checkout_is_run_by_its_own_code_and_these_weights(checkpoint, tmp_path):
    args = throughput.settings(checkpoint=str(checkpoint), against=other_checkout(tmp_path / "older"))
    models = workloads.make_models(args, torch.float32)
    assert type(models.older).__name__ == "Older"
    assert not isinstance(models.older, workloads.packing_class())
    assert type(models.packed) is workloads.packing_class()
    for name, weight in models.reference.state_dict().items():
        assert torch.equal(models.older.state_dict()[name], weight)


def test_a_graph_keeps_the_model_whose_weights_it_reads(monkeypatch):
    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    model = torch.nn.Linear(2, 2)
    alive, states = weakref.ref(model), torch.ones(1, 2)

    def forward_of(model):
        return lambda: (model(states) for _ in range(1))

    forward = candidates.in_graph(forward_of(model))
    del model
    gc.collect()
    assert alive() is not None
    assert torch.equal(next(forward()), alive()(states))
    del forward
    gc.collect()
    assert alive() is None
