# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Models, inputs and comparisons of the CUDA engine's tests. Weights are made where they are needed, on the GPU."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch
from reference import pack, packing_model, random_images, reference_model

from conversion.local_code import hub_module


accelerated = hub_module("accelerated")
cuda_engine, cuda_graphs, kernels = hub_module("cuda_engine"), hub_module("cuda_graphs"), hub_module("triton_kernels")

LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8}
# One layer of AIMv2-L after another has the same products: two are enough where depth does not matter.
SHALLOW = {**LARGE, "num_hidden_layers": 2}

VARIANTS = {
    "native": {},
    "learned": {"is_native": False},
    "biases": {"qkv_bias": True, "mlp_bias": True},
}
HALF = [torch.bfloat16, torch.float16]

gpu = pytest.mark.gpu
# On a CPU the kernels run under Triton's interpreter, which has to be asked for before Triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    kernels.triton is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Triton and a CUDA device or TRITON_INTERPRET=1",
)
on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not on_hopper, reason="needs a Hopper GPU")


@contextmanager
def interpreted_loops() -> Iterator[None]:
    """NumPy 2.4 makes no number of an array of one element; Triton 3.6's interpreter asks for one in loops."""
    if DEVICE == "cuda" or kernels.triton is None:
        yield
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with mock.patch.object(interpreter, "_patch_lang_tensor", patch_with_index):
        yield


def model_of(dtype: torch.dtype = torch.float32, attn: str = "sdpa", **config) -> torch.nn.Module:
    """An accelerated model of random weights, made on the device, and laid side by side there."""
    with torch.device(DEVICE):
        return packing_model(reference_model(dtype, **config), attn=attn).to(DEVICE)


def inputs_of(grids: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The patches on the device, `grid_thw` on the CPU."""
    return on_device(pack(random_images(list(grids))), dtype)


def on_device(inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {**inputs, "hidden_states": inputs["hidden_states"].to(DEVICE, dtype)}


def features(packed, inputs: dict[str, torch.Tensor], times: int = 1) -> torch.Tensor:
    """After `times` forwards of the engine: the first runs without a graph, the second captures one."""
    with torch.inference_mode():
        for _ in range(times):
            output = packed(**inputs).last_hidden_state
            assert packed.last_engine == "cuda", packed.engine_refusal
    return output


def plain_features(packed, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    packed.use_engines = False
    with torch.inference_mode():
        output = packed(**inputs).last_hidden_state
    packed.use_engines = True
    return output


def engine_of(packed):
    engine = accelerated.current_state(packed).engines["cuda"]
    assert engine.graphs.failure is None
    return engine


def graphs_of(packed) -> list:
    return list(engine_of(packed).graphs.by_key.values())


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()


def is_merged(packed) -> bool:
    return all(map(cuda_graphs.are_adjacent, cuda_engine.merged_parameters(packed)))
