# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder on an NVIDIA GPU in inference: merged products, Triton kernels between them, and CUDA graphs for any mix.

It owns no weights: it reads the parameters where they lie. Products of several are one where their weights lie side by
side, and [`lay_weights`] lays them so when they arrive on a GPU.

Patches are padded to a size that recurs. A graph serves every batch of its size: what divides it is an input.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .cuda_graphs_aimv2_packing import (
    Graph,
    Graphs,
    Product,
    addresses_of,
    are_adjacent,
    lay_side_by_side,
    memory_of,
    products_of,
    whole_of,
)
from .layout_aimv2_packing import MAX_SEGMENTS_PER_CALL, PackedLayout, with_positions
from .triton_kernels_aimv2_packing import (
    add_rms_norm,
    blas_keeps_order,
    blas_numerics,
    learned_positions,
    locate_patches,
    multiply,
    native_positions,
    products_compile,
    segment_attention,
    silu_mul,
    swiglu,
    triton,
)


logger = logging.getLogger(__name__)

# (module, qkv), the latter of shape (patches, 3, heads, head_dim), to the attended values (patches, heads, head_dim).
Attention = Callable[..., torch.Tensor]

HALF = (torch.float16, torch.bfloat16)

# Products of more patches run in pieces of so many: their sizes are a finite list.
PATCHES_PER_PRODUCT = 20480

# Hidden states of layers that a graph may keep: of so many times the patches of the largest graph.
STATES_PER_PATCH = 4


@dataclass(frozen=True)
class CudaGraphSettings:
    """
    Attributes:
        max_graph_patches (`int`): Batches of more patches run without a CUDA graph; 0 for none at all.
        max_graphs (`int`): How many graphs a model may hold; all share their memory.
        same_bits (`bool`): Whether an image has the same features, bit for bit, alone and in any batch: on Hopper, in
            half precision, with `attn_implementation="sdpa"`.
    """

    max_graph_patches: int = 20480
    max_graphs: int = 64
    same_bits: bool = True


class Budget(NamedTuple):
    """
    What a batch is padded to, and what a graph of it has in it for good.

    Attributes:
        patches, segments (`int`): How many at most, padding included.
        longest (`int`): Patches of the longest segment at most, where attention needs a bound.
        depths, last: What is wanted, as in [`encode`].
        has_frames (`bool`): Whether positions follow from the sizes of frames, or else are inputs.
        same_bits (`bool`): Whether the sums of products have a fixed order.
        attention, patch_layout (`str`): Of the configuration.
        numerics (`tuple`): PyTorch's settings of cuBLAS.
        eps (`tuple[float, ...]`): Of all norms.
    """

    patches: int
    segments: int
    longest: int
    depths: tuple[int, ...]
    last: bool
    has_frames: bool
    same_bits: bool
    attention: str
    patch_layout: str
    numerics: tuple
    eps: tuple[float, ...]


def power_of_two(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def padded_size(patches: int) -> int:
    """`patches` rounded up to one of 16 sizes per doubling, at least 64 and at most 256 apart."""
    step = min(256, max(64, power_of_two(patches, 1) // 32))
    return -(-patches // step) * step


# Weights


def merged_parameters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that one product reads together."""
    for layer in model.encoder.layers:
        for block, names in (("attention", ("q_proj", "k_proj", "v_proj")), ("ffn", ("gate_proj", "up_proj"))):
            linears = [getattr(getattr(layer, block, None), name, None) for name in names]
            for kind in ("weight", "bias"):
                parameters = [getattr(linear, kind, None) for linear in linears]
                if all(isinstance(parameter, torch.Tensor) for parameter in parameters):
                    yield parameters


def lay_weights(model: nn.Module, before: dict[int, int] | None = None) -> None:
    """
    Lays weights on a GPU side by side where one product can read them together; each keeps a storage of its own. For a
    model that has just come there: others may know the addresses of one that was, so what is in `before` stays.
    """
    now = addresses_of(model)
    for parameters in merged_parameters(model):
        arrived = all(id(own) in now and now[id(own)] != (before or {}).get(id(own)) for own in parameters)
        reason = lay_side_by_side(parameters) if arrived and not are_adjacent(parameters) else None
        if reason is not None:
            logger.debug("Products of %s stay apart: %s", [tuple(own.shape) for own in parameters], reason)


# The engine


class Layer(NamedTuple):
    attention: nn.Module
    norm1: nn.RMSNorm
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    norm2: nn.RMSNorm
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear

    @property
    def widths(self) -> tuple[int, int]:
        """Of the attended and of the gated values; in a pruned layer less than the configuration says."""
        return self.out.weight.shape[1], self.down.weight.shape[1]


class Buffers(NamedTuple):
    """
    Memory for the activations of so many patches; what is needed at different times shares it.

    Attributes:
        patches: In rows of a multiple of 16 bytes, which products want; what fills them up is zero.
        residual, normed, attended, activated: Of a layer; the last before the product down.
        wide: Query, key and value; and gate and up, where they are not one kernel with what joins them.
    """

    patches: torch.Tensor
    residual: torch.Tensor
    normed: torch.Tensor
    attended: torch.Tensor
    activated: torch.Tensor
    wide: torch.Tensor


class Inputs:
    """What a forward of a budget reads, and the first rows of buffers, by their names."""

    def __init__(self, budget: Budget, buffers: Buffers, is_native: bool):
        self.budget, self.buffers = budget, Buffers(*(buffer[: budget.patches] for buffer in buffers))
        device = buffers.patches.device
        # The number of segments, `cu_seqlens`, and of the frames the rows and the columns.
        self.segments = torch.zeros(3 * budget.segments + 2, dtype=torch.int32, device=device)
        kinds = ((2, torch.int64),) if is_native else ((16, torch.int64), (16, torch.float32))
        self.positions = [
            torch.zeros(budget.patches, width, dtype=dtype, device=device)
            for width, dtype in (() if budget.has_frames else kinds)
        ]

    def load(self, patches: torch.Tensor, layout: PackedLayout) -> None:
        own, patch_dim = patches.shape
        self.buffers.patches[:own, :patch_dim].copy_(patches)
        if self.budget.attention != "sdpa":
            # A kernel of the user's choice may read past a segment's end.
            self.buffers.patches[own:].zero_()
        count = layout.cu_seqlens.new_full((1,), len(layout.cu_seqlens) - 1)
        parts = [count, layout.cu_seqlens]
        if self.budget.has_frames and layout.frame_sizes is not None:
            parts.append(layout.frame_sizes.view(-1))
        segments = torch.cat(parts)
        self.segments[: len(segments)].copy_(segments, non_blocking=True)
        given = (layout.position_ids,) if len(self.positions) == 1 else (layout.interp_indices, layout.interp_weights)
        for position, value in zip(self.positions, given, strict=False):
            position[:own].copy_(value, non_blocking=True)

    def part(self, name: str, width: int) -> torch.Tensor:
        """As much of a buffer as rows of this width need."""
        patches = self.budget.patches
        return getattr(self.buffers, name).view(-1)[: patches * width].view(patches, width)


class Engine:
    """What is tied to one model's modules and to where their parameters lie: buffers and graphs."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]):
        config = model.config
        self.lock = threading.Lock()
        self.config, self.embeddings, self.is_native = config, model.embeddings, config.is_native
        self.layers = [
            Layer(
                *(own.attention, own.rms_norm1, (own.attention.q_proj, own.attention.k_proj, own.attention.v_proj)),
                *(own.attention.out_proj, own.rms_norm2, (own.ffn.gate_proj, own.ffn.up_proj), own.ffn.down_proj),
            )
            for own in model.encoder.layers
        ]
        self.norms = [*(layer.norm1 for layer in self.layers), model.rms_norm]
        self.all_norms = [*self.norms, *(layer.norm2 for layer in self.layers), self.embeddings.rms_norm]
        self.memory = memory_of(parameters)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        self.hidden_size, self.head_dim = config.hidden_size, self.layers[0].attention.head_dim
        self.patch_dim = config.num_channels * config.patch_size**2
        half_on_hopper = self.device.type == "cuda" and self.dtype in HALF and capability_of(self.device)[0] == 9
        # Measured on Hopper; docs/kernels.md.
        has_descriptors = half_on_hopper and products_compile(self.dtype, self.device)
        self.has_own_attention = has_descriptors and self.head_dim in (16, 32, 64, 128)
        widths = [self.hidden_size, *(width for layer in self.layers for width in layer.widths)]
        self.has_own_products = has_descriptors and not any(width % 8 for width in widths)
        self.fuses_gate = self.has_own_products and all(
            gate.bias is None and up.bias is None and are_adjacent([gate.weight, up.weight])
            for gate, up in map(attrgetter("gate_up"), self.layers)
        )
        # Freed in this order: a graph that still runs is waited for, then its buffers go.
        self.graphs = Graphs(self.device)
        self.buffers: list[Buffers] = []
        exponents = torch.arange(self.hidden_size // 4, dtype=torch.float64, device="cpu") / (self.hidden_size / 4)
        # A copy from the CPU that is waited for, so that any stream may read it.
        self.frequencies = (10000**-exponents).to(self.device)

    def budget_of(
        self, lengths: tuple[int, int, int], has_frames: bool, depths: tuple[int, ...], last: bool, same_bits: bool
    ) -> Budget:
        """The smallest budget that recurs and fits so many patches, so many segments, and the longest."""
        (patches, segments, longest), attention = lengths, self.config._attn_implementation
        size, own_attention = padded_size(patches), self.has_own_attention and attention == "sdpa"
        bounds = (power_of_two(segments + 1, 16), power_of_two(max(longest, size - patches), 256))
        return Budget(
            *(size, *((size, size) if own_attention else bounds), depths, last, has_frames),
            *(same_bits and self.has_own_products and own_attention, attention, self.config.patch_layout),
            *(blas_numerics(), tuple(map(attrgetter("eps"), self.all_norms))),
        )

    def new_buffers(self, patches: int) -> Buffers:
        hidden_size = self.hidden_size
        attended, size = map(max, zip(*(layer.widths for layer in self.layers), strict=True))
        widths = (hidden_size, hidden_size, attended, size, max(3 * attended, 0 if self.fuses_gate else 2 * size))
        like = {"dtype": self.dtype, "device": self.device}
        padded = torch.zeros(patches, -(-self.patch_dim // 8) * 8, **like)
        return Buffers(padded, *(torch.empty(patches, width, **like) for width in widths))

    def graph_of(self, budget: Budget, settings: CudaGraphSettings, after: int | None = 1) -> Graph | None:
        """The graph of this budget, captured if it came so many times before, unless that is `None`; or `None`."""
        most = settings.max_graph_patches
        # States of layers are memory of a graph's own.
        if budget.patches > most or budget.patches * len(budget.depths) > STATES_PER_PATCH * most:
            return None
        with self.lock:
            graph = self.graphs.find(budget)
            if graph is None and after is not None and self.graphs.should_capture(budget, settings.max_graphs, after):
                # Tensors made in inference mode could not be written to outside it.
                with torch.inference_mode(False), torch.no_grad():
                    # Graphs captured one by one would each add their own, so they share the smallest large enough.
                    fitting = [own for own in self.buffers if len(own.patches) >= budget.patches]
                    if not fitting:
                        fitting = [self.new_buffers(min(power_of_two(budget.patches, 1024), padded_size(most)))]
                        self.buffers += fitting
                    inputs = Inputs(budget, min(fitting, key=lambda own: len(own.patches)), self.is_native)
                graph = self.graphs.capture(budget, settings.max_graphs, inputs, lambda: self.run(inputs))
        return graph

    def run(self, inputs: Inputs, lengths: Sequence[int] = ()) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Hidden states after each of the budget's depths, tensors of their own; and the features, which lie in a buffer.

        Args:
            inputs (`Inputs`): Loaded.
            lengths (`Sequence[int]`): Patches of each segment, where there are more than one call of attention takes.
        """
        budget, buffers = inputs.budget, inputs.buffers
        residual, normed = buffers.residual, buffers.normed
        located = locate_patches(inputs.segments, budget.patches, budget.has_frames)
        attend = self.attention(inputs, located, lengths)
        self.embed(inputs)
        self.positions(inputs, located, out=buffers.attended)
        add_rms_norm(residual, buffers.attended, self.norms[0].weight, self.norms[0].eps, out=normed)
        states = [residual.clone()] if 0 in budget.depths else []
        blocks = len(self.layers) if budget.last else max(budget.depths, default=0)
        for depth, (layer, next_norm) in enumerate(zip(self.layers[:blocks], self.norms[1:], strict=False), start=1):
            width, size = layer.widths
            qkv, activated = inputs.part("wide", 3 * width), inputs.part("activated", size)
            for product in products_of(*layer.qkv):
                self.multiply(product, normed, qkv, budget)
            attended = attend(layer.attention, qkv.view(budget.patches, 3, -1, self.head_dim))
            self.add_and_norm(layer.out, attended.flatten(1), layer.norm2, inputs)
            if self.fuses_gate:
                swiglu(normed, whole_of([linear.weight for linear in layer.gate_up]), out=activated)
            else:
                gate_up = inputs.part("wide", 2 * size)
                for product in products_of(*layer.gate_up):
                    self.multiply(product, normed, gate_up, budget)
                silu_mul(gate_up, out=activated)
            self.add_and_norm(layer.down, activated, next_norm, inputs)
            if depth in budget.depths:
                states.append(residual.clone())
        return states, normed

    def embed(self, inputs: Inputs) -> None:
        """Patches to the residual stream, without their positions."""
        patch_embed, norm, out = self.embeddings.patch_embed, self.embeddings.rms_norm, inputs.buffers.normed
        weight, patches = patch_embed.weight, inputs.buffers.patches
        weight = (weight.permute(0, 2, 3, 1) if inputs.budget.patch_layout == "channels_last" else weight).flatten(1)
        weight = F.pad(weight, (0, patches.shape[1] - weight.shape[1]))
        self.multiply(Product(weight, patch_embed.bias, slice(None)), patches, out, inputs.budget)
        add_rms_norm(out, None, norm.weight, norm.eps, out=inputs.buffers.residual)

    def positions(self, inputs: Inputs, located: torch.Tensor, out: torch.Tensor) -> None:
        if self.is_native:
            rows, columns = located[2:4] if inputs.budget.has_frames else inputs.positions[0].unbind(1)
            native_positions(rows, columns, self.frequencies, out)
        else:
            learned_positions(located, inputs.positions, self.embeddings.position_embedding.weight.contiguous(), out)

    def multiply(self, product: Product, states: torch.Tensor, out: torch.Tensor, budget: Budget) -> None:
        """The product's columns of `out`."""
        weight, numerics = product.weight.contiguous(), budget.numerics if budget.same_bits else None
        rows = (x.split(PATCHES_PER_PRODUCT) for x in (states, out[:, product.columns]))
        for some, their_out in zip(*rows, strict=True):
            multiply(some, weight, product.bias, their_out, numerics)

    def add_and_norm(self, linear: nn.Linear, states: torch.Tensor, norm: nn.RMSNorm, inputs: Inputs) -> None:
        residual, normed, budget = inputs.buffers.residual, inputs.buffers.normed, inputs.budget
        # A sum inside the product is the fastest, and rounded as one after it.
        pieces = {len(some) for some in states.split(PATCHES_PER_PRODUCT)} if budget.same_bits else ()
        kinds = [((rows, states.shape[1]), self.hidden_size, False, residual, budget.numerics, True) for rows in pieces]
        adds = linear.bias is None and all(blas_keeps_order(*kind) for kind in kinds)
        for some, out in zip(*(x.split(PATCHES_PER_PRODUCT) for x in (states, residual)), strict=True) if adds else ():
            out.addmm_(some, linear.weight.t())
        if not adds:
            self.multiply(Product(linear.weight, linear.bias, slice(None)), states, normed, budget)
        add_rms_norm(residual, None if adds else normed, norm.weight, norm.eps, out=normed)

    def attention(self, inputs: Inputs, located: torch.Tensor, lengths: Sequence[int]) -> Attention:
        """
        The fastest kernel for these segments, by the measurements in docs/kernels.md; one that the user chose by name
        is not second-guessed.
        """
        budget = inputs.budget
        if self.has_own_attention and budget.attention == "sdpa":
            return lambda module, qkv: segment_attention(
                qkv, located, inputs.part("attended", qkv[0, 0].numel()).view(qkv[:, 0].shape)
            )
        # Segments that a batch lacks begin and end where the padding ends.
        at = torch.arange(budget.segments + 1, dtype=torch.int32, device=self.device)
        cu_seqlens = torch.where(at <= inputs.segments[0], inputs.segments[1 : budget.segments + 2], budget.patches)
        if not lengths:
            return self.attention_by_segments(cu_seqlens, budget)
        parts, start, lengths = [], 0, [*lengths, budget.patches - sum(lengths)]
        for first in range(0, len(lengths), MAX_SEGMENTS_PER_CALL):
            own = lengths[first : first + MAX_SEGMENTS_PER_CALL]
            attend = self.attention_by_segments(cu_seqlens[first : first + len(own) + 1] - start, budget)
            parts.append((slice(start, start + sum(own)), attend))
            start += sum(own)
        return lambda module, qkv: torch.cat([attend(module, qkv[rows]) for rows, attend in parts])

    def attention_by_segments(self, cu_seqlens: torch.Tensor, budget: Budget) -> Attention:
        """By kernels of PyTorch's, or of the user's choice."""
        bounds = (cu_seqlens, cu_seqlens, budget.longest, budget.longest)
        if budget.attention != "sdpa":
            interface = ALL_ATTENTION_FUNCTIONS[budget.attention]
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            options = {"dropout": 0.0, "scaling": self.head_dim**-0.5, "is_causal": False, "attention_mask": None}
            options |= dict(zip(names, bounds, strict=True))
            return lambda module, qkv: interface(
                module, *(x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1)), **options
            )[0].squeeze(0)
        if self.dtype in HALF and capability_of(self.device) >= (8, 0):
            # What `varlen_attn` calls, which adds a kernel for the state of a dropout that it lacks.
            flash = torch.ops.aten._flash_attention_forward
            return lambda module, qkv: flash(*qkv.unbind(1), *bounds, 0.0, False, False)[0]
        efficient = torch.ops.aten._efficient_attention_forward
        return lambda module, qkv: efficient(*qkv.unsqueeze(0).unbind(2), None, *bounds, 0.0, 0)[0].squeeze(0)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def compiler_failure(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton compiles nothing here: it does at the first call, with a C compiler that not every machine has."""
    try:
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            row = torch.ones(1, 16, dtype=dtype, device=device)
            add_rms_norm(row, None, row[0], 1e-5, out=row)
    except Exception as error:  # whatever a compiler raises
        return f"Triton compiles no kernels here: {error}"
    return None


# What the accelerated model calls


def refusal(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout | None, state: Any) -> str | None:
    """Why this forward cannot run here; `None` where it can."""
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a CUDA graph"
    attention = model.config._attn_implementation
    if attention != "sdpa" and not is_flash_attention_requested(model.config):
        return f"the attention implementation is {attention}"
    if "cuda refusal" not in state.engines:
        state.engines["cuda refusal"] = refusal_of_state(model, hidden_states.device)
    has_flash, reason = state.engines["cuda refusal"]
    backends = torch.backends.cuda
    enabled = backends.flash_sdp_enabled if has_flash else backends.mem_efficient_sdp_enabled
    if attention == "sdpa" and not enabled():
        return f"{'flash' if has_flash else 'memory-efficient'} attention is switched off"
    return reason


def refusal_of_state(model: nn.Module, device: torch.device) -> tuple[bool, str | None]:
    """Whether PyTorch has flash attention for this model, and why the model as it is cannot run here, or `None`."""
    layers, dtype = model.encoder.layers, model.rms_norm.weight.dtype
    if triton is None:
        return False, "Triton is not installed"
    if torch.version.cuda is None:
        return False, "this PyTorch is not built for CUDA"
    if not layers:
        return False, "the model has no layers"
    activations = {type(layer.ffn.act_fn).__name__ for layer in layers}
    if activations - {"SiLU", "SiLUActivation"}:
        return False, f"the activation is {', '.join(sorted(activations))}"
    head_dim = layers[0].attention.head_dim
    if head_dim % 8 or head_dim > 256:
        return False, f"no attention kernel takes heads of size {head_dim}"
    if dtype not in (torch.float32, *HALF):
        return False, f"the weights are {dtype}"
    if dtype == torch.bfloat16 and capability_of(device) < (8, 0):
        return False, "this GPU has no bfloat16"
    return dtype in HALF and capability_of(device) >= (8, 0), compiler_failure(dtype, device)


def known_engine(state: Any) -> Engine | None:
    """The model's engine, unless the memory of a parameter has been exchanged."""
    engine = state.engines.get("cuda")
    try:
        return engine if engine and engine.memory == memory_of(state.weights()) else None
    except (KeyError, TypeError, AttributeError, RuntimeError):
        # It is not yet known whether the model has changed: a weight was deleted, or has no memory.
        return None


def engine_of(model: nn.Module, state: Any) -> Engine:
    engine = known_engine(state)
    if engine is None:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(state.device):
            engine = state.engines["cuda"] = Engine(model, state.weights())
    return engine


def encode(
    model: nn.Module,
    hidden_states: torch.Tensor,
    layout: PackedLayout,
    state: Any,
    depths: tuple[int, ...],
    last: bool,
    captures: bool = True,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """
    Patches `(total_patches, num_channels * patch_size**2)` to hidden states `(total_patches, hidden_size)` after so
    many layers, before the final norm, one for each of `depths`, which rise; and with `last` to the features after it,
    else `None`. In the dtype of the weights, tensors of their own; no layer after the last one needed runs.

    With `captures=False` by a graph that is there and reads memory that the parameters still have, or `None`; whether
    the engine may run is then asked here, after that.
    """
    engine = engine_of(model, state) if captures else known_engine(state)
    if engine is None or engine.device != hidden_states.device:
        return None
    if not captures and refusal(model, hidden_states, layout, state) is not None:
        return None
    own, segments, settings = len(hidden_states), len(layout.cu_seqlens) - 1, model.cuda_graph_settings
    given = (layout.position_ids, layout.interp_indices, layout.interp_weights)
    has_frames = layout.frame_sizes is not None and all(value is None for value in given)
    with torch.cuda.device(engine.device), torch.no_grad():
        lengths = (own, segments, layout.max_seqlen)
        budget = engine.budget_of(lengths, has_frames, depths, last, settings.same_bits)
        graph = engine.graph_of(budget, settings, after=1 if captures else None)
        if graph is None and not captures:
            return None
        layout = layout if has_frames else with_positions(layout, model.config)
        if graph is not None:
            return graph(
                lambda: graph.inputs.load(hidden_states, layout),
                lambda outputs: (
                    tuple(state[:own].clone() for state in outputs[0]),
                    outputs[1][:own].clone() if last else None,
                ),
            )
        if budget.segments < budget.patches:
            # No more than there are: kernels of others pay for empty ones.
            longest = max(layout.max_seqlen, budget.patches - own)
            budget = budget._replace(segments=segments + 1, longest=longest)
        inputs = Inputs(budget, engine.new_buffers(budget.patches), engine.is_native)
        inputs.load(hidden_states, layout)
        states, features = engine.run(inputs, layout.lengths if segments >= MAX_SEGMENTS_PER_CALL else ())
        return tuple(state[:own] for state in states), features[:own] if last else None


def capture(model: nn.Module, state: Any, lengths: Sequence[int]) -> None:
    """
    Captures before the first forward the graph that serves segments of these lengths, and every mix of its budget.

    Raises:
        RuntimeError: none could be captured.
    """
    engine, settings = engine_of(model, state), model.cuda_graph_settings
    with torch.cuda.device(engine.device):
        budget = engine.budget_of((sum(lengths), len(lengths), max(lengths)), True, (), True, settings.same_bits)
        if engine.graph_of(budget, settings, after=0) is None:
            reason = engine.graphs.failure or f"{settings} allows none of {budget.patches} patches"
            raise RuntimeError(f"No CUDA graph was captured: {reason}.")


def release(state: Any) -> None:
    """Frees graphs and buffers; the next forward makes what it needs."""
    engine = state.engines.pop("cuda", None)
    if engine is not None:
        engine.graphs.clear()
