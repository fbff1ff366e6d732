# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Gradient checkpointing that saves the state of the random generators only where something may draw from them.

Saving and restoring it once a layer, as `torch.utils.checkpoint` does unless told otherwise, costs more time than to
run the layer again.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import is_flash_attention_requested


# Where modules are defined whose forward draws no random number, but by the `nn.Dropout`s below them.
DETERMINISTIC = {
    f"{__name__.rpartition('.')[0]}.modeling_aimv2_packing",
    "torch.nn.modules.linear",
    "torch.nn.modules.normalization",
    "torch.nn.modules.module",  # containers
    "peft.tuners.lora.layer",
}
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Aimv2PackingCheckpointingLayer(GradientCheckpointingLayer):
    """A layer with a `config`. What an outer model sets as its checkpointing function is called as above."""

    @property
    def _gradient_checkpointing_func(self) -> Any:
        function = self.__dict__.get("_gradient_checkpointing_func")
        # Set by transformers, with the arguments of `torch.utils.checkpoint.checkpoint`.
        keywords = getattr(function, "keywords", {})
        if (
            "use_reentrant" not in keywords
            or "preserve_rng_state" in keywords
            or torch.compiler.is_compiling()
            or may_draw_random_numbers(self)
        ):
            return function
        return partial(function, preserve_rng_state=False)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]):
        self.__dict__["_gradient_checkpointing_func"] = function


def may_draw_random_numbers(layer: nn.Module) -> bool:
    """Whether a forward in training may draw random numbers: by dropout, or by code that is not known here."""
    config = layer.config
    if config.attention_dropout or not (
        config._attn_implementation in ("sdpa", "eager") or is_flash_attention_requested(config)
    ):
        return True
    return not all(map(draws_nothing, layer.modules()))


def draws_nothing(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks
    if hooks and not all(map(is_of_torch_distributed, chain(hooks.values(), module._forward_pre_hooks.values()))):
        return False
    if type(module) in DROPOUTS:
        return not module.training or module.p == 0
    return type(module) in ACTIVATIONS or type(module).forward.__module__ in DETERMINISTIC


def is_of_torch_distributed(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
