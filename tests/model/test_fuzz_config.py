# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Random JSON as a configuration: one that a model can be built from and that survives the way to disk and back, or a
clear error. `pytest --hypothesis-profile thorough --timeout 0` tries many more cases.
"""

import dataclasses
import json
import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Aimv2PackingConfig, Aimv2PackingModel
from transformers.activations import ACT2FN


FIELDS = {field.name for field in dataclasses.fields(Aimv2PackingConfig)} | {"torch_dtype", "auto_map"}
# As many layers and labels are made, whatever it costs; the others are features of transformers that AIMv2 has not.
NOT_DRAWN = {"num_hidden_layers", "num_labels", "per_layer_config", "rope_scaling", "_experts_implementation"}
names = st.sampled_from(sorted(FIELDS - NOT_DRAWN))
# Methods and properties too: a name in JSON may be any.
attributes = st.sampled_from(sorted(set(dir(Aimv2PackingConfig)) - NOT_DRAWN))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
plausible_values = (
    st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 8, 28, 64, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 10**400])
    | st.sampled_from([0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan"), True, False, [14, 14]])
    | st.sampled_from(["float16", "bfloat16", "nn", "sdpa", "channels_last", "regression", *sorted(ACT2FN)])
)
valid = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([4, 64, 96]),
        "intermediate_size": st.integers(1, 99),
        "num_hidden_layers": st.integers(0, 3),
        "num_attention_heads": st.sampled_from([1, 2, 4]),
        "image_size": st.sampled_from([56, 224]),
        "is_native": st.booleans(),
    },
    optional={
        "num_channels": st.integers(1, 5),
        "patch_size": st.sampled_from([1, 7, 8, 14, 28]),
        "hidden_act": st.sampled_from(sorted(ACT2FN)),
        "attention_dropout": st.floats(0, 1, exclude_max=True),
        "rms_norm_eps": st.floats(0, exclude_min=True, allow_infinity=False),
        "qkv_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "use_head": st.booleans(),
        "patch_layout": st.sampled_from(["channels_first", "channels_last"]),
        "merge_temporal": st.booleans(),
        "dtype": st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
        "id2label": st.dictionaries(st.integers(0, 9).map(str), st.text(max_size=3), max_size=3),
    },
)
changes = st.dictionaries(names | attributes | st.text(max_size=5), plausible_values | json_values, max_size=2)
layers = st.fixed_dictionaries(
    {},
    optional={"num_hidden_layers": st.integers(-2, 3) | json_values.filter(lambda value: not isinstance(value, int))},
)
configurations = valid | st.builds(lambda *parts: parts[0] | parts[1] | parts[2], valid, changes, layers)


def make_or_refuse(make, *arguments) -> Aimv2PackingConfig | None:
    try:
        return make(*arguments)
    except (ValueError, StrictDataclassError) as error:
        assert "`" in str(error) or "field" in str(error) or "validator" in str(error), repr(error)
        return None


def comparable(config: Aimv2PackingConfig) -> dict[str, Any]:
    """Without the name of the folder, and with a NaN that equals itself."""
    values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    return {name: "NaN" if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


@given(fields=configurations)
@settings(deadline=20_000)
def test_a_model_can_be_built_from_what_is_accepted(fields):
    config = make_or_refuse(lambda: Aimv2PackingConfig(**fields))
    if config:
        # Which kernels there are is not the configuration's business.
        config._attn_implementation = None
        with torch.device("meta"):
            model = Aimv2PackingModel(config)
        assert len(model.encoder.layers) == fields["num_hidden_layers"]
        assert comparable(Aimv2PackingConfig.from_dict(config.to_dict())) == comparable(config)


@given(fields=configurations)
@settings(deadline=20_000)
def test_what_is_accepted_survives_the_way_to_disk_and_back(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(fields))
    config = make_or_refuse(Aimv2PackingConfig.from_pretrained, folder)
    if config:
        config.save_pretrained(folder)
        assert comparable(Aimv2PackingConfig.from_pretrained(folder)) == comparable(config)
