"""On a CPU in inference the model runs in blocks and by fused kernels: the same numbers, and nothing is bypassed."""

import sys

import pytest
import torch
import torch.nn.functional as F
from reference import ODD_GRIDS, apple_forward, pack, packing_model, random_images, reference_model
from torch.utils._python_dispatch import TorchDispatchMode


# More than one block, in order and ordered by length, and a segment larger than a block.
MIXES = {
    "in_order": [(30, 40), (20, 30), (30, 40), (1, 1)],
    "by_length": [(16, 16), (3, 5), (20, 20), (3, 5)] * 5,
    "one_block": ODD_GRIDS,
    "longer_than_a_block": [(3, 3), (46, 46), (2, 5)],
}


class Operators(TorchDispatchMode):
    """Counts the fused linear layers that ran, and keeps the size of the largest tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.fused, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.fused += func._schema.name == "mkldnn::_linear_pointwise"
        self.largest = max(self.largest, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused_layers(packed) -> int:
    """How many fused linear layers one forward runs."""
    inputs = pack(random_images([(3, 4), (2, 2)]))
    with torch.inference_mode(), Operators() as operators:
        packed(**inputs)
    return operators.fused


@pytest.mark.parametrize("mix", MIXES)
def test_blocks_change_nothing(mix):
    packed = packing_model(reference_model(qkv_bias=True, mlp_bias=True))
    inputs = pack(random_images(MIXES[mix]))
    layout = packed.prepare_layout(inputs["grid_thw"])
    with torch.inference_mode():
        ours = packed(inputs["hidden_states"], layout=layout).last_hidden_state
        whole = packed(inputs["hidden_states"], layout=layout._replace(blocks=())).last_hidden_state
    with_gradients = packed(inputs["hidden_states"], layout=layout).last_hidden_state
    assert (ours - whole).abs().max() < 1e-5
    assert (ours - with_gradients).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mix", MIXES)
def test_patches_of_any_floating_point_dtype_go_through_blocks(mix, dtype):
    packed = packing_model(reference_model(num_hidden_layers=1))
    inputs = pack(random_images(MIXES[mix]))
    patches = inputs["hidden_states"].abs().to(dtype)
    with torch.inference_mode():
        ours = packed(patches, inputs["grid_thw"]).last_hidden_state
        expected = packed(patches.float(), inputs["grid_thw"]).last_hidden_state
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_are_as_close_to_float64_as_the_original(dtype):
    reference = reference_model(dtype, hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    images = [image.to(dtype).float() for image in random_images(MIXES["by_length"])]
    with torch.inference_mode():
        exact = torch.cat([apple_forward(reference, image) for image in images])
        ours = packing_model(reference)(**pack(images)).last_hidden_state
        theirs = torch.cat([reference(image[None].to(dtype)).last_hidden_state[0] for image in images])
    error, allowed = ((features.double() - exact).norm().item() for features in (ours, theirs))
    assert error <= 1.05 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_is_as_exact_as_one_operation_after_the_other(dtype, bias):
    packed = packing_model(reference_model())
    linear = sys.modules[sys.modules[type(packed).__module__].linear.__module__].linear
    silu = packed.encoder.layers[0].ffn.act_fn
    module = torch.nn.Linear(48, 80, bias=bias, dtype=dtype)
    inputs, factor = torch.randn(33, 48, dtype=dtype), torch.randn(33, 80, dtype=dtype)
    exact = F.linear(inputs.double(), module.weight.double(), module.bias.double() if bias else None)
    with torch.inference_mode(), Operators() as operators:
        fused = [
            linear(module, inputs),
            linear(module, inputs.T.contiguous().T, activation=silu),
            linear(module, inputs, times=factor),
        ]
    assert operators.fused == 3 * onednn_takes(dtype)
    stepwise = [module(inputs), silu(module(inputs)), module(inputs) * factor]
    for ours, theirs, expected in zip(fused, stepwise, [exact, F.silu(exact), exact * factor.double()], strict=True):
        assert ours.dtype == dtype
        assert (ours - expected).norm() <= 1.01 * (theirs - expected).norm() + 1e-6 * expected.norm()


def test_every_linear_layer_is_fused():
    reference = reference_model()
    assert fused_layers(packing_model(reference)) == 7 * reference.config.num_hidden_layers


def test_another_activation_is_the_originals():
    reference = reference_model(hidden_act="gelu")
    packed, images = packing_model(reference), random_images(ODD_GRIDS)
    with torch.inference_mode():
        ours = packed(**pack(images)).last_hidden_state
        theirs = torch.cat([reference(image[None]).last_hidden_state[0] for image in images])
    assert (ours - theirs).abs().max() < 1e-5
    assert fused_layers(packed) == 6 * reference.config.num_hidden_layers


@pytest.mark.parametrize("name", ["attention", "attention.q_proj", "ffn", "ffn.up_proj", "rms_norm2"])
def test_hooks_inside_a_layer_see_all_patches_once(name):
    assert_hooks_see_all_patches_once(f"encoder.layers.0.{name}")


@pytest.mark.parametrize("name", ["embeddings", "embeddings.patch_embed", "encoder", "encoder.layers.1", "rms_norm"])
def test_hooks_inside_the_model_see_all_patches_once(name):
    assert_hooks_see_all_patches_once(name)


def assert_hooks_see_all_patches_once(name: str) -> None:
    packed = packing_model(reference_model())
    inputs = pack(random_images(MIXES["by_length"]))
    with torch.inference_mode():
        expected = packed(**inputs).last_hidden_state
        seen = []
        packed.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        ours = packed(**inputs).last_hidden_state
    assert seen == [len(inputs["hidden_states"])]
    assert (ours - expected).abs().max() < 1e-5


def test_a_compiled_layer_compiles_for_whole_batches():
    """Not for each block anew."""
    packed = packing_model(reference_model(num_hidden_layers=1))
    inputs = pack(random_images(MIXES["by_length"]))
    with torch.inference_mode():
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


def test_hidden_states_come_in_the_order_of_the_batch():
    packed = packing_model(reference_model())
    inputs = pack(random_images(MIXES["by_length"]))
    with torch.inference_mode():
        without = packed(**inputs).last_hidden_state
        outputs = packed(**inputs, output_hidden_states=True)
    expected = packed(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert (outputs.last_hidden_state - without).abs().max() < 1e-5


def test_a_replaced_forward_is_called():
    """As accelerate replaces it to fetch offloaded weights."""
    packed = packing_model(reference_model(num_hidden_layers=1))
    projection = packed.encoder.layers[0].ffn.down_proj
    projection.forward = lambda hidden_states: torch.zeros(len(hidden_states), 64)
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        ours = packed(**inputs, output_hidden_states=True).hidden_states[1]
    expected = packed(**inputs, output_hidden_states=True).hidden_states[1]
    assert (ours - expected).abs().max() < 1e-5


def test_adapters_are_applied():
    peft = pytest.importorskip("peft", reason="needs requirements-scale.txt")
    packed = packing_model(reference_model())
    inputs = pack(random_images(ODD_GRIDS))
    with torch.inference_mode():
        without = packed(**inputs).last_hidden_state
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj"]
    adapted = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    with torch.inference_mode():
        ours = adapted(**inputs).last_hidden_state
    assert (ours - adapted(**inputs).last_hidden_state).abs().max() < 1e-5
    assert (ours - without).abs().max() > 0.1


def test_dropout_is_applied_without_gradients_too():
    packed = packing_model(reference_model(attention_dropout=0.5)).train()
    inputs = pack(random_images(ODD_GRIDS))
    with torch.no_grad():
        assert not torch.equal(packed(**inputs).last_hidden_state, packed(**inputs).last_hidden_state)


def test_what_switches_fusion_off():
    packed = packing_model(reference_model())
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_layers(packed) == 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert fused_layers(packed) == 0
    assert fused_layers(packing_model(reference_model(torch.float64))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_do_not_grow_with_the_batch(dtype):
    """The output of a long batch is the largest tensor of its forward."""
    packed = packing_model(reference_model(dtype, num_hidden_layers=1))
    inputs = pack(random_images([(16, 16)] * 160))
    with torch.inference_mode(), Operators() as operators:
        output = packed(**inputs).last_hidden_state
    assert operators.largest == output.numel()
