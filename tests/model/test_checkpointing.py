# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checkpointing saves the state of the random generators where something draws from them, and only there; and what it does
otherwise is what torch's does.
"""

import functools
import gc
import importlib
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
from reference import ODD_GRIDS, REPO, hub_module, pack, packed_layout, packing_model, random_images, reference_model
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import checkpoint as torch_checkpoint
from transformers import Trainer, TrainingArguments
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


LAYERS = 2


@pytest.fixture
def states_saved(monkeypatch) -> list[int]:
    """One entry whenever the state of the CPU's generator is read."""
    saved, get_rng_state = [], torch.get_rng_state

    def counted():
        saved.append(1)
        return get_rng_state()

    monkeypatch.setattr(torch, "get_rng_state", counted)
    return saved


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.train()
    model(**inputs).last_hidden_state.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def add_noise(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + torch.randn_like(output)


# As of a function that was made by `exec`.
add_noise_from_nowhere = functools.partial(add_noise)
setattr(add_noise_from_nowhere, "__module__", None)  # noqa: B010


def hook_of_fsdp(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
    """As its own, which move weights."""


hook_of_fsdp.__module__ = "torch.distributed.fsdp._runtime_utils"


def add_noise_to_linear(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor | None:
    return add_noise(module, arguments, output) if type(module) is nn.Linear else None


def add_noise_before_linear(module: nn.Module, arguments: tuple) -> torch.Tensor | None:
    return add_noise(module, (), arguments[0]) if type(module) is nn.Linear else None


def noisy_attention(module, query, *args, **kwargs):
    output, weights = sdpa_attention_forward(module, query, *args, **kwargs)
    return output * torch.rand_like(output), weights


class NoisySiLU(nn.SiLU):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return add_noise(self, (), super().forward(states))


def with_lora(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs requirements-scale.txt")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def every_layer(change):
    def changed(model: nn.Module) -> nn.Module:
        for layer in model.encoder.layers:
            change(layer)
        return model

    return changed


def patch_forward(layer: nn.Module) -> None:
    forward = layer.ffn.forward
    layer.ffn.forward = lambda states: add_noise(layer.ffn, (), forward(states))


def forget_dropout_in_eval(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train = lambda mode=True, module=module: module
            module.training = False
    return model


# Configuration, change of the model, and whether random numbers are drawn then.
CASES = {
    "plain": ({}, None, False),
    "every activation of transformers": ({"hidden_act": "gelu_pytorch_tanh"}, None, False),
    "LoRA": ({}, with_lora, False),
    "LoRA, its dropout off": (
        {},
        lambda model: forget_dropout_in_eval(with_lora(model, lora_dropout=0.5)),
        False,
    ),
    "attention dropout": ({"attention_dropout": 0.5}, None, True),
    "LoRA with dropout": ({}, functools.partial(with_lora, lora_dropout=0.5), True),
    "dropout of nothing put in": ({}, every_layer(lambda layer: setattr(layer, "rms_norm2", nn.Dropout(0.0))), False),
    "dropout put in": ({}, every_layer(lambda layer: setattr(layer, "rms_norm2", nn.Dropout(0.5))), True),
    "a module of one's own": ({}, every_layer(lambda layer: setattr(layer.ffn, "act_fn", NoisySiLU())), True),
    "a module of torch that draws": ({}, every_layer(lambda layer: setattr(layer.ffn, "act_fn", nn.RReLU())), True),
    "a hook": ({}, every_layer(lambda layer: layer.ffn.register_forward_hook(add_noise)), True),
    "a hook of no module": (
        {},
        every_layer(lambda layer: layer.ffn.register_forward_hook(add_noise_from_nowhere)),
        True,
    ),
    "a hook of FSDP": ({}, every_layer(lambda layer: layer.ffn.register_forward_hook(hook_of_fsdp)), False),
    "a forward of one's own": ({}, every_layer(patch_forward), True),
    "attention of one's own": ({}, lambda model: model.set_attn_implementation("noisy") or model, True),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without_checkpointing(name, use_reentrant, states_saved, monkeypatch):
    config, change, draws = CASES[name]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "noisy", noisy_attention)
    reference = reference_model(torch.float64, num_hidden_layers=LAYERS)
    inputs = pack(random_images(ODD_GRIDS))

    def changed() -> nn.Module:
        torch.manual_seed(3)
        model = packing_model(reference, plain=True, **config)
        return change(model) if change else model

    expected = gradients(changed(), inputs)
    model = changed()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    states_saved.clear()
    ours = gradients(model, inputs)
    # Once before a layer, and where there is something to put back, once more before that.
    assert len(states_saved) == (LAYERS * 2 if draws else 0)
    assert ours.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (ours[parameter] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), parameter


def noisy(function):
    @functools.wraps(function)
    def with_noise(*args, **kwargs):
        return add_noise(None, (), function(*args, **kwargs))

    return with_noise


# The owner of a function, and its name.
REPLACED = {
    "a layer's class, patched": (hub_module("modeling").Aimv2PackingMLP, "forward"),
    "a class of torch, patched": (nn.RMSNorm, "forward"),
    "an activation's class, patched": (type(ACT2FN["silu"]), "forward"),
    "a function of torch, patched": (nn.functional, "linear"),
    "our attention, patched": (hub_module("modeling"), "segment_attention"),
}


@pytest.mark.parametrize(
    "what", ["a hook on all modules", "a hook before all modules", "the attention called sdpa", *REPLACED]
)
def test_what_draws_for_every_model_counts(what, states_saved, monkeypatch):
    if what == "the attention called sdpa":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", noisy_attention)
    if what in REPLACED:
        owner, name = REPLACED[what]
        monkeypatch.setattr(owner, name, noisy(getattr(owner, name)))
    reference, inputs = reference_model(torch.float64, num_hidden_layers=LAYERS), pack(random_images(ODD_GRIDS))
    expected, ours = {}, {}
    for found, checkpointing in ((expected, False), (ours, True)):
        model = packing_model(reference, plain=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with ExitStack() as stack:
            if what == "a hook on all modules":
                stack.callback(register_module_forward_hook(add_noise_to_linear).remove)
            if what == "a hook before all modules":
                stack.callback(register_module_forward_pre_hook(add_noise_before_linear).remove)
            found.update(gradients(model, inputs))
    assert len(states_saved) == LAYERS * 2
    for parameter, gradient in expected.items():
        assert (ours[parameter] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), parameter


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("preserve", [True, False])
def test_what_the_caller_asks_for_wins(preserve, dropout, states_saved):
    packed = packing_model(reference_model(), attention_dropout=dropout)
    packed.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": preserve})
    gradients(packed, pack(random_images(ODD_GRIDS)))
    assert bool(states_saved) is preserve


def test_a_checkpointing_function_of_ones_own_is_called_with_what_it_knows():
    packed = packing_model(reference_model()).train()
    calls = []

    def checkpoint(function, *args):
        calls.append(args)
        return function(*args)

    for layer in packed.encoder.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpoint
    packed(**pack(random_images(ODD_GRIDS)))
    assert len(calls) == len(packed.encoder.layers)


def small_models(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Of the same weights, in training, without and with checkpointing."""
    reference = reference_model(dtype, num_hidden_layers=LAYERS)
    models = packing_model(reference, plain=True).train(), packing_model(reference, plain=True).train()
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    return models


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).last_hidden_state.square().sum()


def grads_of_some(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    inputs["hidden_states"].requires_grad_()
    chosen = [inputs["hidden_states"], model.encoder.layers[0].ffn.up_proj.weight, model.rms_norm.weight]
    return list(torch.autograd.grad(loss_of(model, inputs), chosen))


def two_backward_passes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = loss_of(model, inputs)
    first = torch.autograd.grad(loss, model.encoder.layers[1].ffn.down_proj.weight, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return [*first, *(parameter.grad for parameter in model.parameters())]


def second_derivatives(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss_of(model, inputs), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters))


def frozen(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.requires_grad_(False)
    trained = [model.encoder.layers[0].attention.q_proj.weight, model.encoder.layers[1].rms_norm2.weight]
    for parameter in trained:
        parameter.requires_grad_()
    return list(torch.autograd.grad(loss_of(model, inputs), trained))


def one_layer_twice(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.encoder.layers[1] = model.encoder.layers[0]
    weights = list(model.encoder.layers[0].parameters())
    return list(torch.autograd.grad(loss_of(model, inputs), weights))


def hooks_of_weights(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad / 2)
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    loss_of(model, inputs).backward()
    assert len(seen) == len(list(model.parameters()))
    return [parameter.grad for parameter in model.parameters()]


class SavedReadTwice(torch.autograd.Function):
    """The sine, whose backward pass unpacks what was saved once more."""

    @staticmethod
    def forward(ctx, states: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states)
        return states.sin()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        return grad * (first + second).mul(0.5).cos()


def saved_tensors_read_twice(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    for layer in model.encoder.layers:
        layer.ffn.act_fn = nn.Tanh()
    with patch.object(torch, "tanh", SavedReadTwice.apply):
        return grads_of_some(model, inputs)


def in_a_larger_checkpoint(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch_checkpoint.checkpoint(loss_of, model, inputs, use_reentrant=False).backward()
    return [parameter.grad for parameter in model.parameters()]


def offloaded(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with save_on_cpu():
        loss = loss_of(model, inputs)
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def without_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad(), disable_saved_tensors_hooks("As in transforms of torch.func."):
        return [loss_of(model, inputs)]


def without_early_stop(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch_checkpoint.set_checkpoint_early_stop(False):
        return grads_of_some(model, inputs)


def in_debug_mode(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch_checkpoint.set_checkpoint_debug_enabled(True):
        return grads_of_some(model, inputs)


def layer_by_keywords(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    layer, states = model.encoder.layers[0], torch.ones(217, 64, dtype=torch.float64, requires_grad=True)
    layout = packed_layout(inputs["grid_thw"], model.config)
    return list(torch.autograd.grad(layer(hidden_states=states, layout=layout).square().sum(), states))


USES = [
    grads_of_some,
    layer_by_keywords,
    two_backward_passes,
    second_derivatives,
    frozen,
    one_layer_twice,
    hooks_of_weights,
    saved_tensors_read_twice,
]
USES += [in_a_larger_checkpoint, offloaded, without_gradients, in_debug_mode, without_early_stop]


@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_graph_gives_what_it_gives_without_checkpointing(use):
    plain, checkpointed = small_models()
    inputs = pack(random_images(ODD_GRIDS))
    expected, ours = use(plain, dict(inputs)), use(checkpointed, dict(inputs))
    assert len(ours) == len(expected) > 0
    for own, other in zip(ours, expected, strict=True):
        assert (own - other).abs().max() <= 1e-9 * other.abs().max()


@pytest.mark.parametrize("backward_inside", [True, False])
def test_the_second_forward_runs_under_the_autocast_of_the_first(backward_inside):
    inputs = pack(random_images(ODD_GRIDS))
    found = []
    for model in small_models(torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_gradients_on_the_meta_device_have_shapes():
    """Where there is no autocast to repeat."""
    _, model = small_models()
    hidden_states, grid_thw = pack(random_images(ODD_GRIDS)).values()
    model.to("meta")
    loss_of(model, {"hidden_states": hidden_states.to("meta"), "grid_thw": grid_thw}).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_what_is_saved_is_what_torch_saves():
    """Through the hooks of the caller, as seen by them."""
    inputs = pack(random_images(ODD_GRIDS))
    saved: list[list[torch.Size]] = []
    for arguments in ({}, {"preserve_rng_state": False}):
        _, model = small_models()
        model.gradient_checkpointing_enable({"use_reentrant": False, **arguments})
        shapes: list[torch.Size] = []
        with saved_tensors_hooks(lambda tensor, shapes=shapes: shapes.append(tensor.shape) or tensor, lambda it: it):
            loss_of(model, inputs)
        # Until torch 2.12 its own saves something empty besides.
        saved.append([shape for shape in shapes if shape.numel()])
    assert saved[0] == saved[1]


OF_TORCH = [
    {"preserve_rng_state": False},
    {"determinism_check": "none"},
    {"early_stop": False},
    {"use_reentrant": True},
]


@pytest.mark.parametrize(
    ("arguments", "context"),
    [
        ({}, nullcontext),
        *((arguments, nullcontext) for arguments in OF_TORCH),
        ({}, functools.partial(torch_checkpoint.set_checkpoint_early_stop, False)),
    ],
)
def test_torchs_own_runs_where_it_is_asked_for_something(arguments, context, monkeypatch):
    _, model = small_models()
    model.gradient_checkpointing_enable({"use_reentrant": False, **arguments})
    model.enable_input_require_grads()
    called, of_torch = [], torch_checkpoint._infer_device_type
    monkeypatch.setattr(torch_checkpoint, "_infer_device_type", lambda *args: called.append(1) or of_torch(*args))
    with context():
        loss_of(model, pack(random_images(ODD_GRIDS))).backward()
    assert len(called) == (LAYERS if arguments or context is not nullcontext else 0)


@pytest.mark.parametrize("backward", [None, "all", "a part"])
def test_a_graph_is_freed_without_the_garbage_collector(backward):
    _, model = small_models()
    inputs = pack(random_images(ODD_GRIDS))
    gc.collect()
    gc.disable()
    try:
        outputs = model(**inputs, output_hidden_states=True)
        state, loss = weakref.ref(outputs.hidden_states[1]), outputs.last_hidden_state.square().sum()
        del outputs
        assert state() is not None
        if backward == "all":
            loss.backward(retain_graph=True)
        elif backward == "a part":
            torch.autograd.grad(loss, model.encoder.layers[1].rms_norm1.weight, retain_graph=True)
        del loss
        assert state() is None
    finally:
        gc.enable()


def test_a_layer_that_was_changed_before_the_backward_pass_is_an_error():
    _, model = small_models()
    loss = loss_of(model, pack(random_images(ODD_GRIDS)))
    model.encoder.layers[1].ffn.gate_proj = nn.Linear(64, 32, dtype=torch.float64)
    with pytest.raises(torch_checkpoint.CheckpointError, match="was changed in between"):
        loss.backward()


@pytest.mark.parametrize("at_its_end", [False, True])
def test_a_layer_that_saves_less_in_the_backward_pass_is_an_error(at_its_end):
    _, model = small_models()
    loss = loss_of(model, pack(random_images(ODD_GRIDS)))
    if at_its_end:
        model.encoder.layers[1].ffn.forward = torch.zeros_like
    else:
        model.encoder.layers[1].ffn.act_fn = nn.Identity()
    with pytest.raises(torch_checkpoint.CheckpointError, match="was changed in between"):
        loss.backward()


def test_an_input_that_was_changed_before_the_backward_pass_is_an_error():
    _, model = small_models()
    outputs = model(**pack(random_images(ODD_GRIDS)), output_hidden_states=True)
    loss = outputs.last_hidden_state.square().sum()
    with torch.no_grad():
        outputs.hidden_states[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_layers_can_be_checkpointed():
    torch._dynamo.reset()
    reference, inputs = reference_model(torch.float64), pack(random_images([(3, 4)] * 2))
    expected = gradients(packing_model(reference), inputs)
    packed = packing_model(reference)
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in packed.encoder.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    ours = gradients(packed, inputs)
    for parameter, gradient in expected.items():
        assert (ours[parameter] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), parameter


def test_the_tower_of_a_vision_language_model_under_trainer(tmp_path, monkeypatch):
    """Trained weights are those without checkpointing; the tower recomputes, and no state of it is saved."""
    pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    example = importlib.import_module("vision_language_model")
    config_class, model_class, _ = example.composite_classes()
    text = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = config_class(
        vision_config=packing_model(reference_model()).config,
        text_config=example.Qwen2Config(**text),
        image_token_id=1,
        merge_size=1,
    )
    input_ids = torch.tensor([[1] * 12 + [5, 6, 7], [1] * 10 + [8, 9, 10, 11, 12]])
    labels = input_ids.masked_fill(input_ids == 1, -100)
    batch = {**pack(random_images([(3, 4), (5, 2)])), "input_ids": input_ids, "labels": labels}

    # Since transformers 5.23, and before.
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"

    def trained(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = model_class(config)
        calls, layer = [], model.vision.encoder.layers[0]
        layer.ffn.register_forward_pre_hook(lambda *_: calls.append(1))
        others = model.vision.encoder.layers[1:]
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            **{name: checkpointing},
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=[batch], data_collator=lambda examples: examples[0]).train()
        assert len(calls) == (4 if checkpointing else 2), "each layer runs once more in the backward pass"
        for other in others if checkpointing else ():
            assert other._gradient_checkpointing_func.keywords["preserve_rng_state"] is False
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    expected, ours = trained(False), trained(True)
    for parameter, value in expected.items():
        assert (ours[parameter] - value).abs().max() <= 1e-6 * value.abs().max(), parameter


def test_backward_passes_of_one_graph_may_run_at_once():
    packed = packing_model(reference_model(), plain=True).train()
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    features = packed(**pack(random_images(ODD_GRIDS))).last_hidden_state
    parameters = list(packed.parameters())
    losses = [features.square().mean(), features.sin().sum()]
    expected = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]

    def gradients(index: int) -> list[tuple]:
        return [torch.autograd.grad(losses[index], parameters, retain_graph=True) for _ in range(8)]

    with ThreadPoolExecutor(2) as threads:
        for own, theirs in zip(threads.map(gradients, range(2)), expected, strict=True):
            for once in own:
                torch.testing.assert_close(once, theirs)


@pytest.mark.parametrize("kind", ["a function", "a wrapper", "an object"])
def test_a_replacement_of_torchs_checkpoint_is_called(monkeypatch, kind):
    calls, original = [], torch_checkpoint.checkpoint

    def replacement(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    if kind == "a wrapper":
        functools.update_wrapper(replacement, original)
    if kind == "an object":
        replacement = Mock(side_effect=replacement)
    monkeypatch.setattr(torch_checkpoint, "checkpoint", replacement)
    packed = packing_model(reference_model(), plain=True).train()
    for layer in packed.encoder.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(replacement, use_reentrant=False)
    packed(**pack(random_images(ODD_GRIDS))).last_hidden_state.sum().backward()
    assert len(calls) == len(packed.encoder.layers)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("how", ["vmap", "jvp", "dual numbers"])
def test_transforms_go_through_a_checkpointed_forward(how):
    """As through torch's own checkpoint."""
    reference, inputs = reference_model(torch.float64), pack(random_images([(3, 4), (2, 2)]))
    patches, outputs = inputs["hidden_states"].double(), []
    for checkpointing in (False, True):
        model = packing_model(reference, attn="eager").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def encode(states, model=model):
            return model(states, inputs["grid_thw"]).last_hidden_state

        if how == "vmap":
            outputs.append(torch.func.vmap(encode)(torch.stack([patches, patches.flip(0)])))
        elif how == "jvp":
            outputs.append(torch.func.jvp(encode, (patches,), (patches.flip(0),))[1])
        else:
            with forward_ad.dual_level():
                dual = encode(forward_ad.make_dual(patches, patches.flip(0)))
                outputs.append(forward_ad.unpack_dual(dual).tangent)
    torch.testing.assert_close(outputs[1], outputs[0])
