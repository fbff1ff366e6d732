# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Training in two processes against the same step in one: gradients, and the checkpoint that comes out."""

import json
import re
from pathlib import Path

import pytest
import torch


pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
pytest.importorskip("peft", reason="needs requirements-scale.txt")

from distributed_worker import add_lora, batch_of, batches_of, train_in_one_process
from peft import PeftModel
from reference import Aimv2PackingModel, pack, random_images
from safetensors.torch import load_file
from scaling import assert_tensors_close, make_model_repo, run_processes


WORKER = Path(__file__).with_name("distributed_worker.py")

# Relative to the largest value of each tensor; one process sums in another order than two.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return make_model_repo(tmp_path_factory.mktemp("model"), use_head=True)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(repo: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, each on a device of its own, have left a folder for each strategy."""
    output = tmp_path_factory.mktemp("trained")
    run_processes(WORKER, repo, output, device)
    return output


def in_one_process(strategy: str, model: torch.nn.Module, device: str) -> tuple[dict, dict]:
    """Gradients and trained parameters of the same step in this process; `model` ends on the CPU."""
    grads, _ = train_in_one_process(model.to(device), batches_of(strategy))
    parameters = model.cpu().named_parameters()
    return {name: grad.cpu() for name, grad in grads.items()}, {name: p.detach() for name, p in parameters}


def read(folder: Path) -> tuple[dict, dict, dict]:
    """Gradients, trained checkpoint, and how many values and which gathered units the first process held."""
    weights = next((folder / "checkpoint").glob("*.safetensors"))
    return (
        load_file(folder / "gradients.safetensors"),
        load_file(weights),
        json.loads((folder / "state.json").read_text()),
    )


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_checkpointing", "fsdp_empty", "fsdp_accelerate", "fsdp_config"])
def test_fully_sharded_step_equals_one_process(strategy: str, repo: Path, trained: Path, device: str) -> None:
    grads, weights, state = read(trained / strategy)
    expected = in_one_process(strategy, Aimv2PackingModel.from_pretrained(repo), device)
    assert_tensors_close(grads, expected[0], TOLERANCE)
    assert_tensors_close(weights, expected[1], TOLERANCE)
    # Half of everything but the class token: its first dimension, along which FSDP2 cuts, is 1.
    assert state["held"] == sum(p.numel() if "cls_token" in name else p.numel() // 2 for name, p in expected[1].items())
    assert {"", "encoder.layers.0", "encoder.layers.1"} <= set(state["units"])


def test_tensor_parallel_step_equals_one_process(repo: Path, trained: Path, device: str) -> None:
    grads, weights, state = read(trained / "tp")
    expected = in_one_process("tp", Aimv2PackingModel.from_pretrained(repo), device)
    assert_tensors_close(grads, expected[0], TOLERANCE)
    assert_tensors_close(weights, expected[1], TOLERANCE)
    in_layers = re.compile(r"encoder\.layers.*proj").search
    assert state["held"] == sum(p.numel() // 2 if in_layers(name) else p.numel() for name, p in expected[1].items())


def test_rank_without_images_neither_hangs_nor_changes_the_gradients(repo: Path, trained: Path, device: str) -> None:
    grads, weights, _ = read(trained / "ddp_empty")
    expected = in_one_process("ddp_empty", Aimv2PackingModel.from_pretrained(repo), device)
    assert_tensors_close(grads, expected[0], TOLERANCE)
    assert_tensors_close(weights, expected[1], TOLERANCE)


def test_lora_step_equals_one_process_and_its_adapter_loads(repo: Path, trained: Path, device: str) -> None:
    grads, adapter, _ = read(trained / "ddp_lora")
    model = add_lora(Aimv2PackingModel.from_pretrained(repo))
    expected_grads, expected = in_one_process("ddp_lora", model, device)
    assert_tensors_close(grads, expected_grads, TOLERANCE)
    assert all("lora_" in name for name in grads)
    expected = {name.replace(".default", ""): p for name, p in expected.items() if "lora_" in name}
    assert_tensors_close(adapter, expected, TOLERANCE)

    loaded = PeftModel.from_pretrained(Aimv2PackingModel.from_pretrained(repo), trained / "ddp_lora" / "checkpoint")
    inputs = pack(random_images([(3, 4), (5, 2)]))
    with torch.no_grad():
        features = loaded(**inputs).last_hidden_state
        torch.testing.assert_close(features, model.eval()(**inputs).last_hidden_state, rtol=0, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).last_hidden_state, features, rtol=0, atol=1e-4)


def test_gradient_checkpointing_recomputes_and_changes_nothing(repo: Path) -> None:
    expected = train_in_one_process(Aimv2PackingModel.from_pretrained(repo), [batch_of(0)])
    model = Aimv2PackingModel.from_pretrained(repo)
    model.gradient_checkpointing_enable()
    calls = []
    # Before the forward: recomputation stops as soon as it has what the backward needs.
    model.encoder.layers[0].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = train_in_one_process(model, [batch_of(0)])
    assert len(calls) == 2
    assert_tensors_close(actual[0], expected[0], 1e-6)
    assert_tensors_close(actual[1], expected[1], 1e-6)


def test_offload_to_cpu_and_disk_changes_nothing(repo: Path, tmp_path: Path) -> None:
    inputs = pack(random_images([(3, 4), (5, 2), (1, 1)]))
    device_map = {
        "embeddings": "cpu",
        "encoder.layers.0": "disk",
        "encoder.layers.1": "cpu",
        "rms_norm": "cpu",
        "head": "disk",
    }
    model = Aimv2PackingModel.from_pretrained(repo, device_map=device_map, offload_folder=tmp_path)
    assert model.encoder.layers[0].ffn.up_proj.weight.device.type == "meta"
    whole = Aimv2PackingModel.from_pretrained(repo)
    for module in whole.modules():
        # Offloading hooks every module, and a module with a hook runs by its own kernels: compare with those.
        module.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected, actual = whole(**inputs), model(**inputs)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=0)
