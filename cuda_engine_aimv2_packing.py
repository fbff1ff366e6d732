# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder on an NVIDIA GPU in inference: merged products, Triton kernels between them, and CUDA graphs for any mix.

It owns no weights: it reads the parameters where they lie. Products of several are one where their weights lie side by
side, and [`lay_side_by_side`] lays them so when they arrive on a GPU.

Patches are padded to a size that recurs. A graph serves every batch of its size: what divides it is an input.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .cuda_graphs_aimv2_packing import Graph, Graphs
from .layout_aimv2_packing import MAX_SEGMENTS_PER_CALL, PackedLayout, with_positions
from .triton_kernels_aimv2_packing import (
    PRODUCT_TILES,
    SWIGLU_TILES,
    TensorDescriptor,
    add_rms_norm,
    learned_positions,
    locate_patches,
    native_positions,
    segment_attention,
    silu_mul,
    swiglu,
    triton,
    weighted_positions,
)
from .triton_kernels_aimv2_packing import product as fixed_order_product


logger = logging.getLogger(__name__)

# (module, query, key, value), the last three of shape (patches, heads, head_dim), to the attended values.
Attention = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

HALF = (torch.float16, torch.bfloat16)

# Products of more patches run in pieces of so many: then the sizes that a product ever has are a finite list.
PATCHES_PER_PRODUCT = 16384


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
    What a batch is padded to, and all that a graph of it has in it for good.

    Attributes:
        patches (`int`): Patches, padding included.
        segments (`int`): Segments at most, padding included.
        longest (`int`): Patches of the longest segment, where attention needs a bound.
        attention (`str`): The attention implementation.
        patch_layout (`str`): The order of the values in a patch.
        has_frames (`bool`): Whether positions follow from the sizes of frames; or else they are inputs.
        depths (`tuple[int, ...]`): After how many layers hidden states are kept.
        last (`bool`): Whether features after the final norm are.
        same_bits (`bool`): Whether sums of products have a fixed order.
        numerics (`tuple`): PyTorch's settings of cuBLAS.
        eps (`tuple[float, ...]`): Of all norms.
    """

    patches: int
    segments: int
    longest: int
    attention: str
    patch_layout: str
    has_frames: bool
    depths: tuple[int, ...]
    last: bool
    same_bits: bool
    numerics: tuple
    eps: tuple[float, ...]


def power_of_two(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def padded_size(patches: int) -> int:
    """`patches` rounded up to one of 16 sizes per doubling, at least 64 and at most 256 apart."""
    step = min(256, max(64, power_of_two(patches, 1) // 32))
    return -(-patches // step) * step


# Weights side by side


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The parameters that one product reads together, with a name for the log."""
    for index, layer in enumerate(model.encoder.layers):
        for block, names in (("attention", ("q_proj", "k_proj", "v_proj")), ("ffn", ("gate_proj", "up_proj"))):
            linears = [getattr(getattr(layer, block, None), name, None) for name in names]
            for kind in ("weight", "bias"):
                parameters = [getattr(linear, kind, None) for linear in linears]
                if all(isinstance(parameter, torch.Tensor) for parameter in parameters):
                    yield f"{kind} of {', '.join(names)} in layer {index}", parameters


def address_of(parameter: torch.Tensor) -> int | None:
    return parameter.data_ptr() if type(parameter) is nn.Parameter and not parameter.is_meta else None


@contextmanager
def laid_side_by_side(model: nn.Module) -> Iterator[None]:
    """Lays side by side what the body moves to a GPU, and nothing that was there: others may know its address."""
    before = {id(parameter): address_of(parameter) for _, own in merged_parameters(model) for parameter in own}
    yield
    lay_side_by_side(model, before)


def lay_side_by_side(model: nn.Module, before: dict[int, int | None] | None = None) -> None:
    """
    Lays the weights of products that can be one side by side, where they are on a GPU; each keeps a storage of its own.

    Args:
        model (`nn.Module`): An `Aimv2PackingModel`, whose parameters have just arrived where they are.
        before (`dict[int, int | None]`, *optional*): Addresses by `id` of parameters; those still there stay.
    """
    for name, parameters in merged_parameters(model):
        if any(parameter.device.type != "cuda" for parameter in parameters) or are_adjacent(parameters):
            continue
        if before and any(before.get(id(parameter)) == address_of(parameter) for parameter in parameters):
            continue
        reason = lay(parameters)
        if reason is not None:
            logger.debug("Products stay apart, %s: %s", name, reason)


def lay(parameters: Sequence[nn.Parameter]) -> str | None:
    """Moves parameters side by side in memory, or says why they stay where they are."""
    first = parameters[0]
    for parameter in parameters:
        if type(parameter) is not nn.Parameter:
            return f"one is a {type(parameter).__name__}"
        if parameter.is_meta or parameter.layout != torch.strided or not parameter.is_contiguous():
            return "one is on the meta device, sparse or not contiguous"
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            return "they are of several dtypes or on several devices"
        if not parameter.is_floating_point() or parameter.shape[1:] != first.shape[1:]:
            return "they are no weights of one product"
        if parameter.nbytes % 16 or not parameter.nbytes:
            return "the next would not begin at a multiple of 16 bytes"
        storage = parameter.untyped_storage()
        # The parameter and `storage` itself.
        if storage.nbytes() != parameter.nbytes or torch._C._storage_Use_Count(storage._cdata) > 2:
            return "one shares its storage"
        if not parameter.is_cuda and parameter.is_shared():
            return "one is shared with other processes"
    if len(set(map(id, parameters))) < len(parameters):
        return "one is used twice"
    # Tensors made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, own in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
            # A storage that begins and ends with it, and keeps the memory of all alive.
            parameter.data = torch.from_dlpack(own)
    return None


def are_adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each begins where the one before it ends, so that one tensor can be all of them."""
    return all(
        tensor.is_contiguous() and tensor.dtype == tensors[0].dtype and tensor.device == tensors[0].device
        for tensor in tensors
    ) and all(tensor.data_ptr() + tensor.nbytes == after.data_ptr() for tensor, after in pairwise(tensors))


class Memory:
    """What lies at an address of a GPU, as other libraries show theirs to PyTorch."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 2}


def whole_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adjacent tensors as one along the first dimension: a view that keeps none of them alive."""
    first, size = tensors[0], sum(tensor.nbytes for tensor in tensors)
    if first.is_cuda:
        memory = torch.as_tensor(Memory(first.data_ptr(), size), device=first.device)
    else:
        memory = torch.frombuffer((ctypes.c_char * size).from_address(first.data_ptr()), dtype=torch.uint8)
    return memory.view(first.dtype).view(-1, *first.shape[1:])


class Product(NamedTuple):
    """A linear layer, and which columns of the output are its."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: slice


def products_of(linears: Sequence[nn.Linear]) -> list[Product]:
    """One product where the weights lie side by side, else one each; no longer than the parameters live."""
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    if are_adjacent(weights) and (biases[0] is None or are_adjacent(biases)):
        return [Product(whole_of(weights), None if biases[0] is None else whole_of(biases), slice(None))]
    ends = list(accumulate(map(len, weights)))
    columns = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return list(map(Product, weights, biases, columns))


# Products whose sums have a fixed order


def blas_numerics() -> tuple:
    """The settings that say which of its kernels cuBLAS may take."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.backends.cuda.preferred_blas_library(),
    )


@cache
def blas_keeps_order(
    shape: tuple[int, int, int],
    row_stride: int,
    has_bias: bool,
    adds: bool,
    dtype: torch.dtype,
    device: torch.device,
    numerics: tuple,
) -> bool:
    """
    Whether cuBLAS gives the bits of `fixed_order_product` for this size, at every row: it then adds in the same order.

    Args:
        shape (`tuple[int, int, int]`): Patches, hidden values and columns.
        row_stride (`int`): From one row of the output to the next.
        has_bias, adds (`bool`): Whether there is a bias; whether the output is added to.
        dtype, device, numerics: Of the product; `numerics` only tells one setting of cuBLAS from another.
    """
    patches, hidden_size, size = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=dtype, device=device)

    with torch.inference_mode(False), torch.no_grad():
        states, weight = random(patches, hidden_size), random(size, hidden_size) * hidden_size**-0.5
        bias = random(size) if has_bias else None
        ours = random(patches, row_stride)[:, :size]
        theirs = torch.empty_strided(ours.shape, ours.stride(), dtype=dtype, device=device).copy_(ours)
        multiply(states, weight, bias, theirs, adds)
        fixed_order_product(states, weight, ours, bias, ours if adds else None)
        return torch.equal(ours, theirs)


def multiply(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, adds: bool
) -> None:
    """`states @ weight.T` by cuBLAS, plus the bias or what is in `out`."""
    if adds:
        out.addmm_(states, weight.t())
    elif bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)


# The engine


class Layer(NamedTuple):
    attention: nn.Module
    norm1: nn.RMSNorm
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    norm2: nn.RMSNorm
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear


class Buffers(NamedTuple):
    """
    Room for the activations of so many patches; what is needed at different times shares it.

    Attributes:
        patches: In rows of a multiple of 16 bytes, which products want; what fills them up is zero.
        residual, normed, attended (each of shape `(patches, hidden_size)`): Of a layer, as the next two.
        activated: `(patches, intermediate_size)`.
        wide: Query, key and value; gate and up, where they are not one kernel with what joins them.
    """

    patches: torch.Tensor
    residual: torch.Tensor
    normed: torch.Tensor
    attended: torch.Tensor
    activated: torch.Tensor
    wide: torch.Tensor

    def first(self, patches: int) -> "Buffers":
        return Buffers(*(buffer[:patches] for buffer in self))


class Inputs:
    """What a forward of a budget reads."""

    def __init__(self, budget: Budget, buffers: Buffers, is_native: bool):
        self.budget, self.buffers = budget, buffers.first(budget.patches)
        device = buffers.patches.device
        # The number of segments, `cu_seqlens`, and of the frames the rows and the columns.
        self.segments = torch.zeros(3 * budget.segments + 2, dtype=torch.int32, device=device)
        kinds = ((2, torch.int64),) if is_native else ((16, torch.int64), (16, torch.float32))
        self.positions = [
            torch.zeros(budget.patches, width, dtype=dtype, device=device)
            for width, dtype in (() if budget.has_frames else kinds)
        ]

    def load(self, patches: torch.Tensor, layout: PackedLayout, counts: torch.Tensor) -> None:
        """Writes them; `counts` is a tensor of all numbers from 0 on, int32."""
        own, patch_dim = patches.shape
        self.buffers.patches[:own, :patch_dim].copy_(patches)
        if self.budget.attention != "sdpa":
            # A kernel of the user's choice may read past a segment's end.
            self.buffers.patches[own:].zero_()
        segments = len(layout.cu_seqlens) - 1
        parts = [counts[segments : segments + 1], layout.cu_seqlens]
        if self.budget.has_frames:
            parts.append(layout.frame_sizes.view(-1))
        torch.cat(parts, out=self.segments[: sum(map(len, parts))])
        given = (layout.position_ids,) if len(self.positions) == 1 else (layout.interp_indices, layout.interp_weights)
        for position, value in zip(self.positions, given, strict=False):
            position[:own].copy_(value)

    def wide(self, width: int) -> torch.Tensor:
        patches = self.budget.patches
        return self.buffers.wide.view(-1)[: patches * width].view(patches, width)


class Engine:
    """What is tied to one model's modules and to where their parameters lie: buffers and graphs."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]):
        config = model.config
        self.lock = threading.Lock()
        self.config, self.embeddings, self.is_native = config, model.embeddings, config.is_native
        self.layers = [layer_of(layer) for layer in model.encoder.layers]
        self.norms = [*(layer.norm1 for layer in self.layers), model.rms_norm]
        self.all_norms = [*self.norms, *(layer.norm2 for layer in self.layers), self.embeddings.rms_norm]
        self.where = where_they_lie(parameters)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.patch_dim = config.num_channels * config.patch_size**2
        half_on_hopper = self.device.type == "cuda" and self.dtype in HALF and capability_of(self.device)[0] == 9
        # Measured on Hopper; docs/kernels.md.
        self.has_own_attention = half_on_hopper and self.head_dim in (16, 32, 64, 128)
        self.has_descriptors = (
            half_on_hopper
            and not (self.hidden_size % 8 or self.intermediate_size % 8)
            and descriptor_failure(self.dtype, self.device) is None
        )
        self.fuses_gate = self.has_descriptors and all(
            layer.gate_up[0].bias is None and are_adjacent([linear.weight for linear in layer.gate_up])
            for layer in self.layers
        )
        self.buffers: list[Buffers] = []
        self.graphs = Graphs(self.device)
        # Copies from the CPU that are waited for, so that any stream may read them.
        self.counts = torch.arange(1024, dtype=torch.int32, device="cpu").to(self.device)
        exponents = torch.arange(self.hidden_size // 4, dtype=torch.float64, device="cpu") / (self.hidden_size / 4)
        self.frequencies = (10000**-exponents).to(self.device)

    def budget_of(
        self, patches: int, segments: int, longest: int, has_frames: bool, settings: CudaGraphSettings, **wanted: Any
    ) -> Budget:
        """The smallest budget that recurs and fits so many patches and segments."""
        size, attention = padded_size(patches), self.config._attn_implementation
        own_attention = self.has_own_attention and attention == "sdpa"
        return Budget(
            patches=size,
            segments=size if own_attention else power_of_two(segments + 1, 16),
            longest=size if own_attention else power_of_two(max(longest, size - patches), 256),
            attention=attention,
            patch_layout=self.config.patch_layout,
            has_frames=has_frames,
            same_bits=settings.same_bits and self.has_descriptors and own_attention,
            numerics=blas_numerics(),
            eps=tuple(map(attrgetter("eps"), self.all_norms)),
            **wanted,
        )

    def new_buffers(self, patches: int) -> Buffers:
        hidden_size, intermediate_size = self.hidden_size, self.intermediate_size
        wide = 3 * hidden_size if self.fuses_gate else max(3 * hidden_size, 2 * intermediate_size)
        like = {"dtype": self.dtype, "device": self.device}
        return Buffers(
            torch.zeros(patches, -(-self.patch_dim // 8) * 8, **like),
            *(torch.empty(patches, width, **like) for width in (*(hidden_size,) * 3, intermediate_size, wide)),
        )

    def shared_buffers(self, patches: int, most: int) -> Buffers:
        """Graphs captured one by one would each add their own, so they share the smallest that are large enough."""
        large_enough = [buffers for buffers in self.buffers if len(buffers.patches) >= patches]
        if not large_enough:
            large_enough = [self.new_buffers(min(power_of_two(patches, 1024), padded_size(most)))]
            self.buffers += large_enough
        return min(large_enough, key=lambda buffers: len(buffers.patches))

    def graph_of(self, budget: Budget, settings: CudaGraphSettings, at_once: bool = False) -> Graph | None:
        """The graph of this budget, captured if it came before or `at_once`; `None` where there is to be none."""
        if max(budget.patches, budget.patches * len(budget.depths)) > settings.max_graph_patches:
            return None
        with self.lock:
            graph = self.graphs.find(budget)
            if graph is None and self.graphs.should_capture(budget, settings.max_graphs, at_once):
                # Tensors made in inference mode could not be written to outside it.
                with torch.inference_mode(False), torch.no_grad():
                    buffers = self.shared_buffers(budget.patches, settings.max_graph_patches)
                    inputs = Inputs(budget, buffers, self.is_native)
                graph = self.graphs.capture(budget, settings.max_graphs, inputs, lambda: self.run(inputs))
        return graph

    def encode(
        self, patches: torch.Tensor, layout: PackedLayout, budget: Budget, settings: CudaGraphSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        own, segments = len(patches), len(layout.cu_seqlens) - 1
        if len(self.counts) <= segments:
            self.counts = torch.arange(power_of_two(segments + 1, 1), dtype=torch.int32, device="cpu").to(self.device)

        def take(outputs: tuple, copy: bool = True) -> tuple:
            states, features = outputs
            parts = [x[:own].clone() if copy else x[:own] for x in (*states, *([] if features is None else [features]))]
            return tuple(parts[: len(states)]), None if features is None else parts[-1]

        graph = self.graph_of(budget, settings)
        if graph is not None:
            return graph(lambda: graph.inputs.load(patches, layout, self.counts), take)
        if budget.segments < budget.patches:
            # No more segments than there are, padding included: kernels of others pay for empty ones.
            longest = max(layout.max_seqlen, budget.patches - own)
            budget = budget._replace(segments=segments + 1, longest=longest)
        inputs = Inputs(budget, self.new_buffers(budget.patches), self.is_native)
        inputs.load(patches, layout, self.counts)
        return take(self.run(inputs, layout.lengths if segments >= MAX_SEGMENTS_PER_CALL else ()), copy=False)

    def run(self, inputs: Inputs, lengths: Sequence[int] = ()) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """
        Hidden states after each of the budget's depths, tensors of their own; and the features, which lie in a buffer.

        Args:
            inputs (`Inputs`): Loaded.
            lengths (`Sequence[int]`): Patches of each segment, where there are more than one call of attention takes.
        """
        budget, buffers = inputs.budget, inputs.buffers
        residual, normed, attended = buffers.residual, buffers.normed, buffers.attended
        located = locate_patches(inputs.segments, budget.patches, budget.has_frames)
        attend = self.attention(inputs, located, lengths)
        self.embed(inputs)
        self.positions(inputs, located, out=attended)
        add_rms_norm(residual, attended, self.norms[0].weight, self.norms[0].eps, out=normed)
        states = [residual.clone()] if 0 in budget.depths else []
        blocks = len(self.layers) if budget.last else max(budget.depths, default=0)
        for depth, (layer, next_norm) in enumerate(zip(self.layers[:blocks], self.norms[1:], strict=False), start=1):
            qkv = inputs.wide(3 * self.hidden_size)
            for product in products_of(layer.qkv):
                self.multiply(product, normed, qkv, budget)
            values = attend(layer.attention, *qkv.view(budget.patches, 3, self.heads, self.head_dim).unbind(1))
            self.add_and_norm(layer.out, values.flatten(1), layer.norm2, inputs)
            if self.fuses_gate:
                swiglu(normed, whole_of([linear.weight for linear in layer.gate_up]), out=buffers.activated)
            else:
                gate_up = inputs.wide(2 * self.intermediate_size)
                for product in products_of(layer.gate_up):
                    self.multiply(product, normed, gate_up, budget)
                silu_mul(gate_up, out=buffers.activated)
            self.add_and_norm(layer.down, buffers.activated, next_norm, inputs)
            if depth in budget.depths:
                states.append(residual.clone())
        return tuple(states), normed if budget.last else None

    def embed(self, inputs: Inputs) -> None:
        """Patches to the residual stream, without their positions."""
        patch_embed, norm = self.embeddings.patch_embed, self.embeddings.rms_norm
        weight, patches, out = patch_embed.weight, inputs.buffers.patches, inputs.buffers.normed
        weight = (weight.permute(0, 2, 3, 1) if inputs.budget.patch_layout == "channels_last" else weight).flatten(1)
        weight = F.pad(weight, (0, patches.shape[1] - weight.shape[1]))
        self.multiply(Product(weight, patch_embed.bias, slice(None)), patches, out, inputs.budget)
        add_rms_norm(out, None, norm.weight, norm.eps, out=inputs.buffers.residual)

    def positions(self, inputs: Inputs, located: torch.Tensor, out: torch.Tensor) -> None:
        if self.is_native:
            rows, columns = located[2:4] if inputs.budget.has_frames else inputs.positions[0].unbind(1)
            native_positions(rows, columns, self.frequencies, out)
        elif inputs.budget.has_frames:
            learned_positions(located, self.embeddings.position_embedding.weight, out)
        else:
            weighted_positions(*inputs.positions, self.embeddings.position_embedding.weight, out)

    def multiply(
        self, product: Product, states: torch.Tensor, out: torch.Tensor, budget: Budget, adds: bool = False
    ) -> None:
        """The product's columns of `out`; with `adds` added to what is there."""
        weight, out = product.weight.contiguous(), out[:, product.columns]
        parts = zip(states.split(PATCHES_PER_PRODUCT), out.split(PATCHES_PER_PRODUCT), strict=True)
        for some, their_out in parts:
            shape = (*some.shape, len(weight))
            kind = (out.stride(0), product.bias is not None, adds, self.dtype, self.device, budget.numerics)
            if budget.same_bits and not blas_keeps_order(shape, *kind):
                fixed_order_product(some, weight, their_out, product.bias, their_out if adds else None)
            else:
                multiply(some, weight, product.bias, their_out, adds)

    def add_and_norm(self, linear: nn.Linear, states: torch.Tensor, norm: nn.RMSNorm, inputs: Inputs) -> None:
        residual, normed = inputs.buffers.residual, inputs.buffers.normed
        product = Product(linear.weight, linear.bias, slice(None))
        if linear.bias is None:
            self.multiply(product, states, residual, inputs.budget, adds=True)
        else:
            self.multiply(product, states, normed, inputs.budget)
        add_rms_norm(residual, None if linear.bias is None else normed, norm.weight, norm.eps, out=normed)

    def attention(self, inputs: Inputs, located: torch.Tensor, lengths: Sequence[int]) -> Attention:
        """
        The fastest kernel for these segments, by the measurements in docs/kernels.md; one that the user chose by name
        is not second-guessed.
        """
        budget = inputs.budget
        if self.has_own_attention and budget.attention == "sdpa":
            attended = inputs.buffers.attended.view(budget.patches, self.heads, self.head_dim)

            def own(module: nn.Module, *states: torch.Tensor) -> torch.Tensor:
                segment_attention(*states, located, out=attended)
                return attended

            return own
        # Segments that a batch lacks begin and end where the padding ends.
        at = torch.arange(budget.segments + 1, dtype=torch.int32, device=self.device)
        cu_seqlens = torch.where(at <= inputs.segments[0], inputs.segments[1 : budget.segments + 2], budget.patches)
        if not lengths:
            return self.attention_by_segments(cu_seqlens, budget)
        parts, start = [], 0
        lengths = [*lengths, budget.patches - sum(lengths)]
        for first in range(0, len(lengths), MAX_SEGMENTS_PER_CALL):
            own_lengths = lengths[first : first + MAX_SEGMENTS_PER_CALL]
            rows = slice(start, start + sum(own_lengths))
            attend = self.attention_by_segments(cu_seqlens[first : first + len(own_lengths) + 1] - start, budget)
            parts.append((rows, attend))
            start = rows.stop
        return lambda module, *states: torch.cat([attend(module, *(x[rows] for x in states)) for rows, attend in parts])

    def attention_by_segments(self, cu_seqlens: torch.Tensor, budget: Budget) -> Attention:
        """By kernels of PyTorch, or of the user's choice."""
        longest = budget.longest
        if budget.attention != "sdpa":
            interface = ALL_ATTENTION_FUNCTIONS[budget.attention]
            segments = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            bounds = {"max_length_q": longest, "max_length_k": longest}
            options = {"dropout": 0.0, "scaling": self.head_dim**-0.5, "is_causal": False}

            def chosen(module: nn.Module, *states: torch.Tensor) -> torch.Tensor:
                states = tuple(x.transpose(0, 1).unsqueeze(0) for x in states)
                return interface(module, *states, attention_mask=None, **options, **segments, **bounds)[0].squeeze(0)

            return chosen
        if self.dtype in HALF and capability_of(self.device) >= (8, 0):
            # What `varlen_attn` calls, which adds a kernel for the state of a dropout that it lacks.
            return lambda module, query, key, value: torch.ops.aten._flash_attention_forward(
                query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False
            )[0]
        return lambda module, *states: torch.ops.aten._efficient_attention_forward(
            *(x.unsqueeze(0) for x in states), None, cu_seqlens, cu_seqlens, longest, longest, 0.0, 0
        )[0].squeeze(0)


def layer_of(layer: nn.Module) -> Layer:
    attention, ffn = layer.attention, layer.ffn
    return Layer(
        attention,
        layer.rms_norm1,
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.out_proj,
        layer.rms_norm2,
        (ffn.gate_proj, ffn.up_proj),
        ffn.down_proj,
    )


def where_they_lie(parameters: Sequence[nn.Parameter]) -> tuple[list, list]:
    """What tells that the memory of a parameter was exchanged."""
    return (
        list(map(torch.Tensor.data_ptr, parameters)),
        list(map(torch.Tensor.is_contiguous, parameters)),
    )


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


@cache
def descriptor_failure(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there are no kernels with tensor descriptors, which only newer versions of Triton know."""
    if TensorDescriptor is None:
        return "this Triton has no tensor descriptors"
    try:
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            rows = torch.ones(16, 64, dtype=dtype, device=device)
            for tile in SWIGLU_TILES:
                swiglu(rows, rows.new_ones(32, 64), out=rows.new_empty(16, 16), tile=tile)
            for tile in PRODUCT_TILES:
                fixed_order_product(rows, rows, out=rows.new_empty(16, 16), tile=tile)
    except Exception as error:  # whatever a compiler raises
        logger.warning("Triton does not compile products here, which are cuBLAS's then: %s", error)
        return str(error)
    return None


# What the accelerated model calls


def refusal(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, state: Any) -> str | None:
    """Why this forward cannot run here; `None` where it can."""
    config, device, dtype = model.config, hidden_states.device, state.weights()[0].dtype
    if device.type != "cuda":
        return f"the patches are on {device}"
    if triton is None:
        return "Triton is not installed"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a CUDA graph"
    attention = config._attn_implementation
    if attention != "sdpa" and not is_flash_attention_requested(config):
        return f"the attention implementation is {attention}"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation is {config.hidden_act}"
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return f"no attention kernel takes heads of size {head_dim}"
    if dtype not in (torch.float32, *HALF):
        return f"the weights are {dtype}"
    if dtype == torch.bfloat16 and capability_of(device) < (8, 0):
        return "this GPU has no bfloat16"
    uses_flash = dtype in HALF and capability_of(device) >= (8, 0)
    if attention == "sdpa" and not (
        torch.backends.cuda.flash_sdp_enabled() if uses_flash else torch.backends.cuda.mem_efficient_sdp_enabled()
    ):
        return f"{'flash' if uses_flash else 'memory-efficient'} attention is switched off"
    return compiler_failure(dtype, device)


def has_frames(layout: PackedLayout) -> bool:
    """Whether positions follow from the sizes of the frames."""
    given = (layout.position_ids, layout.interp_indices, layout.interp_weights)
    return layout.frame_sizes is not None and all(value is None for value in given)


def engine_of(model: nn.Module, state: Any) -> Engine:
    """The model's engine: a new one where memory of its parameters has been exchanged."""
    engine, parameters = state.engines.get("cuda"), state.weights()
    if engine is None or engine.where != where_they_lie(parameters):
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(parameters[0].device):
            engine = state.engines["cuda"] = Engine(model, parameters)
    return engine


def encode(
    model: nn.Module,
    hidden_states: torch.Tensor,
    layout: PackedLayout,
    state: Any,
    depths: tuple[int, ...] = (),
    last: bool = True,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """
    Patches `(total_patches, num_channels * patch_size**2)` to hidden states `(total_patches, hidden_size)` after so
    many layers, before the final norm, one for each of `depths`, which rise; and with `last` to the features after it, else
    `None`. In the dtype of the weights, tensors of their own; no layer after the last one needed runs.
    """
    engine = engine_of(model, state)
    if not has_frames(layout):
        layout = with_positions(layout, model.config)
    settings = model.cuda_graph_settings
    with torch.cuda.device(engine.device), torch.no_grad():
        segments, longest = len(layout.cu_seqlens) - 1, layout.max_seqlen
        budget = engine.budget_of(
            len(hidden_states), segments, longest, has_frames(layout), settings, depths=depths, last=last
        )
        return engine.encode(hidden_states, layout, budget, settings)


def capture(model: nn.Module, state: Any, lengths: Sequence[int]) -> None:
    """
    Captures before the first forward the graph that serves segments of these lengths, and every mix of its budget.

    Raises:
        RuntimeError: none could be captured.
    """
    engine, settings = engine_of(model, state), model.cuda_graph_settings
    with torch.cuda.device(engine.device):
        budget = engine.budget_of(
            sum(lengths), len(lengths), max(lengths), has_frames=True, settings=settings, depths=(), last=True
        )
        if engine.graph_of(budget, settings, at_once=True) is None:
            reason = engine.graphs.failure or f"{settings} allow none of {budget.patches} patches"
            raise RuntimeError(f"No CUDA graph was captured: {reason}.")


def release(state: Any) -> None:
    """Frees graphs and buffers; the next forward makes what it needs."""
    engine = state.engines.pop("cuda", None)
    if engine is not None:
        engine.graphs.clear()
