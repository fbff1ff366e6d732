# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The encoder on an NVIDIA GPU in inference: merged products, Triton kernels between them, and CUDA graphs for any mix.

A graph serves every batch that fits its budget: patches padded to a size that recurs, `cu_seqlens` padded with one
segment of padding and empty ones, the sizes of frames with them, `max_seqlen` fixed when it was captured. Larger
batches run the same kernels without.
"""

import gc
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .layout_aimv2_packing import MAX_SEGMENTS_PER_CALL, PackedLayout, sincos
from .triton_kernels_aimv2_packing import (
    LOW_TILE,
    TALL_TILE,
    TensorDescriptor,
    add_rms_norm,
    learned_positions,
    native_positions,
    patch_places,
    segment_attention,
    silu_mul,
    swiglu,
    triton,
)


logger = logging.getLogger(__name__)

# (module, query, key, value), the last three of shape (patches, heads, head_dim), to the attended values.
Attention = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# cuDNN's dense kernel for segments of one length beats the engine's own from so many scores on. It builds a plan for
# each layout, in 60 ms on an H100, so the layout has to have come a few times.
DENSE_SCORES = 1 << 21
DENSE_AFTER = 3

# Up to so many patches a product that adds to the residual stream is slower than one that does not.
FEW_PATCHES = 256

# A graph that so many forwards per graph have not used makes room for another; sooner, captures would chase each other.
PATIENCE = 16


@dataclass(frozen=True)
class CudaInferenceSettings:
    """
    Attributes:
        merge_weights (`bool`): Whether to hold a second copy of the query, key, value, gate and up projections, merged
            into one product each: 0.7 times the memory of the layers' weights.
        max_graph_patches (`int`): Batches of more patches run without a CUDA graph; 0 for none at all.
        max_graphs (`int`): How many graphs to hold; all share their memory.
    """

    merge_weights: bool = True
    max_graph_patches: int = 20480
    max_graphs: int = 64


class Budget(NamedTuple):
    """
    What a graph has room for.

    Attributes:
        patches (`int`): Patches, padding included.
        segments (`int`): Segments, where attention needs a bound on them.
        longest (`int`): Patches of the longest segment, likewise.
        side (`int`): Rows or columns of an image; 0 with learned positions.
        attention (`str`): The attention implementation, whose kernels a graph holds.
        length (`int`, or `None`): Patches of every segment of the one layout that this is for, without padding.
    """

    patches: int
    segments: int
    longest: int
    side: int
    attention: str
    length: int | None = None


def power_of_two(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def padded_size(patches: int) -> int:
    """`patches` rounded up to one of 16 sizes per doubling, at least 64 and at most 256 apart."""
    step = min(256, max(64, power_of_two(patches, 1) // 32))
    return -(-patches // step) * step


class Product(NamedTuple):
    """A linear layer, and which columns of the output are its."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    columns: slice

    def __call__(self, hidden_states: torch.Tensor, out: torch.Tensor) -> None:
        weight, out = self.weight.t(), out[:, self.columns]
        if self.bias is None:
            torch.mm(hidden_states, weight, out=out)
        else:
            torch.addmm(self.bias, hidden_states, weight, out=out)


class Layer(NamedTuple):
    attention: nn.Module
    norm1: nn.RMSNorm
    qkv: Sequence[Product]
    out: Product
    norm2: nn.RMSNorm
    gate_up: Sequence[Product]
    down: Product


class Weights:
    """The model's weights as the engine multiplies by them, and what tells that the model's own have changed."""

    def __init__(self, model: nn.Module, merge: bool):
        self.modules = list(model.modules())[1:]
        self.parameters = parameters_of(self.modules)
        self.pointers = list(map(torch.Tensor.data_ptr, self.parameters))
        self.dtypes = list(map(attrgetter("dtype"), self.parameters))
        self.copies: list[tuple[torch.Tensor, nn.Parameter]] = []
        self.layers = [self.layer(layer, merge) for layer in model.encoder.layers]
        self.sources = [source for _, source in self.copies]
        self.versions = list(map(attrgetter("_version"), self.sources))
        self.embeddings, self.norm = model.embeddings, model.rms_norm
        self.norms = [module for module in self.modules if isinstance(module, nn.RMSNorm)]
        self.activations = {type(layer.ffn.act_fn).__name__ for layer in model.encoder.layers}

    def layer(self, layer: nn.Module, merge: bool) -> Layer:
        attention, ffn = layer.attention, layer.ffn
        return Layer(
            attention,
            layer.rms_norm1,
            self.products((attention.q_proj, attention.k_proj, attention.v_proj), merge),
            self.products((attention.out_proj,), merge=False)[0],
            layer.rms_norm2,
            self.products((ffn.gate_proj, ffn.up_proj), merge),
            self.products((ffn.down_proj,), merge=False)[0],
        )

    def products(self, linears: Sequence[nn.Linear], merge: bool) -> list[Product]:
        ends = list(accumulate(len(linear.weight) for linear in linears))
        columns = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if not merge:
            return [Product(linear.weight, linear.bias, own) for linear, own in zip(linears, columns, strict=True)]
        weight = linears[0].weight.new_empty(ends[-1], linears[0].weight.shape[1])
        bias = None if linears[0].bias is None else linears[0].bias.new_empty(ends[-1])
        for linear, own in zip(linears, columns, strict=True):
            copies = [(weight[own], linear.weight)] + ([] if bias is None else [(bias[own], linear.bias)])
            for copy, source in copies:
                copy.copy_(source)
            self.copies += copies
        return [Product(weight, bias, slice(None))]

    def are_those_of(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the modules and parameters that the weights are from, and the latter where they were."""
        return (
            modules == self.modules
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and list(map(attrgetter("dtype"), parameters)) == self.dtypes
            and self.are_in_place()
        )

    def are_in_place(self) -> bool:
        """Whether the memory of all parameters is where a graph would read it."""
        return list(map(torch.Tensor.data_ptr, self.parameters)) == self.pointers

    def have_changed(self) -> bool:
        """Whether something wrote to a parameter that the engine has a copy of."""
        return list(map(attrgetter("_version"), self.sources)) != self.versions

    def refresh(self) -> None:
        self.versions = list(map(attrgetter("_version"), self.sources))
        for copy, source in self.copies:
            copy.copy_(source)


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Those that lie in the modules themselves, one after the other."""
    slots = chain.from_iterable(module._parameters.values() for module in modules)
    return [parameter for parameter in slots if parameter is not None]


class Buffers:
    """Room for the activations of so many patches; what is needed at different times shares it."""

    def __init__(self, patches: int, patch_dim: int, hidden_size: int, intermediate_size: int, like: torch.Tensor):
        # Rows of a multiple of 16 bytes, which matrix products want. What fills them up has to be zero.
        self.patches = like.new_zeros(patches, -(-patch_dim // 8) * 8)
        self.residual, self.normed = like.new_empty(2, patches, hidden_size)
        self.wide = like.new_empty(patches * max(3 * hidden_size, 2 * intermediate_size))
        self.activated = like.new_empty(patches, intermediate_size)

    def first(self, patches: int) -> "Buffers":
        part = object.__new__(Buffers)
        part.patches, part.residual, part.normed = (x[:patches] for x in (self.patches, self.residual, self.normed))
        part.wide, part.activated = self.wide, self.activated[:patches]
        return part


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection during a capture could destroy CUDA objects, which ends the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """A captured forward over static inputs. The graphs of an engine share memory, so they run one after the other."""

    def __init__(self, budget: Budget, buffers: Buffers):
        self.budget, self.buffers = budget, buffers.first(budget.patches)
        like = {"dtype": torch.int32, "device": buffers.patches.device}
        # Segments that a batch lacks begin and end where the padding ends.
        self.cu_seqlens = torch.full((budget.segments + 1,), budget.patches, **like)
        self.frame_sizes = torch.ones(2, budget.segments, **like)
        self.loaded_segments = 0
        self.graph = torch.cuda.CUDAGraph()
        self.output: torch.Tensor | None = None
        self.last_forward = 0

    def load(self, patches: torch.Tensor, layout: PackedLayout, zero_padding: bool) -> None:
        own, patch_dim = patches.shape
        self.buffers.patches[:own, :patch_dim].copy_(patches)
        if zero_padding and own < self.budget.patches:
            self.buffers.patches[own:].zero_()
        segments = len(layout.cu_seqlens) - 1
        if segments < self.loaded_segments:
            self.cu_seqlens[segments + 1 : self.loaded_segments + 1].fill_(self.budget.patches)
        self.cu_seqlens[: segments + 1].copy_(layout.cu_seqlens)
        self.frame_sizes[:, :segments].copy_(layout.frame_sizes)
        self.loaded_segments = segments

    def capture(self, run: Callable[[], torch.Tensor], stream: torch.cuda.Stream, pool: Any) -> None:
        """Captures `run`, which has to have run before: compiling kernels is no part of a graph."""
        # With workspaces from the pool: those of other streams are others', and may be freed.
        torch._C._cuda_clearCublasWorkspaces()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        try:
            with torch.cuda.stream(stream), without_garbage_collection():
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = run()
                except BaseException:
                    with suppress(RuntimeError):
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self.output = output


class Started(NamedTuple):
    """A forward on its way, before anyone has looked whether it may be; and the versions of the weights it reads."""

    engine: "Engine"
    graph: Graph
    output: torch.Tensor
    versions: list[int]


class Engine:
    """One model's weights, buffers and graphs. `reason` says why it cannot run; `None` where it can."""

    def __init__(self, model: nn.Module, settings: CudaInferenceSettings):
        self.settings, self.config = settings, model.config
        self.is_native = model.config.is_native
        self.lock = threading.Lock()
        self.head_dim = model.config.hidden_size // model.config.num_attention_heads
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self.seen: Counter[tuple] = Counter()
        self.forwards = 0
        self.capture_failure: str | None = None
        self.dense_works, self.dense_tried = True, False
        # Whether the last forward was let in: then the next may start before it is.
        self.admitted = False
        self.has_swiglu = False
        # What the door saw when it last let a forward in.
        self.modules: Any = None
        self.buffers: list[Buffers] = []
        self.tables: dict[int, torch.Tensor] = {}
        self.weights = Weights(model, merge=False)
        self.dtype, self.device = self.weights.parameters[0].dtype, self.weights.parameters[0].device
        self.reason = self.find_reason()
        if self.reason is not None:
            return
        with torch.cuda.device(self.device):
            self.reason = self.find_failure()
            if settings.merge_weights and self.reason is None:
                # Too little memory for copies leaves enough to run without.
                with suppress(torch.OutOfMemoryError):
                    self.weights = Weights(model, merge=True)
                    self.has_swiglu = self.compiles_swiglu()
            # `ready`: weights and tables are written. `done`: the last graph has run.
            self.ready, self.done = torch.cuda.Event(), torch.cuda.Event()
            self.ready.record()
            self.done.record()
            self.pool, self.capture_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.last_stream: torch.cuda.Stream | None = None
        self.graph_stream: torch.cuda.Stream | None = None

    def find_reason(self) -> str | None:
        parameters = self.weights.parameters
        if triton is None:
            return "Triton is not installed"
        if torch.version.cuda is None:
            return "this PyTorch is not built for CUDA"
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            return "the weights are of more than one dtype or on more than one device"
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the weights are {self.dtype}"
        if self.device.type != "cuda":
            return f"the weights are on {self.device}"
        if any(parameter.is_inference() for parameter in parameters):
            return "the weights were made in inference mode, where nothing tells that they changed"
        if self.weights.activations - {"SiLU", "SiLUActivation"}:
            return f"the activation is {self.config.hidden_act}"
        if self.head_dim % 8 or self.head_dim > 256:
            return f"no attention kernel takes heads of size {self.head_dim}"
        self.capability = torch.cuda.get_device_capability(self.device)
        # Measured on Hopper; docs/kernels.md.
        self.has_own_attention = (
            self.capability[0] == 9 and self.dtype != torch.float32 and self.head_dim in (16, 32, 64, 128)
        )
        if self.dtype == torch.bfloat16 and self.capability < (8, 0):
            return "this GPU has no bfloat16"
        return None

    def find_failure(self) -> str | None:
        """Triton compiles at the first call, with a C compiler that not every machine has."""
        try:
            row = torch.ones(1, self.config.hidden_size, dtype=self.dtype, device=self.device)
            add_rms_norm(row, None, row[0], 1e-5, out=row)
        except Exception as error:  # whatever a compiler raises
            return f"Triton compiles no kernels here: {error}"
        return None

    def compiles_swiglu(self) -> bool:
        """Whether gate, up and what joins them can be one kernel: on Hopper, by a Triton that has descriptors."""
        config = self.config
        sizes = (config.hidden_size, config.intermediate_size)
        if TensorDescriptor is None or self.capability[0] != 9 or self.dtype == torch.float32:
            return False
        if any(size % 8 for size in sizes):
            return False
        rows = torch.ones(16, config.hidden_size, dtype=self.dtype, device=self.device)
        try:
            weight = rows.new_ones(2 * config.intermediate_size, config.hidden_size)
            for tile in (TALL_TILE, LOW_TILE):
                swiglu(rows, weight, out=rows.new_empty(16, config.intermediate_size), tile=tile)
        except Exception as error:  # whatever a compiler raises
            logger.warning("Triton does not compile a product of gate and up here, which runs as two: %s", error)
            return False
        return True

    def new_buffers(self, patches: int) -> Buffers:
        config, like = self.config, self.weights.parameters[0]
        patch_dim = config.num_channels * config.patch_size**2
        return Buffers(patches, patch_dim, config.hidden_size, config.intermediate_size, like)

    def new_graph(self, budget: Budget) -> Graph:
        # Graphs captured one by one would each add their own buffers, so they share the smallest that are large enough.
        large_enough = [buffers for buffers in self.buffers if len(buffers.patches) >= budget.patches]
        if not large_enough:
            most = padded_size(self.settings.max_graph_patches)
            large_enough = [self.new_buffers(min(power_of_two(budget.patches, 1024), most))]
            self.buffers += large_enough
        buffers = min(large_enough, key=lambda buffers: len(buffers.patches))
        return Graph(budget, buffers)

    def position_embeddings(self, places: torch.Tensor, side: int) -> torch.Tensor:
        """Of patches in `places`, what [`patch_places`] returns: `(patches, hidden_size)`."""
        if self.is_native:
            return native_positions(places, self.tables[side])
        table = self.weights.embeddings.position_embedding.weight
        return learned_positions(places, table)

    def attention(
        self,
        cu_seqlens: torch.Tensor,
        places: torch.Tensor,
        longest: int,
        length: int | None = None,
        lengths: Sequence[int] = (),
    ) -> Attention:
        """
        The fastest kernel of PyTorch's own for these segments, all of `length` patches where that is given; by the
        measurements in docs/kernels.md. One that the user chose by name is not second-guessed.
        """
        if is_flash_attention_requested(self.config):
            interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            segments = {
                **{"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens},
                **{"max_length_q": longest, "max_length_k": longest},
            }

            def chosen(module, *states):
                states = (x.transpose(0, 1).unsqueeze(0) for x in states)
                options = {"dropout": 0.0, "scaling": self.head_dim**-0.5, "is_causal": False}
                return interface(module, *states, attention_mask=None, **options, **segments)[0].squeeze(0)

            return chosen

        if length is not None:

            def dense(module, *states):
                query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in states)
                output = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
                return output.transpose(1, 2).flatten(0, 1)

            return dense

        if self.has_own_attention:
            return lambda module, *states: segment_attention(*states, places)  # type: ignore[call-arg]

        if len(lengths) > MAX_SEGMENTS_PER_CALL:
            return self.attention_in_parts(cu_seqlens, places, lengths)

        if self.dtype != torch.float32 and self.capability >= (8, 0):

            def flash(module, query, key, value):
                # What `varlen_attn` calls, which adds a kernel for the state of a dropout that it lacks.
                return torch.ops.aten._flash_attention_forward(
                    query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False
                )[0]

            return flash

        def efficient(module, *states):
            query, key, value = (x.unsqueeze(0) for x in states)
            return torch.ops.aten._efficient_attention_forward(
                query, key, value, None, cu_seqlens, cu_seqlens, longest, longest, 0.0, 0
            )[0].squeeze(0)

        return efficient

    def attention_in_parts(self, cu_seqlens: torch.Tensor, places: torch.Tensor, lengths: Sequence[int]) -> Attention:
        parts, start = [], 0
        for first in range(0, len(lengths), MAX_SEGMENTS_PER_CALL):
            own = lengths[first : first + MAX_SEGMENTS_PER_CALL]
            rows = slice(start, start + sum(own))
            cu = cu_seqlens[first : first + len(own) + 1] - start
            parts.append((rows, self.attention(cu, places, max(own))))
            start = rows.stop

        def in_parts(module, *states):
            return torch.cat([attend(module, *(x[rows] for x in states)) for rows, attend in parts])

        return in_parts

    def forward(self, buffers: Buffers, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """`buffers.patches` to `(patches, hidden_size)` after the final norm, in `buffers.normed`."""
        weights, config = self.weights, self.config
        residual, normed, activated = buffers.residual, buffers.normed, buffers.activated
        patches = len(residual)
        qkv = buffers.wide[: patches * 3 * config.hidden_size].view(patches, -1)
        gate_up = buffers.wide[: patches * 2 * config.intermediate_size].view(patches, -1)

        patch_embed, norm = weights.embeddings.patch_embed, weights.embeddings.rms_norm
        weight = patch_embed.weight
        weight = (weight.permute(0, 2, 3, 1) if config.patch_layout == "channels_last" else weight).flatten(1)
        weight = F.pad(weight, (0, buffers.patches.shape[1] - weight.shape[1]))
        torch.addmm(patch_embed.bias, buffers.patches, weight.t(), out=normed)
        add_rms_norm(normed, None, norm.weight, norm.eps, out=residual)

        norms = [*(layer.norm1 for layer in weights.layers), weights.norm]
        add_rms_norm(residual, positions, norms[0].weight, norms[0].eps, out=normed)
        for layer, next_norm in zip(weights.layers, norms[1:], strict=True):
            for product in layer.qkv:
                product(normed, out=qkv)
            attended = attend(layer.attention, *qkv.view(patches, 3, -1, self.head_dim).unbind(1))
            self.add_and_norm(layer.out, attended.flatten(1), layer.norm2, buffers)
            if self.has_swiglu and layer.gate_up[0].bias is None:
                swiglu(normed, layer.gate_up[0].weight, out=activated)
            else:
                for product in layer.gate_up:
                    product(normed, out=gate_up)
                silu_mul(gate_up, out=activated)
            self.add_and_norm(layer.down, activated, next_norm, buffers)
        return normed

    def add_and_norm(self, product: Product, states: torch.Tensor, norm: nn.RMSNorm, buffers: Buffers) -> None:
        residual, normed = buffers.residual, buffers.normed
        if len(residual) <= FEW_PATCHES or product.bias is not None:
            product(states, out=normed)
            add_rms_norm(residual, normed, norm.weight, norm.eps, out=normed)
        else:
            residual.addmm_(states, product.weight.t())
            add_rms_norm(residual, None, norm.weight, norm.eps, out=normed)

    def may_be_dense(self, patches: int, segments: int, length: int, attention: str) -> bool:
        """Whether all segments are of one length, for which cuDNN's dense kernel is the fastest."""
        return (
            segments * length == patches
            and segments <= MAX_SEGMENTS_PER_CALL
            and patches * length >= DENSE_SCORES
            and self.dtype != torch.float32
            and self.capability >= (9, 0)
            and self.head_dim <= 128
            and self.dense_works
            and attention == "sdpa"
            and torch.backends.cuda.cudnn_sdp_enabled()
        )

    def try_dense(self) -> None:
        """cuDNN need not be there, nor of a version that has this kernel."""
        row = torch.ones(64, self.config.num_attention_heads, self.head_dim, dtype=self.dtype, device=self.device)
        try:
            self.attention(row, row, 64, length=64)(None, row, row, row)
        except RuntimeError:
            self.dense_works = False
        self.dense_tried = True

    def budget_of(self, patches: int, layout: PackedLayout) -> Budget:
        """The smallest budget that this layout fits; its own where it came often enough to have one."""
        segments, longest = len(layout.cu_seqlens) - 1, layout.max_seqlen
        side = power_of_two(layout.num_positions, 128) if self.is_native else 0  # type: ignore[arg-type]
        attention = self.config._attn_implementation
        if self.may_be_dense(patches, segments, longest, attention) and self.seen[segments, longest] >= DENSE_AFTER:
            return Budget(patches, segments, longest, side, attention, length=longest)
        return self.budget_for_any(patches, segments, longest, side, attention)

    def budget_for_any(self, patches: int, segments: int, longest: int, side: int, attention: str) -> Budget:
        size = padded_size(patches)
        if self.has_own_attention and attention == "sdpa":
            return Budget(size, size, size, side, attention)
        segments, longest = power_of_two(segments + 1, 16), power_of_two(max(longest, size - patches), 256)
        return Budget(size, segments, longest, side, attention)

    def key_of(self, budget: Budget) -> tuple:
        """What a graph depends on: the kernels and numbers it was captured with are in it for good."""
        precision = self.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision
        return budget, precision, self.config.patch_layout, *map(attrgetter("eps"), self.weights.norms)

    def graph_for(self, budget: Budget, at_once: bool = False) -> Graph | None:
        """The graph of this budget, not captured yet if it is new; `None` where the forward runs without."""
        settings = self.settings
        if budget.patches > settings.max_graph_patches or self.capture_failure is not None:
            return None
        key = self.key_of(budget)
        graph = self.graphs.get(key)
        if graph is None:
            self.seen[key] += 1
            if self.seen[key] < 2 and budget.length is None and not at_once:
                return None
            if len(self.graphs) >= settings.max_graphs:
                oldest = next(iter(self.graphs.values()), None)
                if oldest is None or self.forwards - oldest.last_forward < PATIENCE * settings.max_graphs:
                    return None
                self.done.synchronize()
                self.graphs.popitem(last=False)
            # Tensors made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                graph = self.graphs[key] = self.new_graph(budget)
        self.touch(graph)
        return graph

    def touch(self, graph: Graph) -> None:
        graph.last_forward = self.forwards
        self.graphs.move_to_end(self.key_of(graph.budget))

    def capture(self, graph: Graph) -> None:
        budget = graph.budget

        def run() -> torch.Tensor:
            places = patch_places(graph.cu_seqlens, graph.frame_sizes, budget.patches)
            attend = self.attention(graph.cu_seqlens, places, budget.longest, budget.length)
            return self.forward(graph.buffers, self.position_embeddings(places, budget.side), attend)

        try:
            run()
            graph.capture(run, self.capture_stream, self.pool)
        except RuntimeError as error:
            # Out of memory, say, or a kernel of the user's choice that cannot be captured.
            self.capture_failure = str(error)
            self.graphs.clear()
            logger.warning("No CUDA graph could be captured, this model runs without: %s", self.capture_failure)

    def position_table(self, side: int) -> None:
        if side and side not in self.tables:
            positions = torch.arange(side, device=self.device)
            self.tables[side] = sincos(positions, self.config.hidden_size // 4).to(self.dtype)
            self.ready.record()

    def run(
        self, graph: Graph, patches: torch.Tensor, layout: PackedLayout, stream: torch.cuda.Stream
    ) -> torch.Tensor | None:
        """Features of a tensor of their own; `None` where the graph is new and cannot be captured."""
        if stream != self.graph_stream:
            stream.wait_event(self.done)
            self.graph_stream = stream
        # A kernel of the user's choice may read past a segment's end.
        graph.load(patches, layout, zero_padding=graph.budget.attention != "sdpa")
        if graph.output is None:
            with torch.inference_mode(False), torch.no_grad():
                self.capture(graph)
        if graph.output is None:
            return None
        graph.graph.replay()
        output = graph.output[: len(patches)].clone()
        self.done.record(stream)
        return output

    def start(self, patches: torch.Tensor, layout: PackedLayout) -> Started | None:
        """`encode`, where there is a graph already and no parameter has moved."""
        if not self.admitted or patches.device != self.device:
            return None
        with self.lock:
            if not self.weights.are_in_place():
                return None
            graph = self.graphs.get(self.key_of(self.budget_of(len(patches), layout)))
            if graph is None or graph.output is None:
                return None
            stream = torch.cuda.current_stream(self.device)
            self.wait_until_ready(stream)
            self.admitted = False
            output = self.run(graph, patches, layout, stream)
            return None if output is None else Started(self, graph, output, self.weights.versions)

    def wait_until_ready(self, stream: torch.cuda.Stream) -> None:
        if stream != self.last_stream:
            stream.wait_event(self.ready)
            self.last_stream = stream

    def still_holds(self, started: Started) -> bool:
        """Whether it was computed with the weights as they are: another thread may have refreshed their copies."""
        return started.versions is self.weights.versions and not self.weights.have_changed()

    def encode(self, patches: torch.Tensor, layout: PackedLayout, started: Started | None) -> torch.Tensor:
        with self.lock:
            self.admitted = True
            self.forwards += 1
            if len(self.seen) > 4096:
                self.seen.clear()
            segments, longest = len(layout.cu_seqlens) - 1, layout.max_seqlen
            if self.may_be_dense(len(patches), segments, longest, self.config._attn_implementation):
                self.seen[segments, longest] += 1
            if started is not None and self.still_holds(started):
                if self.graphs.get(self.key_of(started.graph.budget)) is started.graph:
                    self.touch(started.graph)
                return started.output
            budget = self.budget_of(len(patches), layout)
            if budget.length is not None and not self.dense_tried:
                with torch.inference_mode(False), torch.no_grad():
                    self.try_dense()
                budget = self.budget_of(len(patches), layout)
            graph = self.graph_for(budget)
            stream = torch.cuda.current_stream(self.device)
            self.wait_until_ready(stream)
            with torch.inference_mode(False), torch.no_grad():
                self.position_table(budget.side)
                if self.weights.have_changed():
                    stream.wait_event(self.done)
                    self.weights.refresh()
                    self.ready.record(stream)
            if graph is not None:
                output = self.run(graph, patches, layout, stream)
                if output is not None:
                    return output
        buffers = self.new_buffers(len(patches))
        buffers.patches[:, : patches.shape[1]].copy_(patches)
        lengths = layout.lengths if len(layout.cu_seqlens) > MAX_SEGMENTS_PER_CALL + 1 else ()
        length = budget.length if self.dense_works else None
        places = patch_places(layout.cu_seqlens, layout.frame_sizes, len(patches))
        attend = self.attention(layout.cu_seqlens, places, layout.max_seqlen, length, lengths)
        return self.forward(buffers, self.position_embeddings(places, budget.side), attend)

    def capture_ahead(self, lengths: Sequence[int]) -> None:
        side = 128 if self.is_native else 0
        attention = self.config._attn_implementation
        budget = self.budget_for_any(sum(lengths), len(lengths), max(lengths), side, attention)
        with self.lock:
            self.position_table(budget.side)
            graph = self.graph_for(budget, at_once=True)
            if graph is not None and graph.output is None:
                torch.cuda.current_stream().wait_event(self.done)
                self.capture(graph)
                self.done.record()

    def close(self) -> None:
        """Waits for the last graph: what it reads is about to be freed."""
        if self.reason is None:
            self.done.synchronize()


engines: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()
settings_of: WeakKeyDictionary[nn.Module, CudaInferenceSettings] = WeakKeyDictionary()
engines_lock = threading.Lock()


def engine_of(model: nn.Module, modules: Any = None) -> Engine:
    """The model's engine: a new one where modules or parameters have moved or been replaced."""
    engine = engines.get(model)
    if engine is not None and engine.modules is modules is not None:
        return engine
    below = list(model.modules())[1:]
    parameters = parameters_of(below)
    with engines_lock, torch.inference_mode(False), torch.no_grad():
        engine = engines.get(model)
        if engine is None or not engine.weights.are_those_of(below, parameters):
            release(model)
            engine = engines[model] = Engine(model, settings_of.get(model, CudaInferenceSettings()))
        engine.modules = modules
    return engine


def has_frames(layout: PackedLayout) -> bool:
    """Whether positions follow from the sizes of the frames."""
    given = (layout.position_ids, layout.interp_indices, layout.interp_weights)
    known = layout.frame_sizes is not None and layout.num_positions is not None
    return known and all(value is None for value in given)


def refusal(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, state: Any) -> str | None:
    """Why this forward cannot run here; `None` where it can, and then `encode` has to follow at once."""
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a CUDA graph"
    if not has_frames(layout):
        return "the sizes of the frames are not known, or positions were given"
    if model.config._attn_implementation != "sdpa" and not is_flash_attention_requested(model.config):
        return f"the attention implementation is {model.config._attn_implementation}"
    engine = engine_of(model, state)
    if engine.reason is None and engine.device != hidden_states.device:
        return f"the patches are on {hidden_states.device}, the weights on {engine.device}"
    return engine.reason


def start(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout) -> Started | None:
    """
    Starts a forward that is likely to be let in, before anyone has looked whether it may be: the GPU works meanwhile.
    To be handed to `encode`, or dropped. `None` where there is no graph for it, or the forward before was not let in.
    """
    engine = engines.get(model)
    if engine is None or engine.reason is not None or torch.is_grad_enabled() or not has_frames(layout):
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    with torch.cuda.device(engine.device):
        return engine.start(hidden_states, layout)


def encode(
    model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, state: Any, depths: Sequence[int], last: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """
    Patches `(total_patches, num_channels * patch_size**2)` to features `(total_patches, hidden_size)` after the final
    norm, in the dtype of the weights; a tensor of its own, not one that the next forward writes to.
    """
    if depths or not last:
        raise NotImplementedError("states of single blocks")
    # Another thread may have released it since it was asked.
    engine = engines.get(model) or engine_of(model)
    with torch.cuda.device(engine.device):
        return (), engine.encode(hidden_states, layout.to(hidden_states.device, non_blocking=True), None)


def configure(model: nn.Module, **changes: Any) -> None:
    """Changes fields of [`CudaInferenceSettings`] for this model; its graphs and copies are made anew."""
    settings_of[model] = replace(settings_of.get(model, CudaInferenceSettings()), **changes)
    release(model)


def capture(model: nn.Module, lengths: Sequence[int]) -> None:
    """
    Captures ahead of the first forward the graph that serves segments of these lengths, and every mix of its budget.

    Raises:
        ValueError: this model cannot run here.
    """
    engine = engine_of(model)
    if engine.reason is not None:
        raise ValueError(f"No CUDA graph can be captured: {engine.reason}.")
    with torch.cuda.device(engine.device), torch.inference_mode(False), torch.no_grad():
        engine.capture_ahead(lengths)


def refresh(model: nn.Module) -> None:
    """To be called after weights were written to through `.data`, which leaves no trace: copies are made anew."""
    engine = engines.get(model)
    if engine is not None and engine.reason is None:
        engine.weights.versions = []


def release(model: nn.Module) -> None:
    """Frees the model's graphs, buffers and copies of weights; the next forward makes what it needs."""
    engine = engines.pop(model, None)
    if engine is not None:
        engine.close()
