# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What bounds a forward: its matrix products alone, and with the fastest attention kernel."""

import statistics
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import torch
from candidates import Candidates
from timing import captured, seconds
from torch.nn.attention.varlen import varlen_attn

from conversion.local_code import hub_module


PRODUCTS = ("products by mm", "products by oneDNN")


def matrix_products(packed, candidates: Candidates, onednn: bool) -> Callable[[], None]:
    """
    The layers' matrix products alone, attention's included, those of images of equal length together: by `torch.mm`
    into buffers that exist already, or by the oneDNN kernel that torch.compile calls on a CPU.
    """
    config, lengths = packed.config, candidates.grid_thw.prod(1).tolist()
    like = {"device": candidates.patches.device, "dtype": packed.dtype}
    total, heads = len(candidates.patches), config.num_attention_heads
    head_dim = config.hidden_size // heads
    hidden = torch.randn(total, config.hidden_size, **like)
    wide = torch.randn(total, config.intermediate_size, **like)
    hidden_out, wide_out = torch.empty_like(hidden), torch.empty_like(wide)
    attention = []
    for length, segments in Counter(lengths).items():
        query = torch.randn(segments * heads, length, head_dim, **like)
        scores = torch.empty(segments * heads, length, length, **like)
        attention.append((query, query.transpose(1, 2), scores, torch.empty_like(query)))

    def linear(states: torch.Tensor, module: torch.nn.Linear, out: torch.Tensor) -> None:
        if onednn:
            torch.ops.mkldnn._linear_pointwise(states, module.weight, None, "none", [], "")
        else:
            torch.mm(states, module.weight.T, out=out)

    def run() -> None:
        for layer in packed.encoder.layers:
            for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                linear(hidden, projection, hidden_out)
            for query, key, scores, output in attention:
                torch.bmm(query, key, out=scores)
                torch.bmm(scores, query, out=output)
            linear(hidden, layer.attention.out_proj, hidden_out)
            linear(hidden, layer.ffn.gate_proj, wide_out)
            linear(hidden, layer.ffn.up_proj, wide_out)
            linear(wide, layer.ffn.down_proj, hidden_out)

    return run


def attention_kernels(candidates: Candidates, packed) -> dict[str, Callable[[], torch.Tensor]]:
    """What computes one layer's attention of these images on a GPU: PyTorch's kernels and the engine's own."""
    heads, lengths = packed.config.num_attention_heads, candidates.grid_thw.prod(1).tolist()
    total, segments, longest = sum(lengths), len(lengths), max(lengths)
    head_dim = packed.config.hidden_size // heads
    qkv = torch.randn(total, 3, heads, head_dim, device=candidates.patches.device, dtype=packed.dtype)
    states, attended = qkv.unbind(1), torch.empty_like(qkv[:, 0])
    bounds = torch.tensor([segments, 0, *accumulate(lengths)], dtype=torch.int32, device=candidates.patches.device)
    own, cu_seqlens = hub_module("triton_kernels"), bounds[1:]
    located = own.locate_patches(bounds, total, has_frames=False)
    kernels = {
        "varlen": lambda: varlen_attn(*states, cu_seqlens, cu_seqlens, longest, longest),
        "own": lambda: own.segment_attention(qkv, located, attended),
    }
    if segments * longest == total:
        dense = [x.unflatten(0, (segments, longest)).transpose(1, 2) for x in states]
        kernels["flash"] = lambda: torch.ops.aten._scaled_dot_product_flash_attention(*dense)[0]
        kernels["cudnn"] = lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(*dense, None, False)[0]
    return kernels


def limit(packed, candidates: Candidates) -> tuple[Callable[[], None], dict[str, float]]:
    """All layers' products, merged, and the fastest attention kernel, in a CUDA graph; and seconds of each kernel."""
    config, total = packed.config, len(candidates.patches)
    like = {"device": candidates.patches.device, "dtype": packed.dtype}
    hidden, wide = torch.randn(total, config.hidden_size, **like), torch.randn(total, config.intermediate_size, **like)
    hidden_out = torch.empty_like(hidden)
    merged = {"qkv": torch.empty(total, 3 * config.hidden_size, **like)}
    merged["gate_up"] = torch.empty(total, 2 * config.intermediate_size, **like)
    weights = []
    for layer in packed.encoder.layers:
        attention, ffn = layer.attention, layer.ffn
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        weights.append((qkv.T, attention.out_proj.weight.T, gate_up.T, ffn.down_proj.weight.T))
    kernels = attention_kernels(candidates, packed)
    times = {}
    for name, kernel in kernels.items():
        kernel()
        graph = captured(kernel, calls=20)
        times[name] = statistics.median(seconds(graph.replay, "cuda") / 20 for _ in range(7))
    attend = kernels[min(times, key=times.__getitem__)]

    def forward() -> None:
        for qkv, out, gate_up, down in weights:
            torch.mm(hidden, qkv, out=merged["qkv"])
            attend()
            torch.mm(hidden, out, out=hidden_out)
            torch.mm(hidden, gate_up, out=merged["gate_up"])
            torch.mm(wide, down, out=hidden_out)

    forward()
    graph = captured(forward)
    # What the graph reads has to live as long.
    return lambda kept=(hidden, wide, hidden_out, merged, weights, attend): graph.replay(), times


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of one large square product, the median of ten."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(10))
