# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
AIMv2 vision encoder over packed images.

The patches of all images lie end to end in one sequence. `cu_seqlens` says where each segment begins, and attention
stays inside a segment. Everything else in the model works on one patch at a time, and needs no boundaries.

Letters in the comments: N patches of all images together, S segments, D hidden size, H heads, K = D / H head size.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint as torch_checkpoint
from transformers import initialization as init
from transformers import modeling_layers
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, maybe_autocast

from .configuration_aimv2_packing import Aimv2PackingConfig
from .layout_aimv2_packing import (
    MAX_SEGMENTS_PER_CALL,
    VISION_UTILS_NAMES,
    PackedLayout,
    as_indices,
    is_traced,
    kind_of,
    mean_over_segments,
    resolve_layout,
    segment_ids,
    sincos,
    split_by_segments,
    unpack_features,
    validate_hidden_states,
    validate_keyword_arguments,
    wants_attentions,
    with_positions,
    with_runs,
    zero_if_of_one_length,
)


# Attention


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
    """Attention written out, on `(batch, heads, length, head_dim)`; the softmax is in float32."""
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


@torch.compiler.assume_constant_result
def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's own flash attention takes packed `(total_patches, heads, head_dim)` tensors, and may."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """
    PyTorch's own flash attention on packed tensors. Not its `varlen_attn`, which from torch 2.14 on takes cuDNN's
    kernel and builds a plan for nearly every new mix.
    """
    return torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, False, False
    )[0]


def in_several_calls(query: torch.Tensor, layout: PackedLayout) -> bool:
    """Whether there are more segments than a grid of the CUDA kernels holds."""
    return query.is_cuda and layout.cu_seqlens.shape[0] - 1 > MAX_SEGMENTS_PER_CALL and layout.runs is not None


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    one_query: bool = False,
    maps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Attention inside each segment, by the kernel that `config._attn_implementation` names.

    Args:
        module (`nn.Module`): The caller, for its `config` and its `training`.
        query (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): `(num_segments, ...)` with `one_query`.
        key, value (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Packed like the patches.
        layout (`PackedLayout`): Where the segments are.
        one_query (`bool`): Whether each segment has one query rather than one per patch.
        maps (`list`, *optional*): Gets each segment's attention weights `(num_heads, length, length)`, with `eager`.

    Returns:
        `torch.Tensor` of `query`'s shape.
    """
    if key.shape[0] == 0:
        # No kernel takes an empty batch; the sum keeps the gradient of every projection defined.
        return query + key.sum(0) + value.sum(0)
    num_segments = layout.cu_seqlens.shape[0] - 1
    if in_several_calls(query, layout):
        outputs = [
            segment_attention(
                module, query[segments if one_query else patches], key[patches], value[patches], part, one_query, maps
            )
            for segments, patches, part in split_by_segments(layout)
        ]
        return torch.cat(outputs)

    implementation = module.config._attn_implementation
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.config.attention_dropout if module.training else 0.0
    shared = {"scaling": query.shape[-1] ** -0.5, "dropout": dropout, "is_causal": False}
    cu_seqlens_q, max_seqlen_q = layout.cu_seqlens, layout.max_seqlen
    if one_query:
        cu_seqlens_q, max_seqlen_q = torch.arange(num_segments + 1, dtype=torch.int32, device=query.device), 1

    if is_flash_attention_requested(requested_attention_implementation=implementation):
        output, _ = attention_interface(
            module,
            *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),  # (1, H, N, K)
            attention_mask=None,
            cu_seq_lens_q=cu_seqlens_q,
            cu_seq_lens_k=layout.cu_seqlens,
            max_length_q=max_seqlen_q,
            max_length_k=layout.max_seqlen,
            **shared,
        )
        return output.squeeze(0)

    runs = layout.runs
    if implementation == "sdpa" and not dropout and has_varlen_kernel(query.device, query.dtype, query.shape[-1]):
        if num_segments * layout.max_seqlen != key.shape[0]:
            return varlen_attention(query, key, value, cu_seqlens_q, layout.cu_seqlens, max_seqlen_q, layout.max_seqlen)
        # Segments of one length: the dense kernels are faster than the varlen one.
        runs = ((num_segments, layout.max_seqlen),)
    elif runs is None and implementation != "sdpa":
        # A program for any mix: no lengths, so a mask of queries by patches.
        ids = segment_ids(layout.cu_seqlens, key.shape[0])
        query_ids = torch.arange(num_segments, device=ids.device) if one_query else ids
        mask = query_ids.unsqueeze(1) == ids
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return attention_interface(module, query, key, value, attention_mask=mask[None, None], **shared)[0].squeeze(0)

    runs = runs or ((num_segments, -1),)
    states_of_runs = [(query, key, value)]
    if len(runs) > 1:
        keys_per_run = [segments * length for segments, length in runs]
        queries_per_run = [segments for segments, _ in runs] if one_query else keys_per_run
        states_of_runs = list(
            zip(query.split(queries_per_run), key.split(keys_per_run), value.split(keys_per_run), strict=True)
        )
    outputs = []
    # Not `segments`: early CPython 3.13 crashes when a tracer reads a closure's name in a comprehension (gh-128396).
    for (count, length), states in zip(runs, states_of_runs, strict=True):
        lengths = (-1, length, length)
        queries, keys, values = (  # (segments, H, ., K)
            x.unflatten(0, (count, own)).transpose(1, 2) for x, own in zip(states, lengths, strict=True)
        )
        if attention_interface is not sdpa_attention_forward:
            output, weights = attention_interface(module, queries, keys, values, attention_mask=None, **shared)
        else:
            # What it comes to without a mask; its checks take the host a fifth of attention.
            output = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=shared["scaling"])
            output, weights = output.transpose(1, 2), None
        outputs.append(output.flatten(0, 1))
        if maps is not None:
            maps += weights.unbind(0)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# What people replace to see or change products, norms, gates and attention.
FUNCTIONS = {
    **{name: getattr(torch._C._nn, name) for name in ("linear", "scaled_dot_product_attention")},
    **{name: getattr(F, name) for name in ("rms_norm", "silu")},
}
OWN_ATTENTION = segment_attention


def global_change() -> str | None:
    """What watches or changes the layers of every model: a global hook or a replaced function; or `None`."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there is a global forward hook"
    if any(getattr(F, name) is not function for name, function in FUNCTIONS.items()):
        return "a function of torch.nn.functional has been replaced"
    return None if segment_attention is OWN_ATTENTION else "a function of the modeling file has been replaced"


# Gradient checkpointing

# Where modules are defined whose forward draws no random number, but by the `nn.Dropout`s below them.
DETERMINISTIC = {
    __name__,
    "torch.nn.modules.linear",
    "torch.nn.modules.normalization",
    "torch.nn.modules.module",  # containers
    "peft.tuners.lora.layer",
}
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# What torch's `set_checkpoint_debug_enabled` and `set_checkpoint_early_stop` set; `None` outside them.
SET_BY_CONTEXTS = ("_checkpoint_debug_enabled", "_enable_checkpoint_early_stop")


class Aimv2PackingCheckpointingLayer(GradientCheckpointingLayer):
    """
    A layer with a `config`, checkpointed without the state of the random generators where nothing may draw from them:
    to save and restore it once a layer, as `torch.utils.checkpoint` does unless told otherwise, takes about a seventh
    of a step.
    """

    @property
    def _gradient_checkpointing_func(self) -> Any:
        function: Any = self.__dict__.get("_gradient_checkpointing_func")
        # Set by transformers, with the arguments of `torch.utils.checkpoint.checkpoint`.
        keywords = getattr(function, "keywords", {})
        if (
            "use_reentrant" not in keywords
            or "preserve_rng_state" in keywords
            or torch.compiler.is_compiling()
            or may_draw_random_numbers(self)
        ):
            return function
        if keywords == {"use_reentrant": False} and is_from(function.func, torch_checkpoint, torch._compile):
            function = partial(checkpoint, **keywords)
        return partial(function, preserve_rng_state=False)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]):
        self.__dict__["_gradient_checkpointing_func"] = function


def is_from(function: Any, *modules: Any) -> bool:
    """Whether this function, and all that it wraps, is written in these modules: nobody's replacement for it."""
    files = [getattr(module, "__file__", None) for module in modules]
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or code.co_filename not in files:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def checkpoint(function: Callable[..., torch.Tensor], *args: Any, **keywords: bool) -> torch.Tensor:
    """
    [`~torch.utils.checkpoint.checkpoint`] with `use_reentrant=False, preserve_rng_state=False`, and its results. Torch
    keeps books on each saved tensor, which takes the host nearly as long as a layer; what is kept here is an index.
    """
    if (
        not args  # a layer called by keywords
        or not torch.is_grad_enabled()
        or any(getattr(torch_checkpoint, name, None) is not None for name in SET_BY_CONTEXTS)
        or not torch.amp.is_autocast_available(args[0].device.type)
        # Transforms of torch.func, and forward-mode AD, which `SavedInput` has no rules for.
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return torch_checkpoint.checkpoint(function, *args, **keywords)
    forward = RepeatedForward(function, *args)
    with saved_tensors_hooks(forward.pack, forward.unpack):
        return function(*args)


class SavedInput(torch.autograd.Function):
    """Saves a tensor as other operations do: through the caller's hooks, and so that a later change is noticed."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)


class StopForwardError(Exception):
    """All that was saved is there again."""


class RepeatedForward:
    """What a forward saves for its backward pass, computed a second time when that pass asks for it."""

    def __init__(self, function: Callable[..., torch.Tensor], hidden_states: torch.Tensor, *args: Any):
        self.function, self.args = function, args
        self.input: Any = SavedInput.apply(torch.empty(0, requires_grad=True), hidden_states)
        device_type = hidden_states.device.type
        self.autocast = torch.autocast(
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
            torch.is_autocast_cache_enabled(),
        )
        self.kinds: list[tuple[torch.Size, torch.dtype]] = []
        # By backward pass: several may run at once.
        self.tensors: dict[int, dict[int, torch.Tensor]] = {}

    def pack(self, tensor: torch.Tensor) -> int:
        self.kinds.append((tensor.shape, tensor.dtype))
        return len(self.kinds) - 1

    def unpack(self, index: int) -> torch.Tensor:
        tensors = self.tensors.setdefault(torch._C._current_graph_task_id(), {})
        if index not in tensors:
            self.repeat(tensors)
        return tensors.pop(index)

    def keep(self, tensors: dict[int, torch.Tensor], tensor: torch.Tensor) -> None:
        index = len(tensors)
        if (tensor.shape, tensor.dtype) != self.kinds[index]:
            raise torch_checkpoint.CheckpointError(
                f"Tensor {index} that a checkpointed layer saves is {tensor.dtype} of shape {tuple(tensor.shape)} in "
                f"the backward pass, but was {self.kinds[index][1]} of shape {tuple(self.kinds[index][0])} before: "
                "the layer was changed in between."
            )
        tensors[index] = tensor.detach()
        if index + 1 == len(self.kinds):
            raise StopForwardError

    def repeat(self, tensors: dict[int, torch.Tensor]) -> None:
        tensors.clear()
        # Nothing unpacks in the second graph.
        hooks = saved_tensors_hooks(partial(self.keep, tensors), id)
        with torch.enable_grad(), self.autocast, hooks, suppress(StopForwardError):
            self.function(*self.input.grad_fn.saved_tensors, *self.args)
        if len(tensors) != len(self.kinds):
            raise torch_checkpoint.CheckpointError(
                f"A checkpointed layer saves {len(tensors)} tensors in the backward pass, but saved "
                f"{len(self.kinds)} before: the layer was changed in between."
            )


def may_draw_random_numbers(layer: nn.Module) -> bool:
    """Whether a forward in training may draw random numbers: by dropout, or by code that is not known here."""
    implementation = layer.config._attn_implementation
    known = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}.get(implementation)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    flash = is_flash_attention_requested(requested_attention_implementation=implementation)
    if layer.config.attention_dropout or not (interface is known or flash) or global_change() is not None:
        return True
    return not all(map(draws_nothing, layer.modules()))


def draws_nothing(module: nn.Module) -> bool:
    for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
        if not (getattr(hook, "__module__", None) or "").startswith("torch.distributed."):
            return False
    forward = type(module).forward
    # Not only by its `__module__`, which `functools.wraps` copies.
    if "forward" in module.__dict__ or not is_from(forward, sys.modules.get(forward.__module__), modeling_layers):
        return False
    if type(module) in DROPOUTS:
        return not module.training or module.p == 0
    return type(module) in ACTIVATIONS or forward.__module__ in DETERMINISTIC


# Layers


class Aimv2PackingPatchEmbed(nn.Conv2d):
    """The patch convolution as one matrix product over patches `(N, C * P * P)` that are already cut out."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        patches, weight = patches.to(self.weight.dtype), self.weight.flatten(1)
        if patches.device.type == "cpu":
            # oneDNN's AMX kernels read past a row that fills no tile, into the next image: its NaN times 0 is NaN.
            padding = -weight.shape[1] % 32
            patches, weight = F.pad(patches, (0, padding)), F.pad(weight, (0, padding))
        return F.linear(patches, weight, self.bias)  # (N, D)


class Aimv2PackingEmbeddings(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.patch_embed = Aimv2PackingPatchEmbed(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.is_native:
            # Under the names that transformers' exporters look for.
            self.num_grid_per_side = config.image_size // config.patch_size
            self.interpolation_mode = "bicubic"
            self.position_embedding = nn.Embedding(self.num_grid_per_side**2, config.hidden_size)

    def forward(self, patches: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        if self.config.patch_layout == "channels_last":
            size = (self.config.patch_size, self.config.patch_size, self.config.num_channels)
            patches = patches.unflatten(1, size).permute(0, 3, 1, 2).flatten(1)
        # Under autocast this starts the residual stream in the dtype of the weights, as in the original.
        hidden_states = self.rms_norm(self.patch_embed(patches).to(self.rms_norm.weight.dtype))
        layout = with_positions(layout, self.config)
        positions = self.native_positions(layout) if self.config.is_native else self.learned_positions(layout)
        return hidden_states + positions.to(hidden_states)

    def native_positions(self, layout: PackedLayout) -> torch.Tensor:
        # Column first: AIMv2 was trained with [sin_w | cos_w | sin_h | cos_h], as MAE's code has it.
        sides, num_frequencies = torch.flip(layout.position_ids, (1,)), self.config.hidden_size // 4
        if layout.num_positions is None:
            return sincos(sides, num_frequencies).flatten(1)
        # A row or column recurs in every image: few values are computed, and many looked up.
        table = sincos(torch.arange(layout.num_positions, device=sides.device), num_frequencies)
        return F.embedding(sides, table.to(self.rms_norm.weight.dtype)).flatten(1)  # (N, 2, D / 2) -> (N, D)

    def learned_positions(self, layout: PackedLayout) -> torch.Tensor:
        # (N, 16) taps make one product of (N, positions) and (positions, D): a sum of looked up rows has no second
        # derivative. Tap by tap, so that the order of sums where taps coincide is the same on every device.
        indices, weights = torch.split(layout.interp_indices, 1, dim=1), torch.split(layout.interp_weights, 1, dim=1)
        table = self.position_embedding(torch.arange(self.num_grid_per_side**2, device=layout.cu_seqlens.device))
        table = table.to(weights[0].device, torch.promote_types(table.dtype, torch.float32))
        matrix = table.new_zeros(indices[0].shape[0], table.shape[0])
        for index, weight in zip(indices, weights, strict=True):
            matrix = matrix.scatter_add(1, index, weight.to(table.dtype))
        # Under autocast, too, as in the original.
        with maybe_autocast(matrix.device.type, enabled=False):
            return matrix @ table


class Aimv2PackingAttention(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout, maps: list | None = None) -> torch.Tensor:
        # (N, D) -> (N, H, K). -1, not the number of heads: under tensor parallelism a rank holds a part of them.
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return self.out_proj(segment_attention(self, query, key, value, layout, maps=maps).flatten(1))


class Aimv2PackingMLP(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Aimv2PackingEncoderLayer(Aimv2PackingCheckpointingLayer):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.attention = Aimv2PackingAttention(config)
        self.ffn = Aimv2PackingMLP(config)
        self.rms_norm1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rms_norm2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout, maps: list | None = None) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.rms_norm1(hidden_states), layout, maps)
        return hidden_states + self.ffn(self.rms_norm2(hidden_states))


class Aimv2PackingEncoder(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.layers = nn.ModuleList([Aimv2PackingEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: PackedLayout,
        depths: Sequence[int] = (),
        last: bool = True,
        attentions: list | None = None,
    ) -> BaseModelOutput:
        """
        All layers, or without `last` as many as the largest of `depths`, whose states are the `hidden_states`.
        `attentions` gets each layer's list of maps.
        """
        states = [hidden_states] if 0 in depths else []
        for depth, layer in enumerate(self.layers, start=1):
            if not last and depth > max(depths):
                break
            maps: list[torch.Tensor] | None = None if attentions is None else []
            hidden_states = layer(hidden_states, layout, maps)
            if attentions is not None:
                attentions.append(maps)
            if depth in depths:
                states.append(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(states))


class Aimv2PackingAttentionPoolingHead(nn.Module):
    """One learned query attends to each segment."""

    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.output_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        num_segments = layout.cu_seqlens.shape[0] - 1
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        query = self.cls_token.to(key.dtype).view(1, -1, self.head_dim).expand(num_segments, -1, -1)  # (S, H, K)
        return self.output_proj(segment_attention(self, query, key, value, layout, one_query=True).flatten(1))


# Model


class Aimv2PackingPreTrainedModel(PreTrainedModel):
    config_class = Aimv2PackingConfig
    base_model_prefix = "vision_model"
    main_input_name = "hidden_states"
    _input_embed_layer = "patch_embed"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    # Not the embeddings: accelerate's FSDP shards these, and then the patch embedding inside, which fails.
    _no_split_modules = ["Aimv2PackingEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # What `save_pretrained` registers, with the code that the class needs.
    _auto_class = "AutoModel"
    # What a checkpoint may lack; anything, of a class of one's own.
    _newly_initialized: tuple[str, ...] | None = None

    @property
    def merge_temporal(self) -> bool:
        """Whether the frames of a clip attend to each other; transformers' exporters ask for it under this name."""
        config: Any = getattr(self.config, "vision_config", self.config)
        return config.merge_temporal

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Aimv2PackingAttentionPoolingHead):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        newly_initialized: Sequence[str] = (),
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but a checkpoint that leaves a weight at its random
        initial value is an error, unless that weight was named.

        Args:
            newly_initialized (sequence of `str`, *optional*): Modules or weights that may be missing, such as
                `["head"]` to put a new head on a checkpoint without one. Of an image classifier, `"classifier"` always
                may.

        Raises:
            ValueError: the checkpoint lacks weights of this model, or has them in another shape.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        random = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
        named = tuple(f"{name}." for name in (*newly_initialized, *(cls._newly_initialized or ())))
        missing = sorted(name for name in random if not f"{name}.".startswith(named))
        if missing and cls._newly_initialized is not None:
            source = pretrained_model_name_or_path
            advice = (
                "Everything else is there: give `newly_initialized=['head']` to start with random weights in it."
                if all(name.startswith("head.") for name in missing)
                else "Checkpoints in Apple's format and others are converted by: "
                f"python convert_weights.py {source} OUTPUT_DIR"
            )
            raise ValueError(
                f"{source or 'The state dict'} is no checkpoint of {cls.__name__} with this configuration: it lacks "
                f"{len(missing)} weights, {missing[0]!r} first, and holds {len(info['unexpected_keys'])} others. "
                f"{advice}"
            )
        return (model, info) if output_loading_info else model


class Aimv2PackingModel(Aimv2PackingPreTrainedModel):
    """
    AIMv2 over packed images of any sizes, with the weights and outputs of [`~transformers.Aimv2VisionModel`].

    Example:

    ```python
    >>> model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    >>> hidden_states = torch.randn(2 * 3 + 4 * 4, 588)  # two images, end to end
    >>> with torch.inference_mode():
    ...     model(hidden_states, torch.tensor([[1, 2, 3], [1, 4, 4]])).last_hidden_state.shape
    torch.Size([22, 1024])
    ```
    """

    _newly_initialized = ()

    def __init__(self, config: Aimv2PackingConfig):
        # Fields set since it was made, by `from_pretrained` or the caller, have not been looked at.
        config.validate()
        super().__init__(config)
        self.embeddings = Aimv2PackingEmbeddings(config)
        self.encoder = Aimv2PackingEncoder(config)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.use_head:
            self.head = Aimv2PackingAttentionPoolingHead(config)
            # Named only where there is one: accelerate's FSDP looks for every class that is named here.
            self._no_split_modules = [*self._no_split_modules, "Aimv2PackingAttentionPoolingHead"]
        self.post_init()

    def encode(
        self,
        hidden_states: torch.Tensor,
        layout: PackedLayout,
        depths: Sequence[int] = (),
        last: bool = True,
        attentions: list | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """
        The layers, from patches to the final norm.

        Args:
            hidden_states (`torch.Tensor` of shape `(total_patches, num_channels * patch_size**2)`): The patches.
            layout (`PackedLayout`): How they divide.
            depths (sequence of `int`, rising): After how many blocks states are wanted; 0 are the embeddings.
            last (`bool`): Whether the features after the final norm are wanted.
            attentions (`list`, *optional*): Gets each layer's attention weights, one tensor per segment.

        Returns:
            The states of `depths`, before the final norm, and the features or `None`; each `(total_patches,
            hidden_size)`.
        """
        layout = layout.to(hidden_states.device, non_blocking=True)
        embedded = self.embeddings(hidden_states, layout)
        output = self.encoder(embedded, layout, depths, last, attentions)
        return output.hidden_states, self.rms_norm(output.last_hidden_state) if last else None

    def _prepare(self, hidden_states, grid_thw, layout, kwargs: dict[str, Any]) -> tuple[torch.Tensor, PackedLayout]:
        """Checks the arguments of a forward and returns its patches and layout."""
        self._validate_configuration()
        validate_keyword_arguments(kwargs, self.config)
        validate_hidden_states(hidden_states, self.config)
        if hidden_states.is_meta and self.device.type != "meta":
            raise ValueError(f"`hidden_states` is on the meta device, but the model is on {self.device}.")
        layout = resolve_layout(hidden_states, grid_thw, layout, kwargs, self.config)
        if layout.runs is None and not self._reads_cu_seqlens(hidden_states.device):
            if not is_traced():
                return hidden_states, with_runs(layout, hidden_states.shape[0])
            if wants_attentions(kwargs, self.config):
                raise ValueError(
                    "`output_attentions` needs the lengths of the segments, which a program for any mix does not know."
                )
            if self.config._attn_implementation == "sdpa":
                # Batched attention: a program for images of one size.
                return hidden_states + zero_if_of_one_length(layout.cu_seqlens, hidden_states.shape[0]), layout
        return hidden_states, layout

    def _validate_configuration(self) -> None:
        """Refuses what was set after the model was made, and needs other weights."""
        config, own = self.config, getattr(self.embeddings, "num_grid_per_side", None)
        expected = None if config.is_native else config.image_size // config.patch_size
        if expected != own:
            held = "none" if own is None else f"{own} x {own}"
            raise ValueError(
                "`is_native`, `image_size` and `patch_size` of `config` must be those that the model was made with: it "
                f"holds {held} learned positions, the configuration says {expected or 'none'} a side."
            )
        if config.use_head and not hasattr(self, "head"):
            raise ValueError("`use_head` of `config` must be true when the model is made: this one has no head.")

    def _reads_cu_seqlens(self, device: torch.device) -> bool:
        """Whether attention needs no lengths on the host."""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return is_flash_attention_requested(self.config) or (
            self.config._attn_implementation == "sdpa" and has_varlen_kernel(device, self.dtype, head_dim)
        )

    @can_return_tuple
    def get_image_features(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        layout: PackedLayout | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        `forward` with one vector per segment in any case: `pooler_output` is what the head gives, or without a head the
        mean over the patches, `(num_segments, hidden_size)`, not normalised.
        """
        hidden_states, layout = self._prepare(hidden_states, grid_thw, layout, kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in VISION_UTILS_NAMES}
        outputs = self(hidden_states, layout=layout, **{**rest, "return_dict": True})
        if outputs.pooler_output is None:
            outputs.pooler_output = mean_over_segments(outputs.last_hidden_state, layout.cu_seqlens)
        return outputs

    def get_intermediate_layers(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        norm: bool = True,
        layout: PackedLayout | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
        """
        What single blocks give, as DINOv2's method of this name; no block after the last one needed runs.

        Args:
            hidden_states, grid_thw, layout: As for [`~Aimv2PackingModel.forward`].
            n (`int` or sequence of `int`, *optional*, defaults to 1):
                The last `n` blocks, or the 0-based indices of blocks; negative ones count from the end. The output of
                block `k` is `hidden_states[k + 1]` of `output_hidden_states=True`.
            reshape (`bool`, *optional*, defaults to `False`):
                Whether to return a map `(t, h, w, hidden_size)` per image, as [`unpack_features`] does; its sides are
                those of `layout`, or of `grid_thw`.
            norm (`bool`, *optional*, defaults to `True`): Whether to apply the model's final norm.

        Returns:
            `tuple`: Per block `(total_patches, hidden_size)`, or with `reshape` a list of maps; in the order of `n`.

        Raises:
            ValueError: there is no such block, or the arguments of `forward` do not agree.
            TypeError: an argument is for the outputs of `forward`.
        """
        num_blocks = len(self.encoder.layers)
        blocks = list(range(-n, 0)) if isinstance(n, int | Integral) else as_indices("n", n)
        if not blocks or not all(-num_blocks <= block < num_blocks for block in blocks):
            raise ValueError(
                f"`n` must name blocks of {num_blocks}, as a number of them or by 0-based indices, got {n}."
            )
        if reshape and (grids := getattr(layout, "grids", None)) is not None:
            grid_thw = torch.tensor(grids, dtype=torch.int64, device="cpu").view(-1, 3)
        if reshape and grid_thw is None:
            raise ValueError("`grid_thw` must be given with `reshape`, for the sides of the maps.")
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if kwargs.get(name) is not None:
                raise TypeError(f"`{name}` is not an argument of `get_intermediate_layers`.")
        depths = [block % num_blocks + 1 for block in blocks]
        hidden_states, layout = self._prepare(hidden_states, grid_thw, layout, kwargs)
        rising = sorted(set(depths))
        states, _ = self.encode(hidden_states, layout, rising, last=False)
        chosen = dict(zip(rising, map(self.rms_norm, states) if norm else states, strict=True))
        return tuple(unpack_features(chosen[depth], grid_thw) if reshape else chosen[depth] for depth in depths)

    @can_return_tuple
    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        layout: PackedLayout | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(total_patches, num_channels * patch_size**2)`):
                The flattened patches of all images, end to end: image by image, frame by frame, row by row. Cast to
                the dtype of the weights.
            grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`):
                Frames, rows and columns of patches of each image; an image is a video of one frame. On the CPU it
                costs no device synchronisation.
            layout ([`PackedLayout`], *optional*):
                What [`packed_layout`] computed before. `grid_thw` is not read then.
            cu_seqlens, max_seqlen, position_ids, interp_indices, interp_weights (*optional*):
                Computed before by transformers' `vision_utils`, instead of `layout`. `grid_thw` is read for what they
                leave out. Segments of one's own and any subset of an image's patches are given so.
            output_attentions (`bool`, *optional*):
                With `attn_implementation="eager"`, whether to return per layer a list of each segment's attention
                weights `(num_heads, length, length)`.
            output_hidden_states (`bool`, or `int` or list of `int`, *optional*):
                Whether to return the input of the encoder and the output of each layer, `(total_patches,
                hidden_size)` each, before the final norm; or which of them, the others being `None`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~transformers.utils.ModelOutput`] rather than a tuple.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(total_patches, hidden_size)`, after the final norm; `pooler_output` of shape `(num_segments,
            hidden_size)` when `config.use_head`, else `None`.

        Raises:
            ValueError: the arguments have the wrong shape or dtype, or do not agree.
            TypeError: an argument is none of these, and none that transformers passes to every model.
        """
        hidden_states, layout = self._prepare(hidden_states, grid_thw, layout, kwargs)
        chosen = kwargs.get("output_hidden_states")
        depths = self._depths(self.config.output_hidden_states if chosen is None else chosen)
        maps: list | None = [] if wants_attentions(kwargs, self.config) else None
        states, last_hidden_state = self.encode(hidden_states, layout, depths, attentions=maps)
        pooled = None
        if self.config.use_head:
            pooled = self.head(last_hidden_state, layout.to(hidden_states.device, non_blocking=True))
        by_depth = dict(zip(depths, states, strict=True))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=tuple(map(by_depth.get, range(len(self.encoder.layers) + 1))) if depths else None,
            attentions=None if maps is None else tuple(map(list, maps)),
        )

    def _depths(self, chosen: bool | int | Sequence[int] | None) -> list[int]:
        """The depths that `output_hidden_states` asks for, rising. An index out of range selects nothing."""
        if chosen is None or chosen is False:
            return []
        count = len(self.encoder.layers) + 1
        if chosen is True:
            return list(range(count))
        indices = as_indices("output_hidden_states", [chosen] if isinstance(chosen, int | Integral) else chosen)
        return sorted({index % count for index in indices if -count <= index < count})


class Aimv2PackingForImageClassification(Aimv2PackingPreTrainedModel):
    """
    [`Aimv2PackingModel`] and a linear classifier of the vector that `get_image_features` gives per image. The
    classifier may be new; `config.num_labels`, `id2label` and `label2id` are its classes.
    """

    tower_class = Aimv2PackingModel
    _auto_class = "AutoModelForImageClassification"
    _newly_initialized = ("classifier",)

    def __init__(self, config: Aimv2PackingConfig):
        super().__init__(config)
        self.vision_model = self.tower_class._from_config(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            hidden_states, grid_thw, kwargs: As for [`~Aimv2PackingModel.forward`].
            labels (`torch.Tensor` of `num_segments` labels, *optional*):
                For the loss that `config.problem_type` names, as in transformers: integers are classes; real values of
                shape `(num_segments, num_labels)` are targets.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Labels of all batches of a step, as Trainer counts them: the loss is then the part of these images in
                the mean over all. By default it is the mean over these. A `loss_function` of one's own gets it, too.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `logits` of shape `(num_segments, num_labels)`,
            and `loss` where labels were given.

        Raises:
            ValueError: there is not a label per segment, or an argument of [`~Aimv2PackingModel.forward`] is wrong.
        """
        if labels is not None and (not isinstance(labels, torch.Tensor) or labels.ndim == 0):
            raise ValueError(f"`labels` must be a tensor with one label per segment, got {kind_of(labels)}.")
        outputs = self.vision_model.get_image_features(hidden_states, grid_thw, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(labels, logits, kwargs.get("num_items_in_batch")),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, labels: torch.Tensor, logits: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
    ) -> torch.Tensor:
        if len(labels) != len(logits):
            raise ValueError(
                f"`labels` must hold one label per segment, {len(logits)} in all, got shape {tuple(labels.shape)}."
            )
        if not labels.is_floating_point():
            labels = labels.to(torch.int64)
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        loss = self.loss_function(labels, logits, self.config, **given)
        if (
            given
            and self.loss_function is ForSequenceClassificationLoss
            and self.config.problem_type != "single_label_classification"
        ):
            # Of transformers' losses only cross entropy heeds it.
            loss = loss * (labels.numel() / num_items_in_batch)
        return loss


__all__ = ["Aimv2PackingForImageClassification", "Aimv2PackingModel", "Aimv2PackingPreTrainedModel"]
