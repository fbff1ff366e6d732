# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""AIMv2 vision encoder over packed images: the patches of all images lie end to end in one sequence."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_interpolation_indices_and_weights

from .attention_aimv2_packing import packed_attention
from .configuration_aimv2_packing import Aimv2PackingConfig
from .layout_aimv2_packing import (
    PackedLayout,
    Segments,
    describe,
    is_dense,
    plan_blocks,
    validate_grid_thw,
    validate_layout,
)
from .linear_aimv2_packing import has_hooks, is_cpu_inference, linear, rms_norm


def sincos_table(num_positions: int, dim: int, device: torch.device) -> torch.Tensor:
    """
    Sine and cosine of each position along one side of the grid, float64 of shape `(num_positions, 2 * dim)`. The
    frequencies `10000 ** (-i / dim)` are those of "Attention Is All You Need", section 3.5.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    frequencies = 10000 ** -(torch.arange(dim, dtype=dtype, device=device) / dim)
    angles = torch.arange(num_positions, dtype=dtype, device=device).outer(frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def in_blocks(module: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """
    `module.encode(hidden_states, layout)`; on a CPU in inference one block after the other, which its cache rewards,
    unless something in the module has to see all patches at once.
    """
    if (
        not layout.blocks
        or not is_cpu_inference(hidden_states)
        or module.config._attn_implementation != "sdpa"
        or any(has_hooks(inner) for inner in module.modules() if inner is not module)
    ):
        return module.encode(hidden_states, layout)
    output = None
    for block in layout.blocks:
        own = hidden_states[block.rows]
        # With ones, because not every dtype has a zero.
        padded = F.pad(own, (0, 0, 0, block.padding), value=1.0) if block.padding else own
        encoded = module.encode(padded, layout.of(block))
        if output is None:
            output = encoded.new_empty(len(hidden_states), encoded.shape[-1])
        output[block.rows] = encoded[: len(own)]
    return output


class Aimv2PackingPatchEmbed(nn.Conv2d):
    """The patch convolution as one matrix product over patches that are already cut out."""

    def __init__(self, config: Aimv2PackingConfig):
        super().__init__(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.channels_last = config.patch_layout == "channels_last"

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.weight.permute(0, 2, 3, 1) if self.channels_last else self.weight
        patches, weight = patches.to(weight.dtype), weight.flatten(1)
        if patches.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
            # oneDNN's AMX kernels read past a row that fills no tile, into the next image: its NaN times 0 is NaN.
            padding = -weight.shape[1] % 32
            patches, weight = F.pad(patches, (0, padding)), F.pad(weight, (0, padding))
        return F.linear(patches, weight, self.bias)


class Aimv2PackingPositionEmbedding(nn.Embedding):
    """Learned positions of a square grid, read at any grid by bicubic interpolation."""

    def forward(self, position_ids: torch.Tensor, position_weights: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        table, weights = self.weight.to(dtype), position_weights.to(dtype)
        return F.embedding_bag(position_ids, table, per_sample_weights=weights, mode="sum")


class Aimv2PackingEmbeddings(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.patch_embed = Aimv2PackingPatchEmbed(config)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.is_native:
            num_positions = (config.image_size // config.patch_size) ** 2
            self.position_embedding = Aimv2PackingPositionEmbedding(num_positions, config.hidden_size)

    def forward(self, patches: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        # Under autocast this starts the residual stream in the dtype of the weights, as in the original.
        hidden_states = rms_norm(self.rms_norm, self.patch_embed(patches).to(self.rms_norm.weight.dtype))
        if self.config.is_native:
            table = sincos_table(layout.max_grid_side, self.config.hidden_size // 4, hidden_states.device)
            return hidden_states + table.to(hidden_states.dtype)[layout.position_ids].flatten(1)
        positions = self.position_embedding(layout.position_ids, layout.position_weights)
        return hidden_states + positions.to(hidden_states.dtype)


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

    def forward(self, hidden_states: torch.Tensor, segments: Segments) -> torch.Tensor:
        # -1, not the number of heads: under tensor parallelism a rank holds a part of them.
        query = linear(self.q_proj, hidden_states).unflatten(-1, (-1, self.head_dim))
        key = linear(self.k_proj, hidden_states).unflatten(-1, (-1, self.head_dim))
        value = linear(self.v_proj, hidden_states).unflatten(-1, (-1, self.head_dim))
        return linear(self.out_proj, packed_attention(self, query, key, value, segments).flatten(1))


class Aimv2PackingMLP(nn.Module):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = linear(self.gate_proj, hidden_states, activation=self.act_fn)
        return linear(self.down_proj, linear(self.up_proj, hidden_states, times=gate))


class Aimv2PackingEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Aimv2PackingConfig):
        super().__init__()
        self.config = config
        self.attention = Aimv2PackingAttention(config)
        self.ffn = Aimv2PackingMLP(config)
        self.rms_norm1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rms_norm2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        return in_blocks(self, hidden_states, layout)

    def encode(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(rms_norm(self.rms_norm1, hidden_states), layout.segments)
        return hidden_states + self.ffn(rms_norm(self.rms_norm2, hidden_states))


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
        num_segments = len(layout.segments.cu_seqlens) - 1
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        query = self.cls_token.to(key.dtype).view(1, -1, self.head_dim).expand(num_segments, -1, -1)
        return self.output_proj(
            packed_attention(self, query, key, value, layout.segments, single_query=True).flatten(1)
        )


class Aimv2PackingPreTrainedModel(PreTrainedModel):
    config_class = Aimv2PackingConfig
    base_model_prefix = "aimv2_packing"
    main_input_name = "hidden_states"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Aimv2PackingEmbeddings",
        "Aimv2PackingEncoderLayer",
        "Aimv2PackingAttentionPoolingHead",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Aimv2PackingEncoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Aimv2PackingAttentionPoolingHead):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)


class Aimv2PackingModel(Aimv2PackingPreTrainedModel):
    """AIMv2 over packed images of any sizes, with the weights and outputs of [`~transformers.Aimv2VisionModel`]."""

    def __init__(self, config: Aimv2PackingConfig):
        super().__init__(config)
        self.embeddings = Aimv2PackingEmbeddings(config)
        self.encoder = Aimv2PackingEncoder(config)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.use_head:
            self.head = Aimv2PackingAttentionPoolingHead(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but a checkpoint that leaves a weight at its random
        initial value is an error.

        Raises:
            ValueError: the checkpoint lacks weights of this model.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} is no checkpoint of {cls.__name__}: it lacks {len(missing)} weights, "
                f"{missing[0]!r} first, and holds {len(info['unexpected_keys'])} others. Checkpoints in Apple's layout "
                f"and others are converted by: python convert_weights.py {pretrained_model_name_or_path} OUTPUT_DIR"
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embed

    @property
    def learned_side(self) -> int | None:
        """Side of the square of learned positions; `None` with native ones."""
        return None if self.config.is_native else self.config.image_size // self.config.patch_size

    @torch.compiler.disable
    def prepare_layout(self, grid_thw: torch.Tensor, num_patches: int | None = None) -> PackedLayout:
        """
        Everything that a forward derives from `grid_thw`, computed on the CPU. `forward` calls this itself; call it
        ahead (in a data loader's worker, or outside a compiled region) and pass `layout` instead of `grid_thw`.

        Args:
            grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): Frames, rows and columns of patches.
            num_patches (`int`, *optional*): How many patches `grid_thw` has to describe.

        Raises:
            ValueError: `grid_thw` is not as above, holds a size below 1, or describes 2**31 patches or more.
        """
        grid_thw = validate_grid_thw(grid_thw, num_patches)
        lengths = get_vision_cu_seqlens(grid_thw, merge_temporal=self.config.merge_temporal).diff().tolist()
        if self.config.is_native:
            frames = grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0)
            sizes = frames.prod(dim=1)
            index = torch.arange(int(sizes.sum()), device="cpu") - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            widths = frames[:, 1].repeat_interleave(sizes)
            position_ids, position_weights = torch.stack([index % widths, index // widths], dim=1), None
        else:
            # One more image of one patch, cut off again, makes an empty batch valid.
            position_ids, position_weights = (
                x[:-1]
                for x in get_vision_interpolation_indices_and_weights(
                    F.pad(grid_thw, (0, 0, 0, 1), value=1), self.learned_side, mode="bicubic"
                )
            )
        return PackedLayout(
            segments=Segments.from_lengths(lengths),
            blocks=plan_blocks(lengths) if self.device.type == "cpu" else (),
            max_grid_side=int(grid_thw[:, 1:].max()) if lengths else 0,
            position_ids=position_ids,
            position_weights=position_weights,
            learned_side=self.learned_side,
            merge_temporal=self.config.merge_temporal,
        )

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
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
            layout (`PackedLayout`, *optional*):
                Result of [`~Aimv2PackingModel.prepare_layout`], instead of `grid_thw`; of this model, or of one with
                the same kind of positions and `merge_temporal`. What its tensors hold is not checked.
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
        """
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("`output_attentions` is not supported: the maps of a packed batch have no one shape.")
        patch_dim = self.config.num_channels * self.config.patch_size**2
        if (
            not is_dense(hidden_states)
            or not hidden_states.is_floating_point()
            or hidden_states.dtype == torch.float4_e2m1fn_x2  # two values per element
            or hidden_states.ndim != 2
            or hidden_states.shape[1] != patch_dim
        ):
            raise ValueError(
                f"`hidden_states` must be a tensor of floating-point patches of shape (total_patches, {patch_dim}), "
                f"got {describe(hidden_states)}."
            )
        if hidden_states.is_meta and self.device.type != "meta":
            raise ValueError(f"`hidden_states` is on the meta device, but the model is on {self.device}.")
        if (grid_thw is None) == (layout is None):
            raise ValueError("Give either `grid_thw` or `layout`, got " + ("neither." if layout is None else "both."))
        if layout is None:
            layout = self.prepare_layout(grid_thw, num_patches=len(hidden_states))
        else:
            validate_layout(layout, len(hidden_states), self.learned_side, self.config.merge_temporal)
        layout = layout.to(hidden_states.device)

        last_hidden_state = in_blocks(self, hidden_states, layout)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.head(last_hidden_state, layout) if self.config.use_head else None,
        )

    def encode(self, hidden_states: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        hidden_states = self.encoder(self.embeddings(hidden_states, layout), layout).last_hidden_state
        return rms_norm(self.rms_norm, hidden_states)


__all__ = ["Aimv2PackingModel", "Aimv2PackingPreTrainedModel", "PackedLayout"]
