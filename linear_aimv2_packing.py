# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Linear layers and norms on a CPU in inference: one oneDNN kernel for a product and what follows it, where there is one;
elsewhere, and wherever something has wrapped a module, the module itself.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers.activations import ACT2FN


SILU = type(ACT2FN["silu"])


def has_hooks(module: nn.Module) -> bool:
    """Whether something observes or replaces the module's forward: then it has to be called, and with all patches."""
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return bool(module._forward_hooks or module._forward_pre_hooks or replaced)


def is_cpu_inference(hidden_states: torch.Tensor) -> bool:
    """Whether a forward of this tensor is on a CPU, without gradients or a compiler."""
    return hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cache
def has_bfloat16_kernel() -> bool:
    """Whether this CPU has instructions for which oneDNN has bfloat16 kernels."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_onednn_kernel(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether oneDNN takes this product: a plain `nn.Linear` that nothing has wrapped, quantised or sharded."""
    if not is_cpu_inference(hidden_states) or torch.is_autocast_enabled("cpu") or hidden_states.numel() == 0:
        return False
    if type(module) is not nn.Linear or has_hooks(module):
        return False
    weight, bfloat16 = module.weight, hidden_states.dtype == torch.bfloat16
    return (
        type(weight) is nn.Parameter
        and type(hidden_states) is torch.Tensor
        and hidden_states.dtype == weight.dtype
        and (bfloat16 or hidden_states.dtype == torch.float32)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (not bfloat16 or has_bfloat16_kernel())
    )


def linear(
    module: nn.Module,
    hidden_states: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    times: torch.Tensor | None = None,
) -> torch.Tensor:
    """`module(hidden_states)`, then `activation` of it, then `times` it."""
    fused = activation is None or isinstance(activation, SILU)
    if fused and has_onednn_kernel(module, hidden_states):
        # What torch.compile calls on a CPU: rounded once, after the activation or the product.
        kernel, arguments = torch.ops.mkldnn._linear_pointwise, (module.weight, module.bias)
        if times is None:
            return kernel(hidden_states, *arguments, "none" if activation is None else "swish", [], "")
        if activation is None:
            return kernel.binary(hidden_states, times, *arguments, "mul")
    output = module(hidden_states)
    output = output if activation is None else activation(output)
    return output if times is None else times * output


def rms_norm(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`module(hidden_states)`, by fewer passes over the patches than `nn.RMSNorm` takes on a CPU."""
    plain = type(module) is nn.RMSNorm and type(module.weight) is nn.Parameter and not has_hooks(module)
    if not (plain and module.weight.dtype == hidden_states.dtype and is_cpu_inference(hidden_states)):
        return module(hidden_states)
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / hidden_states.shape[-1]
    return (wide * (mean_square + module.eps).rsqrt()).mul_(module.weight).to(hidden_states.dtype)
