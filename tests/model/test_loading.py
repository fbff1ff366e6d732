# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: same keys as the original, loaded by either class, and never half loaded."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from reference import REPO, TINY, Aimv2PackingModel, pack, packing_model, random_images, reference_model
from safetensors.torch import load_file, save_file
from scaling import make_model_repo
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionModel, AutoConfig, AutoModel


CONFIGS = [
    {},
    {"use_head": True},
    {"is_native": False, "use_head": True, "qkv_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dict_equals_the_original(config):
    reference = reference_model(**config)
    packed = packing_model(reference)
    ours = {name: value.shape for name, value in packed.state_dict().items()}
    assert ours == {name: value.shape for name, value in reference.state_dict().items()}
    theirs = reference.embeddings.patch_embed
    assert packed.embeddings.patch_embed.extra_repr() == theirs.extra_repr()


@pytest.mark.parametrize("config", CONFIGS)
def test_loads_a_vision_model_checkpoint_directly(tmp_path, config):
    reference = reference_model(**config)
    reference.save_pretrained(tmp_path)
    packed, info = Aimv2PackingModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in reference.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value)


def test_a_saved_repo_loads_both_ways(tmp_path):
    packed = AutoModel.from_config(
        AutoConfig.from_pretrained(REPO, trust_remote_code=True, **TINY), trust_remote_code=True
    )
    packed.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} >= {
        "configuration_aimv2_packing.py",
        "modeling_aimv2_packing.py",
    }
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    reference, info = Aimv2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = random_images([(3, 4)])
    with torch.inference_mode():
        ours = again.eval()(**pack(images)).last_hidden_state
        assert (ours - reference(images[0][None]).last_hidden_state[0]).abs().max() < 1e-5


def test_weights_that_would_stay_random_are_an_error(tmp_path):
    reference_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.1.ffn.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, 'encoder.layers.1.ffn.up_proj.weight' first.*convert"):
        Aimv2PackingModel.from_pretrained(tmp_path)


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    """`ignore_mismatched_sizes` would leave it random; by name it may be."""
    reference_model(is_native=False).save_pretrained(tmp_path)
    other = {"image_size": 112, "ignore_mismatched_sizes": True}
    name = "embeddings.position_embedding.weight"
    with pytest.raises(ValueError, match=f"lacks 1 weights, '{name}' first"):
        Aimv2PackingModel.from_pretrained(tmp_path, **other)
    packed = Aimv2PackingModel.from_pretrained(tmp_path, **other, newly_initialized=[name])
    assert packed.embeddings.position_embedding.weight.shape == (64, 64)


def test_a_new_head_is_put_on_by_name(tmp_path):
    reference = reference_model()
    reference.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 5 weights.*give `newly_initialized=\['head'\]`"):
        Aimv2PackingModel.from_pretrained(tmp_path, use_head=True)
    with pytest.raises(ValueError, match="lacks 5 weights"):
        Aimv2PackingModel.from_pretrained(tmp_path, use_head=True, newly_initialized=["hea"])
    packed, info = Aimv2PackingModel.from_pretrained(
        tmp_path, use_head=True, newly_initialized=["head"], output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"head"}
    for name, value in reference.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value)


def test_a_new_head_is_put_on_through_auto_model(tmp_path):
    repo = make_model_repo(tmp_path)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, use_head=True, newly_initialized=["head"])
    assert model.head.output_proj.weight.shape == (64, 64)


@pytest.mark.parametrize("use_head", [False, True])
def test_another_layout_is_an_error_that_names_the_converter(tmp_path, use_head):
    reference_model(use_head=use_head).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"trunk.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"convert_weights\.py"):
        Aimv2PackingModel.from_pretrained(tmp_path)


def test_the_vision_tower_of_an_image_text_checkpoint_loads_alone(tmp_path):
    vision = {**TINY, "use_head": True}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = Aimv2Model(Aimv2Config(vision_config=vision, text_config=text, projection_dim=16))
    theirs.save_pretrained(tmp_path)
    packed = Aimv2PackingModel.from_pretrained(tmp_path)
    expected = theirs.vision_model.state_dict()
    assert packed.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in packed.state_dict().items())
    packed.save_pretrained(tmp_path / "tower")
    assert load_file(tmp_path / "tower" / "model.safetensors").keys() == expected.keys()


def test_a_new_head_on_top_may_start_from_the_encoder_alone(tmp_path):
    reference = reference_model()
    reference.save_pretrained(tmp_path)

    class Classifier(Aimv2PackingModel.__mro__[1]):
        def __init__(self, config):
            super().__init__(config)
            self.vision_model = Aimv2PackingModel(config)
            self.classifier = torch.nn.Linear(config.hidden_size, 3)
            self.post_init()

    model, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    for name, value in reference.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value)


def test_fresh_weights_follow_the_original_initialisation():
    torch.manual_seed(0)
    model = Aimv2PackingModel(Aimv2PackingModel.config_class(**{**TINY, "hidden_size": 256, "use_head": True}))
    for name, value in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            assert abs(value.std().item() - 0.02) < 0.003, name
            assert abs(value.mean().item()) < 0.01, name


def test_no_buffers():
    """What `from_pretrained` would leave undefined on the meta device does not exist."""
    assert not list(packing_model(reference_model(is_native=False)).buffers())


def test_input_embeddings_are_those_of_patches_and_can_be_replaced():
    packed = packing_model(reference_model())
    original = packed.get_input_embeddings()
    assert original is packed.embeddings.patch_embed
    other = copy.deepcopy(original)
    packed.set_input_embeddings(other)
    assert packed.get_input_embeddings() is packed.embeddings.patch_embed is other


@pytest.mark.parametrize("use_head", [False, True])
def test_modules_that_must_stay_whole_are_in_the_model(use_head):
    model = packing_model(reference_model(use_head=use_head))
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert ("Aimv2PackingAttentionPoolingHead" in model._no_split_modules) is use_head


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1),
        ("rms_norm_eps", -1.0),
        ("attention_dropout", 1.5),
        ("num_attention_heads", 3),
        ("hidden_act", "snake"),
    ],
)
def test_fields_given_to_from_pretrained_are_validated(tmp_path, field, value):
    """transformers sets them on a configuration that is made already."""
    packing_model(reference_model()).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=field):
        Aimv2PackingModel.from_pretrained(tmp_path, **{field: value})
