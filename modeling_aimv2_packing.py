# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
AIMv2 vision encoder over packed images.

The patches of all images lie end to end in one sequence. `cu_seqlens` says where each segment begins, and attention
stays inside a segment. Everything else in the model works on one patch at a time, and needs no boundaries.

Letters in the comments: N patches of all images together, S segments, D hidden size, H heads, K = D / H head size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import get_vision_cu_seqlens

from .configuration_aimv2_packing import Aimv2PackingConfig
from .cuda_engine_aimv2_packing import CudaGraphSettings, laid_side_by_side
from .inference_aimv2_packing import choose_engine
from .layout_aimv2_packing import (
    MAX_SEGMENTS_PER_CALL,
    PackedLayout,
    equal_length_runs,
    resolve_layout,
    sincos,
    validate_hidden_states,
    validate_keyword_arguments,
    with_positions,
)


# Attention


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, on `(batch, heads, length, head_dim)`; the softmax is in float32."""
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether PyTorch's own `varlen_attn`, a flash-attention kernel, takes this `(..., head_dim)` tensor."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    one_query: bool = False,
) -> torch.Tensor:
    """
    Attention inside each segment, by the kernel that `config._attn_implementation` names.

    Args:
        module (`nn.Module`): The caller, for its `config` and its `training`.
        query (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): `(num_segments, ...)` with `one_query`.
        key, value (`torch.Tensor` of shape `(total_patches, num_heads, head_dim)`): Packed like the patches.
        layout (`PackedLayout`): Where the segments are.
        one_query (`bool`): Whether each segment has one query rather than one per patch.

    Returns:
        `torch.Tensor` of `query`'s shape.
    """
    if key.shape[0] == 0:
        # No kernel takes an empty batch; the sum keeps the gradient of every projection defined.
        return query + key.sum(0) + value.sum(0)
    num_segments = layout.cu_seqlens.shape[0] - 1
    if query.is_cuda and num_segments > MAX_SEGMENTS_PER_CALL and layout.runs is not None:
        return attention_in_several_calls(module, query, key, value, layout, one_query)

    implementation = module.config._attn_implementation
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = module.config.attention_dropout if module.training else 0.0
    shared = {"scaling": query.shape[-1] ** -0.5, "dropout": dropout, "is_causal": False}
    cu_seqlens_q, max_seqlen_q = layout.cu_seqlens, layout.max_seqlen
    if one_query:
        cu_seqlens_q, max_seqlen_q = torch.arange(num_segments + 1, dtype=torch.int32, device=query.device), 1

    if is_flash_attention_requested(module.config):
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

    runs = layout.runs or ((num_segments, key.shape[0] // num_segments),)
    if implementation == "sdpa" and not dropout and has_varlen_kernel(query):
        if num_segments * layout.max_seqlen != key.shape[0]:
            return varlen_attn(query, key, value, cu_seqlens_q, layout.cu_seqlens, max_seqlen_q, layout.max_seqlen)
        # Segments of one length: the dense kernels are faster than the varlen one.
        runs = ((num_segments, layout.max_seqlen),)

    keys_per_run = [segments * length for segments, length in runs]
    queries_per_run = [segments for segments, _ in runs] if one_query else keys_per_run
    outputs = []
    for (segments, _), *states in zip(
        runs, query.split(queries_per_run), key.split(keys_per_run), value.split(keys_per_run), strict=True
    ):
        queries, keys, values = (x.unflatten(0, (segments, -1)).transpose(1, 2) for x in states)  # (segments, H, ., K)
        output, _ = attention_interface(module, queries, keys, values, attention_mask=None, **shared)
        outputs.append(output.flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attention_in_several_calls(module, query, key, value, layout: PackedLayout, one_query: bool) -> torch.Tensor:
    """[`segment_attention`] for more segments than one call of a CUDA kernel takes."""
    lengths, outputs = layout.lengths, []
    starts = [0, *accumulate(lengths)]
    for first in range(0, len(lengths), MAX_SEGMENTS_PER_CALL):
        last = min(first + MAX_SEGMENTS_PER_CALL, len(lengths))
        keys = slice(starts[first], starts[last])
        part = layout._replace(
            runs=equal_length_runs(lengths[first:last]),
            cu_seqlens=layout.cu_seqlens[first : last + 1] - layout.cu_seqlens[first],
            max_seqlen=max(lengths[first:last]),
        )
        queries = query[first:last] if one_query else query[keys]
        outputs.append(segment_attention(module, queries, key[keys], value[keys], part, one_query))
    return torch.cat(outputs)


# Layers


class Aimv2PackingPatchEmbed(nn.Conv2d):
    """The patch convolution as one matrix product over patches `(N, C * P * P)` that are already cut out."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        patches, weight = patches.to(self.weight.dtype), self.weight.flatten(1)
        if patches.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
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
        return hidden_states + positions.to(hidden_states.dtype)

    def native_positions(self, layout: PackedLayout) -> torch.Tensor:
        # Column first: AIMv2 was trained with [sin_w | cos_w | sin_h | cos_h], as MAE's code has it.
        sides, num_frequencies = layout.position_ids.flip(1), self.config.hidden_size // 4
        if layout.num_positions is None:
            return sincos(sides, num_frequencies).flatten(1)
        # A row or column recurs in every image: few values are computed, and many looked up.
        table = sincos(torch.arange(layout.num_positions, device=sides.device), num_frequencies)
        return table.to(self.rms_norm.weight.dtype)[sides].flatten(1)  # (N, 2, D / 2) -> (N, D)

    def learned_positions(self, layout: PackedLayout) -> torch.Tensor:
        indices = torch.arange(self.num_grid_per_side**2, device=layout.interp_indices.device)
        table = self.position_embedding(indices)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        weights = layout.interp_weights.to(table.dtype)
        return F.embedding_bag(layout.interp_indices, table, per_sample_weights=weights, mode="sum")


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

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        # (N, D) -> (N, H, K). -1, not the number of heads: under tensor parallelism a rank holds a part of them.
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return self.out_proj(segment_attention(self, query, key, value, layout).flatten(1))


class Aimv2PackingMLP(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Aimv2PackingEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.attention = Aimv2PackingAttention(config)
        self.ffn = Aimv2PackingMLP(config)
        self.rms_norm1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rms_norm2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.rms_norm1(hidden_states), layout)
        return hidden_states + self.ffn(self.rms_norm2(hidden_states))


class Aimv2PackingEncoder(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.layers = nn.ModuleList([Aimv2PackingEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout) -> BaseModelOutput:
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout)
        return BaseModelOutput(last_hidden_state=hidden_states)


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
    _no_split_modules = ["Aimv2PackingEmbeddings", "Aimv2PackingEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Aimv2PackingEncoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Aimv2PackingAttentionPoolingHead):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)


def refuse_random_weights(cls: type, source: str, info: dict[str, Any], newly_initialized: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the checkpoint lacks weights of this model that are not, and are not in, `newly_initialized`.
    """
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not any(f"{name}.".startswith(f"{part}.") for part in newly_initialized)
    )
    if not missing:
        return
    advice = (
        "Everything else is there: give `newly_initialized=['head']` to start with random weights in it."
        if all(name.startswith("head.") for name in missing)
        else f"Checkpoints in Apple's format and others are converted by: python convert_weights.py {source} OUTPUT_DIR"
    )
    raise ValueError(
        f"{source} is no checkpoint of {cls.__name__} with this configuration: it lacks {len(missing)} weights, "
        f"{missing[0]!r} first, and holds {len(info['unexpected_keys'])} others. {advice}"
    )


class Aimv2PackingModel(Aimv2PackingPreTrainedModel):
    """
    AIMv2 over packed images of any sizes, with the weights and outputs of [`~transformers.Aimv2VisionModel`].

    Attributes:
        use_engines (`bool`, defaults to `True`): Whether an inference engine may run the layers where it gives the same
            features faster.
        path (`str`): How the last forward ran: the name of an engine, or `"plain: "` and why none could.
    """

    use_engines = True
    path = "plain: no forward has run"
    cuda_graph_settings = CudaGraphSettings()

    def __init__(self, config: Aimv2PackingConfig):
        super().__init__(config)
        self.embeddings = Aimv2PackingEmbeddings(config)
        self.encoder = Aimv2PackingEncoder(config)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.use_head:
            self.head = Aimv2PackingAttentionPoolingHead(config)
            # Named only where there is one: accelerate's FSDP looks for every class that is named here.
            self._no_split_modules = [*self._no_split_modules, "Aimv2PackingAttentionPoolingHead"]
        self.post_init()

    def _apply(self, *args, **kwargs):
        with laid_side_by_side(self):
            return super()._apply(*args, **kwargs)

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
                `["head"]` to put a new head on a checkpoint without one.

        Raises:
            ValueError: the checkpoint lacks weights of this model.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        refuse_random_weights(cls, pretrained_model_name_or_path, info, newly_initialized)
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def get_image_features(
        self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        `forward` with one vector per segment in any case: `pooler_output` is what the head gives, or without a head the
        mean over the patches, `(num_segments, hidden_size)`, not normalised.
        """
        outputs = self(hidden_states, grid_thw, **{**kwargs, "return_dict": True})
        if outputs.pooler_output is None:
            features = outputs.last_hidden_state
            lengths = get_vision_cu_seqlens(grid_thw, merge_temporal=self.config.merge_temporal).diff()
            lengths = lengths.to(features.device, non_blocking=True)
            # In float32: thousands of patches add up. Unsafe: the checks would wait for the device.
            mean = torch.segment_reduce(features.float(), "mean", lengths=lengths, unsafe=True)
            outputs.pooler_output = mean.to(features.dtype)
        return outputs

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, hidden_states: torch.Tensor | None = None, grid_thw: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(total_patches, num_channels * patch_size**2)`):
                The flattened patches of all images, end to end: image by image, frame by frame, row by row. Cast to
                the dtype of the weights.
            grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`):
                Frames, rows and columns of patches of each image; an image is a video of one frame. On the CPU it
                costs no device synchronisation.
            runs, cu_seqlens, max_seqlen, grids, frame_sizes, num_positions, position_ids, interp_indices,
            interp_weights (*optional*):
                Fields of a [`PackedLayout`] computed ahead, by [`packed_layout`] or by transformers' `vision_utils`.
                `grid_thw` is not read where they say everything. Traced without `runs`, they are for segments of one
                length.
            output_hidden_states (`bool`, *optional*):
                Whether to return the input of the encoder and the output of each layer, `(total_patches,
                hidden_size)` each, before the final norm.
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
        validate_keyword_arguments(kwargs, self.config)
        validate_hidden_states(hidden_states, self.config, self.device)
        given = {name: kwargs[name] for name in PackedLayout._fields if kwargs.get(name) is not None}
        layout = resolve_layout(grid_thw, given, self.config, hidden_states)

        output_hidden_states = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        engine = choose_engine(self, hidden_states, layout, bool(output_hidden_states))
        if engine is not None:
            last_hidden_state = engine.encode(self, hidden_states, layout)
        else:
            embedded = self.embeddings(hidden_states, layout)
            last_hidden_state = self.rms_norm(self.encoder(embedded, layout).last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.head(last_hidden_state, layout) if self.config.use_head else None,
        )


__all__ = ["Aimv2PackingModel", "Aimv2PackingPreTrainedModel"]
