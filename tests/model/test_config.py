# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`Aimv2PackingConfig`: what it refuses, and that nothing is lost on the way to disk and back."""

import importlib.metadata
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from image_text_checkpoints import Aimv2PackingImageTextConfig
from reference import REPO, Aimv2PackingConfig
from transformers import Aimv2VisionConfig, AutoConfig


def test_every_field_survives_a_round_trip(tmp_path):
    config = Aimv2PackingConfig(
        hidden_size=96, num_attention_heads=3, image_size=42, patch_layout="channels_last", merge_temporal=True
    )
    config.save_pretrained(tmp_path)
    loaded = Aimv2PackingConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.patch_layout, loaded.merge_temporal) == ("channels_last", True)


def test_config_at_the_top_level_is_the_native_large_model():
    config = AutoConfig.from_pretrained(REPO, trust_remote_code=True)
    assert type(config).__name__ == "Aimv2PackingConfig"
    large = Aimv2VisionConfig(is_native=True, use_head=False).to_dict()
    for name in set(large) - {"model_type", "architectures", "_name_or_path", "transformers_version"}:
        assert getattr(config, name) == large[name], name
    fields = json.loads((REPO / "config.json").read_text())
    assert fields["auto_map"]["AutoModel"] == "accelerated_aimv2_packing.Aimv2PackingAcceleratedModel"


def test_a_vision_model_config_is_a_valid_one(tmp_path):
    Aimv2VisionConfig(hidden_size=64, num_attention_heads=2, is_native=True).save_pretrained(tmp_path)
    config = Aimv2PackingConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.is_native, config.patch_layout) == (64, True, "channels_first")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 100, "num_attention_heads": 8}, ["hidden_size", "100", "8"]),
        ({"hidden_size": 6, "num_attention_heads": 1, "is_native": True}, ["hidden_size", "6", "4"]),
        ({"image_size": 225}, ["image_size", "225", "14"]),
        ({"image_size": [224, 224]}, ["image_size", "224"]),
        ({"image_size": 0}, ["image_size", "0"]),
        ({"patch_size": [14, 14]}, ["patch_size", "14"]),
        ({"patch_size": 0}, ["patch_size", "0"]),
        ({"num_channels": -1}, ["num_channels", "-1"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
        ({"hidden_act": "snake"}, ["hidden_act", "snake"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps", "0.0"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps", "inf"]),
        ({"initializer_range": -0.02}, ["initializer_range", "-0.02"]),
        ({"intermediate_size": 1 << 62}, ["intermediate_size", str(1 << 62)]),
        ({"is_native": False, "image_size": 14 << 31}, ["positions", str(1 << 62)]),
        ({"dtype": "nn"}, ["dtype", "torch.nn"]),
        ({"torch_dtype": 3}, ["dtype", "3"]),
        ({"attn_implementation": 3}, ["attn_implementation", "3"]),
        ({"attention_dropout": 1.0}, ["attention_dropout", "1.0"]),
        ({"patch_layout": "rows_first"}, ["patch_layout", "rows_first"]),
        ({"merge_temporal": "yes"}, ["merge_temporal", "yes"]),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(fields, named):
    with pytest.raises(StrictDataclassError) as error:
        Aimv2PackingConfig(**fields)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize("fields", [{"to_dict": 1}, {"dtype": "float17"}, {"id2label": {"a": "b"}}, {"__class__": 1}])
def test_fields_that_transformers_cannot_set(fields):
    with pytest.raises(ValueError, match=r"refuses a field|is no field"):
        Aimv2PackingConfig(**fields)


@pytest.mark.parametrize("kind", [Aimv2PackingConfig, Aimv2PackingImageTextConfig])
@pytest.mark.parametrize("auto_map", [-1, "AutoModel", ["AutoModel"]])
def test_an_auto_map_that_cannot_be_saved_is_refused(kind, auto_map, tmp_path):
    with pytest.raises((ValueError, StrictDataclassError), match="`auto_map` must be a dict, got"):
        kind(auto_map=auto_map)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises((ValueError, StrictDataclassError), match="`auto_map` must be a dict, got"):
        kind.from_pretrained(tmp_path)


def test_transformers_below_the_floor_is_named(monkeypatch):
    """And not what would fail first: a decorator on a class that is no dataclass yet."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "5.3.0")
    source = (REPO / "configuration_aimv2_packing.py").read_text()
    with pytest.raises(ImportError, match=r"transformers>=5\.15 is required.*found transformers==5\.3\.0"):
        exec(compile(source, "configuration_aimv2_packing.py", "exec"), {"__name__": "below"})
