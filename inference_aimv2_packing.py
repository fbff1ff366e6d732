# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
The door to the inference engines.

An engine computes what the plain model computes, faster, and without calling the model's modules. It may run only where
nobody can tell the difference: `choose_engine` decides that once per forward, from the state as it then is.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import modeling_layers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .cpu_inference_aimv2_packing import encode as encode_on_cpu
from .cpu_inference_aimv2_packing import refusal as cpu_refusal
from .cuda_engine_aimv2_packing import encode as cuda_encode
from .cuda_engine_aimv2_packing import refusal as cuda_refusal
from .layout_aimv2_packing import PackedLayout


logger = logging.get_logger(__name__)


class Engine(NamedTuple):
    """
    An accelerated path.

    Attributes:
        name (`str`): What `model.path` says when it ran.
        refusal (`Callable`): `(model, hidden_states, layout, modules)` to why it cannot run this forward, or `None`.
            `modules`, a [`Modules`], is the same object as long as nothing in it has changed.
        encode (`Callable`): `(model, hidden_states, layout)` to the features after the final norm.
        start (`Callable`, *optional*): `(model, hidden_states, layout)` to what `encode` takes as `started`, or `None`:
            begins on the device what `encode` then completes. Nothing comes of it if the forward is not let in.
    """

    name: str
    refusal: Callable[..., str | None]
    encode: Callable[..., torch.Tensor]
    start: Callable[[nn.Module, torch.Tensor, PackedLayout], Any] | None = None


class State(NamedTuple):
    modules: Any
    engines: dict

    def weights(self):
        return self.modules.weights


STATES: WeakKeyDictionary = WeakKeyDictionary()


def state_of(model, modules):
    state = STATES.get(model)
    if state is None or state.modules is not modules:
        state = STATES[model] = State(modules, {})
    return state


def encode_on_cuda(model, hidden_states, layout):
    return cuda_encode(model, hidden_states, layout, state_of(model, SEEN[model]))[1]


def refusal_on_cuda(model, hidden_states, layout, modules):
    return cuda_refusal(model, hidden_states, layout, state_of(model, modules))


ENGINES = (
    Engine("cpu", cpu_refusal, encode_on_cpu),
    Engine("cuda", refusal_on_cuda, encode_on_cuda),
)

# The classes of the modeling file, and where these and torch's have their `forward` from.
MODELING = f"{__name__.rpartition('.')[0]}.modeling_aimv2_packing"
CHECKPOINTING_FILE = modeling_layers.__file__
LIBRARY_CLASSES = {nn.Linear, nn.RMSNorm, nn.Embedding, nn.ModuleList}
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CAPTURE_MODULE = "transformers.utils.output_capturing"


class Modules:
    """
    The modules and parameters below a model, as they were when looked at. The lists hold those objects' own containers,
    so that a look at what is in them now is a few passes in C.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.below = modules[1:]
        self.states = [module.__dict__ for module in self.below]
        self.child_tables = [module._modules for module in modules if module._modules]
        self.parameter_tables = [module._parameters for module in modules if module._parameters]
        self.children = list(chain.from_iterable(map(dict.values, self.child_tables)))
        parameters = list(chain.from_iterable(map(dict.values, self.parameter_tables)))
        self.parameter_ids = list(map(id, parameters))
        self.weights = [parameter for parameter in parameters if parameter is not None]
        self.types: list[type[nn.Module]] = [type(module) for module in self.below]
        self.sizes = list(map(len, self.states))
        self.hooks = [state[name] for name in HOOKS for state in self.states]
        self.owners = [module for _ in HOOKS for module in self.below]
        self.forwards = {kind: kind.forward for kind in set(self.types)}
        self.aligned = [module for module in self.below if "_hf_hook" in module.__dict__]
        self.obstacle = self.look_closely()
        self.dtypes = list(map(attrgetter("dtype"), self.weights))
        self.devices = set(map(attrgetter("device"), self.weights))
        self.pointers = [] if self.obstacle else list(map(torch.Tensor.data_ptr, self.weights))

    def are_current(self) -> bool:
        """Whether the same modules of the same classes hold the same parameters, of the same dtypes, where they lay."""
        return (
            list(chain.from_iterable(map(dict.values, self.child_tables))) == self.children
            and list(map(id, chain.from_iterable(map(dict.values, self.parameter_tables)))) == self.parameter_ids
            and list(map(type, self.below)) == self.types
            and list(map(len, self.states)) == self.sizes
            and all(kind.forward is forward for kind, forward in self.forwards.items())
            and list(map(attrgetter("dtype"), self.weights)) == self.dtypes
        )

    def are_in_place(self) -> bool:
        """Whether the memory of all parameters is where it was, and of the same dtype."""
        return (
            list(map(torch.Tensor.data_ptr, self.weights)) == self.pointers
            and list(map(attrgetter("dtype"), self.weights)) == self.dtypes
        )

    def look_closely(self) -> str | None:
        """What in the modules themselves keeps every engine out."""
        for module, kind in zip(self.below, self.types, strict=True):
            name = kind.__name__
            if kind not in LIBRARY_CLASSES and kind.__module__ not in (MODELING, *ACTIVATIONS):
                return f"a module is a {name}"
            if not is_own_forward(kind):
                return f"the forward of {name} has been replaced"
            if "_compiled_call_impl" in module.__dict__:
                return f"a {name} is compiled"
            if "forward" in module.__dict__ and not is_idle_alignment(module):
                return f"the forward of a {name} has been replaced"
        for weight in self.weights:
            if type(weight) is not nn.Parameter:
                return f"a weight is a {type(weight).__name__}"
        return None


def is_own_forward(kind: type[nn.Module]) -> bool:
    """Whether the class has its `forward` from where it is defined, as before anyone patched it."""
    code = getattr(kind.forward, "__code__", None)
    home = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return code is not None and code.co_filename in (home, CHECKPOINTING_FILE, torch_module.__file__)


def is_idle_alignment(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward by one that only makes sure that the inputs are where they are."""
    state = module.__dict__
    hook, original = state.get("_hf_hook"), getattr(state.get("_old_forward"), "__func__", None)
    if hook is None or original is not type(module).forward:
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


def is_idle_capture(hook: Callable) -> bool:
    """Whether this is a hook with which transformers returns `hidden_states`; it stays when that is over."""
    return getattr(hook, "__module__", None) == CAPTURE_MODULE


# What people replace to see or change products and attention.
FUNCTIONS = ("linear", "scaled_dot_product_attention")

SEEN: WeakKeyDictionary[nn.Module, Modules] = WeakKeyDictionary()


def choose_engine(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, captures: bool) -> Engine | None:
    """
    The engine that runs this forward, or `None` where the plain model has to. Which it was, and why, is then in
    `model.path` and in the debug log.

    Args:
        model (`nn.Module`): An `Aimv2PackingModel`.
        hidden_states (`torch.Tensor`): The patches.
        layout (`PackedLayout`): How they divide.
        captures (`bool`): Whether what each layer returns was asked for.
    """
    if torch.compiler.is_compiling():
        return None
    started, reasons = None, []
    obstacle = obstacle_in_call(model, hidden_states, layout, captures)
    if obstacle is None:
        for engine in ENGINES:
            # The last forward ran there: the device need not wait until it is certain that this one may.
            if engine.start is not None and engine.name == model.path:
                started = engine.start(model, hidden_states, layout)
        modules = SEEN.get(model)
        if modules is None or not modules.are_current():
            modules = SEEN[model] = Modules(model)
        obstacle = obstacle_in_modules(model, hidden_states, modules)
    for engine in ENGINES if obstacle is None else ():
        reason = engine.refusal(model, hidden_states, layout, modules)
        if reason is None:
            if model.path != engine.name:
                model.path = engine.name
            return engine if started is None else engine._replace(encode=partial(engine.encode, started=started))
        reasons.append(f"{engine.name}: {reason}")
    path = f"plain: {obstacle or ', '.join(reasons)}"
    if path != model.path:
        logger.debug(path)
        model.path = path
    return None


def obstacle_in_call(model: nn.Module, hidden_states: torch.Tensor, layout: PackedLayout, captures: bool) -> str | None:
    """Why no engine may run this forward, whatever the model's modules are, or `None`."""
    if not model.use_engines:
        return "`use_engines` is false"
    if captures:
        return "hidden states of every layer were asked for"
    if layout.runs is None:
        return "the lengths of the segments are not known on the host"
    if len(hidden_states) == 0:
        return "there are no patches"
    if type(hidden_states) is not torch.Tensor and type(hidden_states) is not nn.Parameter:
        return f"`hidden_states` is a {type(hidden_states).__name__}"
    return watching_mode(hidden_states)


def obstacle_in_modules(model: nn.Module, hidden_states: torch.Tensor, modules: Modules) -> str | None:
    """Why no engine may run in place of these modules, or `None`."""
    if modules.obstacle:
        return modules.obstacle
    for module, hooks in zip(modules.owners, modules.hooks, strict=True) if any(modules.hooks) else ():
        if not all(map(is_idle_capture, hooks.values())):
            return f"a {type(module).__name__} has a forward hook"
    if not all(map(is_idle_alignment, modules.aligned)):
        return "accelerate moves weights or inputs"
    if not modules.weights or modules.dtypes.count(modules.dtypes[0]) < len(modules.dtypes):
        return "the weights are of several dtypes"
    if modules.devices != {hidden_states.device}:
        return "weights and patches are on several devices"
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(map(attrgetter("requires_grad"), modules.weights))
    ):
        return "gradients are enabled"
    if any(map(attrgetter("training"), modules.below)) and model.config.attention_dropout:
        return "dropout is active"
    return None


def watching_mode(hidden_states: torch.Tensor) -> str | None:
    """The mode of torch that sees or changes each operation or module call, if one is on."""
    device = hidden_states.device.type
    try:
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
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "there is a global forward hook"
        if torch.is_autocast_enabled(device):
            return "autocast is on"
        if any(getattr(F, name) is not getattr(torch._C._nn, name) for name in FUNCTIONS):
            return "a function of torch.nn.functional has been replaced"
    except AttributeError as error:
        return f"this torch lacks a name ({error})"
    if ALL_ATTENTION_FUNCTIONS.get("sdpa", None) is not sdpa_attention_forward:
        return "the attention function called sdpa has been replaced"
    return None
