# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What lies between an encoder's matrix products, each in one pass over the patches: two Triton kernels."""

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def add_rms_norm_kernel(
        residual, delta, weight, output, eps, size: tl.constexpr, block: tl.constexpr, add: tl.constexpr
    ):
        # 64 bits: a batch may hold more than 2**31 values.
        row = tl.program_id(0).to(tl.int64) * size
        columns = tl.arange(0, block)
        inside = columns < size
        values = tl.load(residual + row + columns, mask=inside, other=0.0)
        if add:
            added = tl.load(delta + row + columns, mask=inside, other=0.0).to(tl.float32)
            values = (values.to(tl.float32) + added).to(values.dtype)
            tl.store(residual + row + columns, values, mask=inside)
        wide = values.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row + columns, (wide * scale * weights).to(values.dtype), mask=inside)

    @triton.jit
    def silu_mul_kernel(gate_up, output, size: tl.constexpr, block: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < size
        gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0)
        up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
        wide = gate.to(tl.float32)
        tl.store(output + row * size + columns, (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype), mask=inside)


def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """
    `residual += delta` in place, unless `delta` is `None`; then `out = residual / rms(residual) * weight`.

    Sums and norm are in float32, each result is rounded once: the sum as PyTorch's, the norm as `nn.RMSNorm`'s.

    Args:
        residual, delta, out (`torch.Tensor` of shape `(patches, size)`): Contiguous, of one dtype of at most 32 bits.
        weight (`torch.Tensor` of shape `(size,)`): Of the same dtype.
        eps (`float`): Added to the mean square.
    """
    patches, size = residual.shape
    block = triton.next_power_of_2(size)
    added = residual if delta is None else delta
    add_rms_norm_kernel[(patches,)](
        residual, added, weight, out, eps, size, block, delta is not None, num_warps=max(1, min(8, block // 256))
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """
    `out = silu(gate) * up`, in float32 and rounded once.

    Args:
        gate_up (`torch.Tensor` of shape `(patches, 2 * size)`): `gate` left of `up`; contiguous.
        out (`torch.Tensor` of shape `(patches, size)`): Contiguous, of the same dtype of at most 32 bits.
    """
    patches, size = out.shape
    silu_mul_kernel[(patches, triton.cdiv(size, 1024))](gate_up, out, size, 1024, num_warps=4)
