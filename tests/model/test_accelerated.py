# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""An engine runs only where nobody can tell the difference, and then it does run."""

import ast
import copy
import gc
import io
import json
import logging
import weakref
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ODD_GRIDS,
    REPO,
    Aimv2PackingAcceleratedModel,
    hub_module,
    pack,
    packing_model,
    random_images,
    reference_model,
)
from scaling import make_model_repo
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conversion.local_code import local_class


@pytest.fixture
def packed():
    return packing_model(reference_model())


@pytest.fixture
def inputs():
    return pack(random_images(ODD_GRIDS))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def outcome(packed, inputs) -> str:
    """The engine that ran, or why none did."""
    packed(**inputs)
    assert (packed.last_engine is None) != (packed.engine_refusal is None)
    return packed.last_engine or packed.engine_refusal


MODULES = [
    "embeddings",
    "embeddings.patch_embed",
    "embeddings.rms_norm",
    "encoder",
    "encoder.layers.1",
    "encoder.layers.0.attention",
    "encoder.layers.0.attention.q_proj",
    "encoder.layers.0.ffn",
    "encoder.layers.0.ffn.act_fn",
    "encoder.layers.0.ffn.up_proj",
    "encoder.layers.0.rms_norm2",
    "rms_norm",
]


@pytest.mark.parametrize("name", MODULES)
def test_a_forward_hook_sees_all_patches_once_and_takes_effect(packed, inputs, name):
    expected = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    seen = []
    hook = packed.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    ours = packed(**inputs).last_hidden_state
    assert seen == [len(inputs["hidden_states"])]
    assert packed.engine_refusal == f"a {type(packed.get_submodule(name)).__name__} has a forward hook"
    assert (ours - expected).abs().max() < 1e-5

    hook.remove()
    assert outcome(packed, inputs) == "cpu"
    if name not in ("encoder", "embeddings"):
        packed.get_submodule(name).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        assert not torch.equal(packed(**inputs).last_hidden_state, expected)


def test_a_pre_hook_takes_effect(packed, inputs):
    expected = packed(**inputs).last_hidden_state
    packed.rms_norm.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
    assert not torch.equal(packed(**inputs).last_hidden_state, expected)


def test_hooks_on_the_model_itself_fire_around_the_engine(packed, inputs):
    seen = []
    packed.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape))
    assert outcome(packed, inputs) == "cpu"
    assert seen == [(len(inputs["hidden_states"]), 64)]


def test_a_replaced_forward_is_called(packed, inputs):
    packed(**inputs)
    projection = packed.encoder.layers[0].ffn.down_proj
    projection.forward = lambda hidden_states: torch.zeros(len(hidden_states), 64)
    ours = packed(**inputs, output_hidden_states=True).hidden_states[1]
    with torch.enable_grad():
        expected = packed(**inputs, output_hidden_states=True).hidden_states[1]
    assert torch.equal(ours, expected)
    assert "the forward of a Linear has been replaced" in outcome(packed, inputs)


def test_a_patched_class_is_called(packed, inputs, monkeypatch):
    packed(**inputs)
    calls = []
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(1) or original(self, x))
    assert outcome(packed, inputs) == "the forward of Linear has been replaced"
    assert len(calls) == 7 * packed.config.num_hidden_layers
    monkeypatch.undo()
    assert outcome(packed, inputs) == "cpu"


@pytest.mark.parametrize("name", ["linear", "scaled_dot_product_attention", "rms_norm", "silu"])
def test_a_replaced_function_is_called(packed, inputs, monkeypatch, name):
    calls = []
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert outcome(packed, inputs) == "a function of torch.nn.functional has been replaced"
    assert calls


def test_replaced_attention_of_the_modeling_file_is_called(packed, inputs, monkeypatch):
    calls, modeling = [], hub_module("modeling")
    original = modeling.segment_attention
    monkeypatch.setattr(
        modeling, "segment_attention", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    assert outcome(packed, inputs) == "a function of the modeling file has been replaced"
    assert len(calls) == packed.config.num_hidden_layers


class Doubled(nn.SiLU):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_a_subclassed_module_is_called(packed, inputs):
    expected = packed(**inputs).last_hidden_state
    packed.encoder.layers[0].ffn.act_fn = Doubled()
    assert not torch.equal(packed(**inputs).last_hidden_state, expected)
    assert packed.engine_refusal == "a module is a Doubled"


def test_a_compiled_layer_compiles_for_whole_batches():
    """Not for each block anew."""
    packed = packing_model(reference_model(num_hidden_layers=1))
    inputs = pack(random_images([(16, 16), (3, 5), (20, 20), (3, 5)] * 5))
    expected = packed(**inputs).last_hidden_state
    sizes = []

    def backend(graph, example_inputs):
        sizes.extend(len(x) for x in example_inputs if isinstance(x, torch.Tensor) and x.ndim == 2)
        return graph.forward

    packed.encoder.layers[0].compile(backend=backend)
    ours = packed(**inputs).last_hidden_state
    rows_of_weights = {packed.config.hidden_size, packed.config.intermediate_size}
    assert set(sizes) - rows_of_weights == {len(inputs["hidden_states"])}
    assert (ours - expected).abs().max() < 1e-5


def test_a_flop_counter_counts_everything(packed, inputs):
    """As many as with gradients, where nothing is fused."""
    with FlopCounterMode(display=False) as ours:
        packed(**inputs)
    with torch.enable_grad(), FlopCounterMode(display=False) as expected:
        packed(**inputs)
    assert ours.get_total_flops() == expected.get_total_flops() > 0


def test_a_global_hook_sees_every_linear_layer(packed, inputs):
    packed(**inputs)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        packed(**inputs)
    finally:
        hook.remove()
    assert seen.count(nn.Linear) == 7 * packed.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_derivatives_equal_those_by_differences(inputs):
    packed = packing_model(reference_model(torch.float64))
    patches = inputs["hidden_states"].double()
    direction = torch.randn_like(patches)
    # Of torch's kernels only this one has a forward derivative.
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(patches, direction)
        output = packed(dual, inputs["grid_thw"]).last_hidden_state
        ours = torch.autograd.forward_ad.unpack_dual(output).tangent
    step = 1e-5
    ahead, behind = (
        packed(patches + sign * step * direction, inputs["grid_thw"]).last_hidden_state for sign in (1, -1)
    )
    assert (ours - (ahead - behind) / (2 * step)).norm() < 1e-5 * ours.norm()


def test_reentrant_checkpointing_with_dropout_recomputes_what_it_ran(inputs):
    """Gradients equal those without checkpointing, from the same random numbers."""

    def gradients(checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(1)
        packed = packing_model(reference_model(torch.float64, attention_dropout=0.5)).train()
        if checkpointed:
            packed.gradient_checkpointing_enable({"use_reentrant": True})
            packed.enable_input_require_grads()
        torch.manual_seed(2)
        with torch.enable_grad():
            packed(**inputs).last_hidden_state.square().sum().backward()
        return packed.encoder.layers[0].ffn.up_proj.weight.grad

    expected = gradients(checkpointed=False)
    assert (gradients(checkpointed=True) - expected).norm() < 1e-9 * expected.norm()


def test_hidden_states_are_served_and_leave_nothing_behind(packed, inputs):
    without = packed(**inputs).last_hidden_state
    outputs = packed(**inputs, output_hidden_states=True)
    assert packed.last_engine == "cpu"
    assert len(outputs.hidden_states) == packed.config.num_hidden_layers + 1
    assert torch.equal(outputs.last_hidden_state, without)
    assert not any(module._forward_hooks for module in packed.modules())
    packed.use_engines = False
    plain = packed(**inputs, output_hidden_states=True)
    for ours, expected in zip(outputs.hidden_states, plain.hidden_states, strict=True):
        assert (ours - expected).abs().max() < 1e-5


def test_gradients_take_the_plain_path_and_a_frozen_model_does_not(packed, inputs):
    packed.train()
    with torch.enable_grad():
        assert outcome(packed, inputs) == "gradients are enabled"
        packed.requires_grad_(False)
        assert outcome(packed, inputs) == "cpu"
        inputs["hidden_states"].requires_grad_()
        assert outcome(packed, inputs) == "gradients are enabled"
    assert outcome(packed, inputs) == "cpu"


def test_dropout_is_applied_without_gradients_too(inputs):
    packed = packing_model(reference_model(attention_dropout=0.5))
    assert outcome(packed, inputs) == "cpu"
    packed.train()
    assert not torch.equal(packed(**inputs).last_hidden_state, packed(**inputs).last_hidden_state)
    assert packed.engine_refusal == "dropout is active"


def test_autocast_takes_the_plain_path(packed, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        assert outcome(packed, inputs) == "autocast is on"


def test_a_default_device_does_not_matter_and_other_function_modes_do(packed, inputs):
    with torch.device("cpu"):
        assert outcome(packed, inputs) == "cpu"

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        assert outcome(packed, inputs) == "a function mode is on"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_func_take_the_plain_path(packed, inputs):
    seen = []

    def forward(patches):
        output = packed(patches, inputs["grid_thw"]).last_hidden_state
        seen.append(packed.engine_refusal)
        return output

    with sdpa_kernel(SDPBackend.MATH):
        torch.func.jvp(forward, (inputs["hidden_states"],), (torch.ones_like(inputs["hidden_states"]),))
    assert seen == ["a transform of torch.func is on"]


@pytest.mark.parametrize("attn", ["eager"])
def test_another_attention_takes_the_plain_path(inputs, attn):
    packed = packing_model(reference_model(), attn=attn)
    assert outcome(packed, inputs) == f"attn_implementation is {attn}"


def test_weights_changed_in_place_or_replaced_count_at_once(packed, inputs):
    with torch.inference_mode():
        before = packed(**inputs).last_hidden_state
    packed.encoder.layers[1].ffn.up_proj.weight.data.mul_(2)
    changed = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    assert not torch.equal(changed, before)
    packed.encoder.layers[0].attention.q_proj = nn.Linear(64, 64, bias=True)
    replaced = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    packed.use_engines = False
    assert (replaced - packed(**inputs).last_hidden_state).abs().max() < 1e-5
    packed.use_engines = True
    packed.encoder.layers[0].rms_norm1.half()
    with suppress(RuntimeError):
        packed(**inputs)
    assert packed.engine_refusal == "the weights are of several dtypes"


def test_fewer_layers_count_at_once(packed, inputs):
    packed(**inputs)
    packed.encoder.layers = packed.encoder.layers[:1]
    ours = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    packed.use_engines = False
    assert (ours - packed(**inputs).last_hidden_state).abs().max() < 1e-5


def test_a_torch_without_a_private_name_runs_the_plain_model(packed, inputs, monkeypatch):
    expected = packed(**inputs).last_hidden_state
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    ours = packed(**inputs).last_hidden_state
    assert packed.engine_refusal.startswith("this torch lacks a name (")
    assert (ours - expected).abs().max() < 1e-5


def test_adapters_are_applied_merged_and_unmerged(inputs):
    """On projections, on the patch embedding and on learned positions, with either order of a patch's values."""
    peft = pytest.importorskip("peft", reason="needs requirements-scale.txt")
    for patch_layout in ("channels_first", "channels_last"):
        reference = reference_model(is_native=False)
        packed = packing_model(reference, patch_layout=patch_layout)
        without = packed(**inputs).last_hidden_state
        targets = ["q_proj", "v_proj", "gate_proj", "patch_embed", "position_embedding"]
        adapted = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        unmerged = adapted.eval()(**inputs).last_hidden_state
        assert packed.engine_refusal.startswith("a module is a ")
        assert (unmerged - without).abs().max() > 0.1
        merged = adapted.merge_and_unload()
        again = merged(**inputs).last_hidden_state
        assert merged.last_engine == "cpu"
        assert (again - unmerged).abs().max() < 1e-4


def test_lora_equals_the_originals(inputs):
    """The same adapters on `Aimv2VisionModel`, image by image."""
    peft = pytest.importorskip("peft", reason="needs requirements-scale.txt")
    images = random_images([(4, 4)] * 3)
    reference = reference_model(is_native=False)
    packed = packing_model(reference)
    config = peft.LoraConfig(r=4, target_modules=["patch_embed", "position_embedding"], init_lora_weights=False)
    theirs, ours = peft.get_peft_model(reference, config), peft.get_peft_model(packed, config)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    expected = torch.cat([theirs.base_model(pixel_values=image[None]).last_hidden_state[0] for image in images])
    assert (ours.base_model(**pack(images)).last_hidden_state - expected).abs().max() < 1e-5


def test_alignment_hooks_that_move_nothing_do_not_matter(packed, inputs):
    accelerate = pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    accelerate.dispatch_model(packed, {"": "cpu"}, force_hooks=True)
    accelerate.hooks.attach_align_device_hook_on_blocks(
        packed.encoder, execution_device={name: "cpu" for name, _ in packed.encoder.named_modules()}
    )
    replaced = [name for name, module in packed.named_modules() if "forward" in vars(module)]
    assert len(replaced) > packed.config.num_hidden_layers
    assert outcome(packed, inputs) == "cpu"


def test_offloaded_weights_are_fetched(packed, inputs, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    expected = packed(**inputs).last_hidden_state
    accelerate.disk_offload(packed, tmp_path, execution_device="cpu")
    ours = packed(**inputs).last_hidden_state
    assert packed.last_engine is None
    assert (ours - expected).abs().max() < 1e-5


def test_which_path_ran_is_logged(packed, inputs, caplog):
    logger = logging.getLogger(hub_module("accelerated").__name__)
    with caplog.at_level(logging.DEBUG, logger=logger.name):
        logger.addHandler(caplog.handler)
        packed.use_engines = False
        packed(**inputs)
        logger.removeHandler(caplog.handler)
    assert "no engine ran: `use_engines` is false" in caplog.text


def test_arrows_between_the_files_point_down():
    """The plain model knows of no engine, and no engine knows a model."""
    allowed = {
        "configuration": set(),
        "layout": {"configuration"},
        "modeling": {"configuration", "layout"},
        "image_text": {"configuration", "layout", "modeling"},
        "cpu_engine": {"batching", "layout"},
    }
    for path in REPO.glob("*_aimv2_packing.py"):
        name = path.name.removesuffix("_aimv2_packing.py")
        tree = ast.parse(path.read_text())
        imported = {
            node.module.removesuffix("_aimv2_packing")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        }
        if "engine" in name or "kernels" in name or "graphs" in name:
            assert not imported & {"modeling", "image_text", "accelerated", "accelerated_image_text"}, name
        assert imported <= allowed.get(name, imported), name


def test_a_subclass_of_the_model_is_served(inputs):
    class Subclass(Aimv2PackingAcceleratedModel):
        pass

    packed = Subclass(packing_model(reference_model()).config).eval()
    assert outcome(packed, inputs) == "cpu"


def test_nothing_is_said_before_a_forward(packed, inputs):
    assert (packed.last_engine, packed.engine_refusal) == (None, None)
    packed(**inputs)
    assert (packed.last_engine, packed.engine_refusal) == ("cpu", None)


@pytest.mark.parametrize("kind", ["layer", "module"])
def test_a_patched_call_is_made(packed, inputs, monkeypatch, kind):
    packed(**inputs)
    owner = type(packed.encoder.layers[0]) if kind == "layer" else nn.Module
    original, calls = owner.__call__, []

    def counted(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, "__call__", counted)
    assert "has been replaced" in outcome(packed, inputs)
    assert calls.count("Aimv2PackingEncoderLayer") == packed.config.num_hidden_layers
    monkeypatch.undo()
    assert outcome(packed, inputs) == "cpu"


def test_a_tensor_in_the_place_of_a_weight_is_read_by_the_plain_model(packed, inputs):
    """As hypernetworks put it there; and the next one, too."""
    packed.requires_grad_(False)
    before = packed(**inputs).last_hidden_state
    projection = packed.encoder.layers[0].attention.q_proj
    tensor = projection.weight.data.clone()
    del projection.weight
    projection.weight = tensor
    ours = packed(**inputs).last_hidden_state
    assert packed.engine_refusal == "the weight of a Linear is no parameter of it"
    assert (ours - before).abs().max() < 1e-5
    projection.weight = 3 * tensor
    assert (packed(**inputs).last_hidden_state - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["attention.q_proj", "attention.k_proj", "ffn.up_proj"])
def test_a_bias_of_one_projection_alone_counts(packed, inputs, name):
    packed(**inputs)
    projection = packed.encoder.layers[0].get_submodule(name)
    projection.bias = nn.Parameter(torch.randn(projection.out_features))
    ours = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    packed.use_engines = False
    assert (ours - packed(**inputs).last_hidden_state).abs().max() < 1e-5


def test_fsdp_around_the_whole_model_takes_the_plain_path(packed, inputs, tmp_path):
    """Its flat parameter leaves no weight below the model a parameter."""
    expected = packed(**inputs).last_hidden_state
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(packed, device_id=torch.device("cpu"))
        ours = sharded(**inputs).last_hidden_state
        assert packed.engine_refusal.startswith("the weight of a ")
    finally:
        torch.distributed.destroy_process_group()
    assert (ours - expected).abs().max() < 1e-5


def test_the_record_keeps_no_weight_and_no_model(packed, inputs):
    packed(**inputs)
    projection = packed.encoder.layers[0].ffn.up_proj
    old = weakref.ref(projection.weight)
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    assert old() is None
    state = hub_module("accelerated").current_state(packed)
    copied = copy.deepcopy(packed)
    copied(**inputs)
    assert hub_module("accelerated").current_state(copied) is not state
    assert hub_module("accelerated").current_state(packed) is state
    theirs = weakref.ref(copied.encoder.layers[0].ffn.up_proj.weight)
    del copied
    assert theirs() is None


def test_a_model_ends_though_hooks_below_refer_to_it(packed, inputs):
    def hooked_model() -> nn.Module:
        model = copy.deepcopy(packed)
        model.encoder.layers[0].register_forward_hook(lambda *_: model.train(False) and None)
        assert "forward hook" in outcome(model, inputs)
        return model

    model = weakref.ref(hooked_model())
    gc.collect()
    assert model() is None


def test_an_engine_runs_again_once_the_weights_are_as_they_were(packed, inputs):
    expected = packed(**inputs).last_hidden_state
    tensors = {name: weight.detach().clone() for name, weight in packed.named_parameters()}
    torch.func.functional_call(packed, tensors, (), inputs)
    assert packed.engine_refusal == "a weight is a Tensor"
    assert outcome(packed, inputs) == "cpu"
    packed.encoder.layers[0].rms_norm1.double()
    assert outcome(packed, inputs) == "the weights are of several dtypes"
    packed.encoder.layers[0].rms_norm1.float()
    assert torch.equal(packed(**inputs).last_hidden_state, expected)
    assert packed.last_engine == "cpu"


def test_a_model_in_a_file_has_no_record(packed, inputs):
    expected = packed(**inputs).last_hidden_state
    saved = io.BytesIO()
    torch.save(packed, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    assert torch.equal(loaded(**inputs).last_hidden_state, expected)
    assert loaded.last_engine == "cpu"


CHANGES = {
    "a hook": lambda tower: tower.rms_norm.register_forward_hook(lambda module, args, output: None),
    "a weight of another dtype": lambda tower: tower.rms_norm.double(),
    "another module": lambda tower: setattr(tower, "rms_norm", nn.Identity()),
    "another forward": lambda tower: setattr(tower.rms_norm, "forward", lambda states: states),
    "a transposed weight": lambda tower: setattr(
        tower.encoder.layers[0].attention.q_proj.weight,
        "data",
        tower.encoder.layers[0].attention.q_proj.weight.data.t(),
    ),
    "other attention": lambda tower: tower.set_attn_implementation("eager"),
    "no engines": lambda tower: setattr(tower, "use_engines", False),
    "gradients": lambda tower: torch.set_grad_enabled(True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_began_before_the_look_is_thrown_away_where_the_model_has_changed(packed, inputs, monkeypatch, change):
    accelerated, calls = hub_module("accelerated"), []

    def replay(model, hidden_states, layout, state, depths, last):
        calls.append(state)
        return (), torch.full((len(hidden_states), model.config.hidden_size), torch.nan)

    monkeypatch.setitem(accelerated.ENGINES, "cpu", accelerated.ENGINES["cpu"]._replace(replay=replay))
    assert packed(**inputs).last_hidden_state.isfinite().all() and not calls  # nothing ran before
    assert packed(**inputs).last_hidden_state.isnan().all() and len(calls) == 1
    CHANGES[change](packed)
    changed, engine = packed(**inputs).last_hidden_state, packed.last_engine
    packed.use_engines = False
    plain = packed(**inputs).last_hidden_state
    torch.testing.assert_close(changed, plain, atol=1e-4 if engine else 0, rtol=0)


WITHOUT_WEIGHTS = {
    "a weight deleted": lambda tower: delattr(tower.encoder.layers[0].ffn.up_proj, "weight"),
    "a weight normalised": lambda tower: nn.utils.parametrizations.weight_norm(tower.encoder.layers[0].ffn.up_proj),
    "a bias taken away": lambda tower: setattr(tower.encoder.layers[0].attention.q_proj, "bias", None),
    "a norm taken away": lambda tower: setattr(tower, "rms_norm", nn.Identity()),
    "a sparse weight": lambda tower: setattr(
        tower.encoder.layers[0].ffn.up_proj,
        "weight",
        nn.Parameter(tower.encoder.layers[0].ffn.up_proj.weight.detach().to_sparse()),
    ),
}


@pytest.mark.parametrize("graphs_released", [False, True], ids=["", "graphs released"])
@pytest.mark.parametrize("change", WITHOUT_WEIGHTS)
def test_the_cuda_engine_begins_nothing_where_weights_are_gone(inputs, monkeypatch, change, graphs_released):
    """The look comes after: nothing may be asked of a model that has changed."""
    accelerated, cuda_engine = hub_module("accelerated"), hub_module("cuda_engine")
    packed = packing_model(reference_model(qkv_bias=True))
    engine = accelerated.ENGINES["cpu"]._replace(replay=accelerated.ENGINES["cuda"].replay)
    monkeypatch.setitem(accelerated.ENGINES, "cpu", engine)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    packed(**inputs)
    state = accelerated.current_state(packed)
    state.engines |= {"cuda": cuda_engine.Engine(packed, state.weights()), "cuda refusal": (False, "asked before")}
    WITHOUT_WEIGHTS[change](packed)
    if graphs_released:
        packed.release_cuda_graphs()
    outcomes: list = []
    for packed.use_engines in (True, False):
        try:
            outcomes.append(packed(**inputs).last_hidden_state)
        except (AttributeError, RuntimeError) as error:
            outcomes.append(repr(error))
    if change == "a weight deleted":
        assert outcomes == ["""AttributeError("'Linear' object has no attribute 'weight'")"""] * 2
    else:
        torch.testing.assert_close(*outcomes, atol=1e-5, rtol=0)


@torch.enable_grad()
def test_a_sparse_weight_is_trained_by_the_plain_model(packed, inputs):
    projection = packed.encoder.layers[0].ffn.up_proj
    expected = packed(**inputs).last_hidden_state
    with torch.no_grad():
        projection.weight = nn.Parameter(projection.weight.to_sparse_csr())
    ours = packed(**inputs).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert "sparse" in outcome(packed, inputs)


def test_a_replica_does_not_begin_with_the_record_of_its_original(packed, inputs, monkeypatch):
    accelerated = hub_module("accelerated")
    packed(**inputs)
    wrong = torch.full((len(inputs["hidden_states"]), packed.config.hidden_size), torch.nan)
    engine = accelerated.ENGINES["cpu"]._replace(replay=lambda *args: ((), wrong))
    monkeypatch.setitem(accelerated.ENGINES, "cpu", engine)
    replica = packed._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in packed._modules.items()}
    assert replica(**inputs).last_hidden_state.isfinite().all()
    assert packed(**inputs).last_hidden_state.isnan().all()


def test_hooks_count_in_a_table_of_hooks_that_was_replaced(packed, inputs):
    """As people do who remove all hooks."""
    packed(**inputs)
    layer, calls = packed.encoder.layers[0], []
    layer._forward_hooks, layer._forward_pre_hooks = OrderedDict(), OrderedDict()
    assert outcome(packed, inputs) == "cpu"
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert "forward hook" in outcome(packed, inputs)
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    packed(**inputs)
    assert len(calls) == 3
    hook.remove()


def test_a_forward_replaced_over_an_alignment_hook_is_called(packed, inputs):
    accelerate = pytest.importorskip("accelerate", reason="needs requirements-scale.txt")
    projection = packed.encoder.layers[0].ffn.down_proj
    accelerate.hooks.add_hook_to_module(projection, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert outcome(packed, inputs) == "cpu"
    calls = []
    aligned = projection.forward
    projection.forward = lambda hidden_states: calls.append(1) or aligned(hidden_states)
    assert outcome(packed, inputs) != "cpu"
    assert calls


@torch.enable_grad()
def test_a_bias_added_to_a_frozen_tower_is_trained(packed, inputs):
    packed.requires_grad_(False)
    assert outcome(packed, inputs) == "cpu"
    projection = packed.encoder.layers[0].ffn.down_proj
    projection.bias = nn.Parameter(torch.zeros(64))
    packed(**inputs).last_hidden_state.sum().backward()
    assert packed.engine_refusal == "gradients are enabled"
    assert projection.bias.grad is not None


def test_the_attention_function_of_transformers_can_be_replaced(packed, inputs, monkeypatch):
    calls = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    packed(**inputs)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counted)
    assert outcome(packed, inputs) == "the attention function called sdpa has been replaced"
    assert len(calls) >= packed.config.num_hidden_layers


def test_the_plain_path_applies_no_dropout_in_evaluation(inputs):
    """With hooks, so that no engine runs: features are those of a model without dropout."""
    reference = reference_model()
    without = packing_model(reference, plain=True)(**inputs).last_hidden_state
    for attn in ("sdpa", "eager"):
        packed = packing_model(reference, attn=attn, plain=True, attention_dropout=0.5)
        assert (packed(**inputs).last_hidden_state - without).abs().max() < 1e-5


def test_a_frozen_tower_runs_without_gradients_whatever_trainer_hooked(packed, inputs):
    plain = packed(**inputs).last_hidden_state
    packed.requires_grad_(False)
    packed.enable_input_require_grads()
    assert packed.get_input_embeddings()._forward_hooks
    with torch.enable_grad():
        output = packed(**inputs).last_hidden_state
    assert packed.last_engine == "cpu"
    assert not output.requires_grad
    assert torch.equal(output, plain)
    # One weight to train below, and the hook does its work.
    packed.encoder.layers[1].ffn.up_proj.weight.requires_grad_()
    with torch.enable_grad():
        packed(**inputs).last_hidden_state.sum().backward()
    assert packed.engine_refusal == "gradients are enabled"
    assert packed.encoder.layers[1].ffn.up_proj.weight.grad is not None
    packed.requires_grad_(False)
    packed.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    with torch.enable_grad():
        assert outcome(packed, inputs) == "a Aimv2PackingPatchEmbed has a forward hook"


@pytest.mark.parametrize("saved", ["Aimv2PackingModel", "Aimv2PackingAcceleratedModel"])
def test_a_saved_model_names_its_own_class_and_carries_its_files(tmp_path, inputs, saved):
    """Also a plain one that was loaded from a repo of the accelerated."""
    repo, output = make_model_repo(tmp_path / "repo"), tmp_path / saved
    model = local_class(f"{'modeling' if saved == 'Aimv2PackingModel' else 'accelerated'}_aimv2_packing.{saved}")
    model.from_pretrained(repo).save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == [saved]
    assert config["auto_map"]["AutoModel"].endswith(f".{saved}")
    files = {path.name for path in output.glob("*.py")}
    assert ("cuda_engine_aimv2_packing.py" in files) is (saved != "Aimv2PackingModel")
    # As `AutoModel` does it, but for the classes that others have registered in this process.
    loaded_class = get_class_from_dynamic_module(config["auto_map"]["AutoModel"], output)
    assert loaded_class.__name__ == saved
    loaded = loaded_class.from_pretrained(output).eval()
    expected = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()(**inputs).last_hidden_state
    assert (loaded(**inputs).last_hidden_state - expected).abs().max() < 1e-5


def test_auto_model_and_a_tower_inside_another_model_are_served(tmp_path, inputs):
    repo = make_model_repo(tmp_path / "repo")
    tower = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
    assert outcome(tower, inputs) == "cpu"

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = AutoModel.from_config(tower.config, trust_remote_code=True).eval().requires_grad_(False)
            self.classifier = nn.Linear(tower.config.hidden_size, 2)

        def forward(self, **inputs):
            return self.classifier(self.tower(**inputs).last_hidden_state)

    probe = Probe()
    with torch.enable_grad():
        probe(**inputs).sum().backward()
    assert probe.tower.last_engine == "cpu"
    assert probe.classifier.weight.grad is not None
