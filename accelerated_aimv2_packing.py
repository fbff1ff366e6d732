# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The packed AIMv2 model by inference engines.

An engine computes what the plain model computes, faster, and without calling the model's modules. It may run only where
nobody can tell the difference: that is decided once per forward, from the state as it then is.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import modeling_layers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cpu_engine_aimv2_packing import encode as encode_on_cpu
from .cpu_engine_aimv2_packing import refusal as cpu_refusal
from .cuda_engine_aimv2_packing import CudaGraphSettings, capture, lay_weights, release
from .cuda_engine_aimv2_packing import encode as encode_on_cuda
from .cuda_engine_aimv2_packing import refusal as cuda_refusal
from .cuda_graphs_aimv2_packing import addresses_of
from .layout_aimv2_packing import PackedLayout
from .modeling_aimv2_packing import Aimv2PackingForImageClassification, Aimv2PackingModel, global_change, is_from


logger = logging.get_logger(__name__)


class Engine(NamedTuple):
    """
    Attributes:
        refusal (`Callable`): `(model, hidden_states, layout, state)` to why it cannot run this forward, or `None`.
        encode (`Callable`): `(model, hidden_states, layout, state, depths, last)` to what
            [`~Aimv2PackingModel.encode`] returns.
        replay (`Callable`, *optional*): As `encode`, or to `None`: what may begin before it is known whether the model
            has changed since `state`; thrown away where it has.
    """

    refusal: Callable[..., str | None]
    encode: Callable[..., Any]
    replay: Callable[..., Any] | None = None


# By type of device.
ENGINES = {
    "cpu": Engine(cpu_refusal, encode_on_cpu),
    "cuda": Engine(cuda_refusal, encode_on_cuda, partial(encode_on_cuda, captures=False)),
}


class Aimv2PackingAcceleratedModel(Aimv2PackingModel):
    """
    [`Aimv2PackingModel`], its layers by an inference engine wherever that gives the same features faster.

    Attributes:
        use_engines (`bool`, defaults to `True`): Whether an engine may run.
        last_engine (`str`, or `None`): The engine that ran the last forward, `"cpu"` or `"cuda"`; `None` where the
            plain model did, or none has run yet.
        engine_refusal (`str`, or `None`): Why no engine ran the last forward; `None` where one did, or none has run
            yet.
        cuda_graph_settings (`CudaGraphSettings`): Of which batches the CUDA engine captures graphs, and how many; and
            whether it gives an image the same bits in any batch.

    Example:

    ```python
    >>> with torch.inference_mode():
    ...     model(**inputs)
    >>> model.last_engine, model.engine_refusal
    ('cpu', None)
    ```
    """

    use_engines = True
    last_engine: str | None = None
    engine_refusal: str | None = None
    cuda_graph_settings = CudaGraphSettings()

    def capture_cuda_graphs(self, lengths: Sequence[int]) -> None:
        """
        Captures before the first forward the CUDA graph that serves segments of these lengths, and every mix of as many
        patches, rounded up.

        Args:
            lengths (sequence of `int`): Patches of each segment; their sum decides.

        Raises:
            ValueError: there are no lengths, one is below 1, or no engine runs this model on a GPU as it is.
            RuntimeError: the graph could not be captured, or `cuda_graph_settings` allows none of this size.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"`lengths` must hold patches of at least one segment, each 1 or more, got {lengths!r}.")
        state = current_state(self)
        with torch.no_grad():
            patches = torch.empty(1, 1, device=state.device)
            reason = None if state.device.type == "cuda" else f"the weights are on {state.device}"
            reason = reason or refusal_of_modules(self, patches, state) or cuda_refusal(self, patches, None, state)
            if reason is not None:
                raise ValueError(f"No CUDA graph can be captured: {reason}.")
            capture(self, state, lengths)

    def release_cuda_graphs(self) -> None:
        """Frees the CUDA graphs and their buffers; later forwards capture what they need."""
        release(current_state(self))

    def _apply(self, *args, **kwargs):
        before = addresses_of(self)
        applied = super()._apply(*args, **kwargs)
        lay_weights(self, before)
        return applied

    def _initialize_weights(self, module, *args, **kwargs):
        super()._initialize_weights(module, *args, **kwargs)
        # The last that `from_pretrained` does with the model, or with the one that this is a part of.
        if module is self:
            lay_weights(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        lay_weights(self)

    def encode(
        self,
        hidden_states: torch.Tensor,
        layout: PackedLayout,
        depths: Sequence[int] = (),
        last: bool = True,
        attentions: list | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        name, depths = hidden_states.device.type, tuple(depths)
        state, outputs, refusal = None, None, refusal_of_call(self, hidden_states, layout)
        if refusal is None:
            outputs, before = self._replay(hidden_states, layout, depths, last)
            state = current_state(self)
            refusal = refusal_of_modules(self, hidden_states, state)
            outputs = outputs if state is before and refusal is None else None
        if refusal is None:
            refusal = ENGINES[name].refusal(self, hidden_states, layout, state)
        self._report(None if refusal else name, refusal)
        if refusal is not None:
            return super().encode(hidden_states, layout, depths, last, attentions)
        if outputs is not None:
            return outputs
        # A hook that makes the embeddings require gradients is of no use to a tower that has nothing to train, and
        # autocast to the dtype of the weights changes nothing.
        with torch.no_grad(), torch.autocast(name, enabled=False) if torch.is_autocast_enabled(name) else nullcontext():
            return ENGINES[name].encode(self, hidden_states, layout, state, depths, last)

    def _replay(self, hidden_states, layout, depths, last) -> "tuple[Any, ModelState | None]":
        """What the engine of the last forward can begin at once, and the record that it trusts: a GPU need not wait."""
        engine, state = ENGINES[hidden_states.device.type], recorded_state(self)
        if (
            engine.replay is None
            or state is None
            or self.last_engine != hidden_states.device.type
            or needs_gradients(hidden_states, state)
        ):
            return None, state
        return engine.replay(self, hidden_states, layout, state, depths, last), state

    def _report(self, engine: str | None, refusal: str | None) -> None:
        if (engine, refusal) != (self.last_engine, self.engine_refusal):
            self.last_engine, self.engine_refusal = engine, refusal
            if refusal is not None and not torch.compiler.is_compiling():
                logger.debug(f"no engine ran: {refusal}")


class Aimv2PackingAcceleratedForImageClassification(Aimv2PackingForImageClassification):
    """[`Aimv2PackingForImageClassification`], its tower an [`Aimv2PackingAcceleratedModel`]."""

    tower_class = Aimv2PackingAcceleratedModel


# The call


def refusal_of_call(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout) -> str | None:
    """Why no engine may run this forward, whatever the model's modules are, or `None`."""
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if not model.use_engines:
        return "`use_engines` is false"
    if hidden_states.device.type not in ENGINES:
        return f"there is none for {hidden_states.device.type}"
    if layout.runs is None:
        return "the lengths of the segments are not known on the host"
    if len(hidden_states) == 0:
        return "there are no patches"
    if type(hidden_states) is not torch.Tensor and type(hidden_states) is not nn.Parameter:
        return f"`hidden_states` is a {type(hidden_states).__name__}"
    try:
        return watching_mode(hidden_states)
    except AttributeError as error:
        return f"this torch lacks a name ({error})"


def watching_mode(hidden_states: torch.Tensor) -> str | None:
    """What sees or changes each operation or module call, if anything does."""
    if torch.jit.is_tracing():
        return "the model is being traced"
    if torch._C._len_torch_dispatch_stack() or hidden_states.is_meta:
        return "a dispatch mode is on"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is on"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is on"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, torch.utils._device.DeviceContext)
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a function mode is on"
    if (change := global_change()) is not None:
        return change
    if ALL_ATTENTION_FUNCTIONS.get("sdpa", None) is not sdpa_attention_forward:
        return "the attention function called sdpa has been replaced"
    return None


# The modules

# Where the classes of the layers are defined.
MODELING = f"{__name__.rpartition('.')[0]}.modeling_aimv2_packing"
LIBRARY_CLASSES = {nn.Linear, nn.RMSNorm, nn.Embedding, nn.ModuleList}
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")

HOOKS = (itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks"))

# With these Trainer and PEFT make the embeddings require gradients; they change no value.
INPUTS_REQUIRE_GRAD = {
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.mixed_model", "make_inputs_require_grad"),
    ("peft.utils.other", "make_inputs_require_grad"),
}


class ModelState:
    """
    The modules and weights below a model as they were when looked at: the one record of whether it has changed. It
    holds the modules' own tables, not the weights in them, so that a look at what is there now is a few passes in C,
    and a weight that was replaced is let go at once.

    Attributes:
        refusal (`str`, or `None`): What in the modules keeps every engine out.
        engines (`dict[str, Any]`): What an engine keeps with this record, and loses with it.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.below = modules[1:]
        self.types: list[type[nn.Module]] = list(map(type, self.below))
        self.states = [module.__dict__ for module in self.below]
        self.sizes = list(map(len, self.states))
        self.child_tables = [module._modules for module in modules if module._modules]
        self.children = list(map(dict, self.child_tables))
        self.aligned = [module for module in self.below if "_hf_hook" in module.__dict__]
        self.calls = [(kind, kind.forward, kind.__call__) for kind in set(self.types)]
        tables = [module._parameters for module in modules if module._parameters]
        names = set(chain.from_iterable(tables))
        self.tables = [(itemgetter(name), [own for own in tables if own.get(name) is not None]) for name in names]
        self.absent = [(itemgetter(name), [own for own in tables if own.get(name, own) is None]) for name in names]
        weights = self.weights()
        self.refusal = self.look_closely(weights)
        self.device = weights[0].device if weights else torch.device("meta")
        self.dtype = weights[0].dtype if weights else None
        self.requires_grad = any(weight.requires_grad for weight in weights)
        self.kinds = kinds_of(weights)
        self.checks = {torch.is_inference_mode_enabled(): check_of(weights)} if self.refusal is None else {}
        self.engines: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model, or one from a file, has no record yet.
        return type(None), ()

    def weights(self) -> list[nn.Parameter]:
        """The parameters below the model as they are now, those of one name after those of another."""
        return list(chain.from_iterable(map(get, tables) for get, tables in self.tables))

    def is_current(self) -> bool:
        """Whether the same modules of the same classes hold weights of the same types, dtypes and devices."""
        try:
            return (
                self.child_tables == self.children
                and list(map(type, self.below)) == self.types
                and list(map(len, self.states)) == self.sizes
                and all(kind.forward is forward and kind.__call__ is call for kind, forward, call in self.calls)
                and (self.weights_are_alike() if self.refusal is None else kinds_of(self.weights()) == self.kinds)
            )
        except (AttributeError, KeyError):
            # A weight was deleted, or this torch has no such check.
            return False

    def weights_are_alike(self) -> bool:
        """Whether what torch knows of each weight but its values is as recorded, and none was added."""
        weights, mode = self.weights(), torch.is_inference_mode_enabled()
        if any(list(map(get, tables)) != [None] * len(tables) for get, tables in self.absent):
            return False
        if mode in self.checks:
            return self.checks[mode].check(*weights)
        # torch's check of one mode refuses in the other, whatever the weights are.
        with torch.inference_mode(not mode):
            alike = self.checks[not mode].check(*weights)
        if alike:
            self.checks[mode] = check_of(weights)
        return alike

    def look_closely(self, weights: Sequence[torch.Tensor]) -> str | None:
        for module, kind in zip(self.below, self.types, strict=True):
            name, state = kind.__name__, module.__dict__
            if kind not in LIBRARY_CLASSES and kind.__module__ not in (MODELING, *ACTIVATIONS):
                return f"a module is a {name}"
            if not is_own_call(kind):
                return f"the forward of {name} has been replaced"
            if state.get("_compiled_call_impl") is not None:
                return f"a {name} is compiled"
            if "forward" in state and not is_idle_alignment(module):
                return f"the forward of a {name} has been replaced"
            if "weight" in state or (hasattr(module, "weight") and module._parameters.get("weight") is None):
                return f"the weight of a {name} is no parameter of it"
        if not weights:
            return "the model has no weights"
        for weight in weights:
            if type(weight) is not nn.Parameter:
                return f"a weight is a {type(weight).__name__}"
            if weight.dtype != weights[0].dtype:
                return "the weights are of several dtypes"
            if weight.device != weights[0].device:
                return "the weights are on several devices"
            if weight.layout != torch.strided:
                return f"a weight is {weight.layout}"
        return None


def kinds_of(weights: Sequence[torch.Tensor]) -> list[tuple[type, torch.dtype, torch.device]]:
    return [(type(weight), weight.dtype, weight.device) for weight in weights]


def check_of(weights: Sequence[torch.Tensor]) -> Any:
    """What `torch.compile` guards tensors by: one pass in C, which holds none of them."""
    sizes = [list(weight.shape) for weight in weights]
    strides = [list(weight.stride()) for weight in weights]
    return torch._C._dynamo.guards.TensorGuards(*weights, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def recorded_state(model: nn.Module) -> ModelState | None:
    """The record of the model's modules as they were when last looked at."""
    # On the model, so that it ends with it whatever the hooks below refer to.
    state = model.__dict__.get("_state")
    # A replica of `nn.DataParallel` has the attributes of the model, but modules of its own.
    return state if state is not None and state.child_tables[0] is model._modules else None


def current_state(model: nn.Module) -> ModelState:
    """The record of the model's modules: the same object as long as nothing in it has changed."""
    state = recorded_state(model)
    if state is None or not state.is_current():
        state = model.__dict__["_state"] = ModelState(model)
    return state


def is_own_call(kind: type[nn.Module]) -> bool:
    """Whether the class has its `forward` and `__call__` from where they are defined, as before anyone patched it."""
    modules = (sys.modules.get(kind.__module__), modeling_layers, torch_module)
    return is_from(kind.forward, *modules) and is_from(kind.__call__, *modules)


def is_idle_alignment(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward by one that only makes sure that the inputs are where they are."""
    state = module.__dict__
    hook, original = state.get("_hf_hook"), getattr(state.get("_old_forward"), "__func__", None)
    now = getattr(state.get("forward"), "func", None)
    if hook is None or original is not type(module).forward or getattr(now, "__module__", None) != "accelerate.hooks":
        return False
    if type(hook).__name__ != "AlignDevicesHook" or not type(hook).__module__.startswith("accelerate."):
        return False
    if hook.offload or hook.no_grad:
        return False
    if hook.execution_device is None:
        return True
    device = torch.device(hook.execution_device)
    return all(
        weight.device.type == device.type and device.index in (None, weight.device.index)
        for weight in module.parameters()
    )


def requires_grad_hooks_only(hooks: Iterable[Callable]) -> bool:
    return all(
        (getattr(hook, "__module__", None), getattr(hook, "__name__", None)) in INPUTS_REQUIRE_GRAD for hook in hooks
    )


def needs_gradients(hidden_states: torch.Tensor, state: ModelState) -> bool:
    return torch.is_grad_enabled() and (hidden_states.requires_grad or state.requires_grad)


def refusal_of_modules(model: nn.Module, hidden_states: torch.Tensor, state: ModelState) -> str | None:
    """Why no engine may run in place of these modules, or `None`."""
    if state.refusal is not None:
        return state.refusal
    for get in HOOKS:
        if any(map(get, state.states)):
            for kind, hooks in zip(state.types, map(get, state.states), strict=True):
                if not requires_grad_hooks_only(hooks.values()):
                    return f"a {kind.__name__} has a forward hook"
    if not all(map(is_idle_alignment, state.aligned)):
        return "accelerate moves weights or inputs"
    if state.device != hidden_states.device:
        return f"the weights are on {state.device}, the patches on {hidden_states.device}"
    device = state.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != state.dtype:
        return "autocast is on"
    if needs_gradients(hidden_states, state):
        return "gradients are enabled"
    if model.config.attention_dropout and any(module.training for module in state.below):
        return "dropout is active"
    return None


__all__ = ["Aimv2PackingAcceleratedForImageClassification", "Aimv2PackingAcceleratedModel"]
