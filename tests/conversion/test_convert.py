# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint format becomes the same model repo."""

import hashlib
import json
from pathlib import Path

import checkpoints
import pytest
import torch
from reference import REPO, pack, random_images, reference_model
from safetensors.torch import load_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModel,
    AutoProcessor,
)

from convert_weights import main, parse_arguments, run


LEARNED = {"is_native": False}
LIT = {"is_native": False, "use_head": True}
TEXT_ENCODER = {"text_encoder.trunk.post_trunk_norm.weight": torch.ones(8), "log_logit_scale": torch.ones(())}
VLM_CONFIG = {"model_type": "llava_qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
LANGUAGE_MODEL = {
    "model.embed_tokens.weight": torch.ones(8, 4, dtype=torch.float8_e4m3fn),
    "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
    "model.norm.weight": torch.ones(4),
}


def convert(source: Path, output: Path, *arguments: str) -> Path:
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


def assert_loads(folder: Path, model: Aimv2VisionModel) -> None:
    """Plain and packed, with `model`'s weights bit for bit, and with the same features."""
    plain, info = Aimv2VisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    packed = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(packed).__name__ == "Aimv2PackingAcceleratedModel"
    for loaded in (plain, packed):
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    for name in ("rms_norm_eps", "num_attention_heads", "image_size", "qkv_bias", "mlp_bias", "use_head", "is_native"):
        if name != "image_size" or not model.config.is_native:
            assert getattr(packed.config, name) == getattr(model.config, name), name
    images = random_images([(4, 4), (4, 4)])
    with torch.no_grad():
        expected = model(torch.stack(images))
        output = packed(**pack(images))
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state.flatten(0, 1), rtol=0, atol=1e-4)
    if model.config.use_head:
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [{}, LEARNED, {"qkv_bias": True, "mlp_bias": True}, {"rms_norm_eps": 1e-3}],
    ids=["native", "learned", "biases", "eps"],
)
def test_apple_vision(tmp_path, fields, shards):
    model = reference_model(**fields)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model), shards)
    assert_loads(convert(source, tmp_path / "out"), model)


@pytest.mark.parametrize("fields", [{}, LEARNED, LIT], ids=["native", "learned", "head"])
def test_transformers_vision(tmp_path, fields):
    model = reference_model(**fields)
    model.save_pretrained(tmp_path / "in")
    assert_loads(convert(tmp_path / "in", tmp_path / "out"), model)


def test_apple_lit(tmp_path):
    model = reference_model(**LIT)
    tensors = checkpoints.apple(model, "image_encoder.") | {"image_projector.weight": torch.ones(4, 64)} | TEXT_ENCODER
    config = {"model_type": "aimv2", "projection_dim": 4, "text_config": {"hidden_size": 8, "num_attention_heads": 1}}
    config["vision_config"] = checkpoints.apple_config(model)
    source = checkpoints.save(tmp_path / "in", tensors, config)
    assert_loads(convert(source, tmp_path / "out", "--vision-only"), model)


@pytest.mark.parametrize("defaults_stated", [True, False], ids=["stated", "left out"])
def test_transformers_lit_whose_text_encoder_has_the_same_sizes(tmp_path, defaults_stated):
    model = reference_model(**LIT, num_attention_heads=8)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = Aimv2TextConfig(**sizes, num_attention_heads=2, vocab_size=99, eos_token_id=98)
    whole = Aimv2Model(Aimv2Config(vision_config=model.config.to_dict(), text_config=text.to_dict()))
    whole.vision_model.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "in")
    if not defaults_stated:
        # As older versions of transformers save a nested configuration.
        config = json.loads((tmp_path / "in" / "config.json").read_text())
        default = Aimv2VisionConfig().to_dict()
        stated = {k: v for k, v in config["vision_config"].items() if k == "model_type" or v != default.get(k)}
        assert "num_attention_heads" not in stated
        (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"vision_config": stated}))
    assert_loads(convert(tmp_path / "in", tmp_path / "out", "--vision-only"), model)


@pytest.mark.parametrize("config", [None, {"architecture": "aimv2_large_patch14_224", "num_classes": 0}])
@pytest.mark.parametrize("fields", [{}, LEARNED], ids=["native", "learned"])
def test_timm(tmp_path, fields, config):
    model = reference_model(**fields, hidden_size=128, num_attention_heads=1)
    source = checkpoints.save(tmp_path / "in", checkpoints.timm(model), config)
    assert_loads(convert(source, tmp_path / "out"), model)


def test_timm_classifier_is_left_out(tmp_path, capsys):
    model = reference_model(hidden_size=128, num_attention_heads=1)
    tensors = checkpoints.timm(model) | {"head.weight": torch.ones(10, 128), "head.bias": torch.ones(10)}
    assert_loads(convert(checkpoints.save(tmp_path / "in", tensors), tmp_path / "out"), model)
    assert "Left out of the source: head (2 tensors)." in capsys.readouterr().out


@pytest.mark.parametrize(
    "checkpoint_format", [checkpoints.apple, checkpoints.timm, checkpoints.transformers, checkpoints.ovis2]
)
@pytest.mark.parametrize("prefix", ["model.vision_tower.vision_tower.", "visual_tokenizer.backbone.", "module."])
@pytest.mark.parametrize("configured", [True, False])
def test_inside_a_larger_checkpoint(tmp_path, checkpoint_format, prefix, configured):
    model = reference_model(**LEARNED, hidden_size=128, num_attention_heads=2 if configured else 1)
    config = VLM_CONFIG | (
        {"visual_tokenizer_config": {"backbone_config": checkpoints.apple_config(model)}} if configured else {}
    )
    tensors = checkpoint_format(model, prefix) | LANGUAGE_MODEL
    source = checkpoints.save(tmp_path / "in", tensors, config, shards=2)
    assert_loads(convert(source, tmp_path / "out"), model)


def test_two_encoders_need_a_prefix(tmp_path):
    first, second = reference_model(), reference_model(**LEARNED, num_hidden_layers=1)
    tensors = checkpoints.apple(first, "first.tower.") | checkpoints.transformers(second, "second.")
    config = {"a": checkpoints.apple_config(first), "b": checkpoints.apple_config(second)}
    source = checkpoints.save(tmp_path / "in", tensors, config)
    with pytest.raises(ValueError, match=r"2 AIMv2 encoders.*--prefix: '(first.tower|second)\.', '"):
        convert(source, tmp_path / "out")
    assert_loads(convert(source, tmp_path / "first", "--prefix", "first.tower"), first)
    assert_loads(convert(source, tmp_path / "second", "--prefix", "second."), second)
    with pytest.raises(ValueError, match="under the prefix 'third'"):
        convert(source, tmp_path / "out", "--prefix", "third")
    assert not (tmp_path / "out").exists()


def test_single_file_and_index_as_source(tmp_path):
    model = reference_model()
    single = checkpoints.save(tmp_path / "single", checkpoints.apple(model), checkpoints.apple_config(model))
    sharded = checkpoints.save(tmp_path / "sharded", checkpoints.apple(model), checkpoints.apple_config(model), 2)
    (single / "mlx_model.safetensors").write_bytes(b"another format")
    assert_loads(convert(single, tmp_path / "a"), model)
    assert_loads(convert(single / "model.safetensors", tmp_path / "b"), model)
    assert_loads(convert(sharded / "model.safetensors.index.json", tmp_path / "c"), model)


def test_released_model_needs_no_config(tmp_path):
    model = reference_model(hidden_size=256, num_attention_heads=2)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model))
    assert_loads(convert(source, tmp_path / "out"), model)


GEOMETRIES = {"large": (1024, 2816, 8), "huge": (1536, 4096, 12), "1B": (2048, 5632, 16), "3B": (3072, 8192, 24)}
RELEASED = [(size, grid, False) for size in GEOMETRIES for grid in (224, 336, 448)] + [
    ("large", None, False),
    ("large", 224, True),
    # The two distilled models have the geometry of large at 224 and 336.
]


@pytest.mark.parametrize(("size", "grid", "lit"), RELEASED)
def test_released_geometries(tmp_path, size, grid, lit):
    hidden_size, intermediate_size, heads = GEOMETRIES[size]
    fields = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_attention_heads": heads}
    with torch.device("meta"):
        model = reference_model(
            torch.bfloat16, num_hidden_layers=1, image_size=grid or 224, is_native=grid is None, use_head=lit, **fields
        )
    model.to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        # Values that tell the tensors, and places inside them, apart.
        parameter.data.view(torch.int16).flatten().copy_(torch.arange(parameter.numel()) % 16001 + index)
    config = checkpoints.apple_config(model)
    prefix = "image_encoder." if lit else ""
    source = checkpoints.save(
        tmp_path / "in", checkpoints.apple(model, prefix), {"vision_config": config} if lit else config
    )
    output = convert(source, tmp_path / "out")
    stored = load_file(output / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].view(torch.int16), tensor.view(torch.int16)), name
    plain, info = Aimv2VisionModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name in (*fields, "is_native", "use_head", "patch_size", "rms_norm_eps"):
        assert getattr(plain.config, name) == getattr(model.config, name)
    processor = json.loads((output / "preprocessor_config.json").read_text())
    assert processor["image_size"] == grid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    output = convert(source, tmp_path / "out", "--dtype", dtype)
    stored = load_file(output / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor.to(getattr(torch, dtype))), name
    assert AutoModel.from_pretrained(output, trust_remote_code=True).dtype == getattr(torch, dtype)


def test_shards_hold_the_same_and_bytes_repeat(tmp_path):
    model = reference_model(**LIT)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    outputs = [convert(source, tmp_path / name, "--max-shard-size", "200KB") for name in ("a", "b")]
    weights = sorted(path.name for path in outputs[0].glob("model*"))
    assert len(weights) > 2
    for name in weights:
        digests = {hashlib.sha256((output / name).read_bytes()).digest() for output in outputs}
        assert len(digests) == 1, name
    assert all(path.stat().st_size <= 200_000 + 4096 for path in outputs[0].glob("*.safetensors"))
    assert_loads(outputs[0], model)


def test_output_is_a_complete_model_repo(tmp_path):
    model = reference_model(**LEARNED)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    (source / "README.md").write_text("---\nlicense: apple-amlr\nlicense_name: apple-ascl\n---\n# A model\n")
    (source / "LICENSE").write_text("the weights' licence")
    (source / "modeling_aimv2.py").write_text("raise SystemExit('the code of the source was run')")
    output = convert(source, tmp_path / "my-model", "--verify")
    assert {path.name for path in output.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        *(path.name for path in REPO.glob("*_aimv2_packing.py")),
        "LICENSE",
        "WEIGHTS_LICENSE",
        "README.md",
    }
    assert (output / "WEIGHTS_LICENSE").read_text() == "the weights' licence"
    card = (output / "README.md").read_text()
    assert "license: apple-amlr" in card and "license_name: apple-ascl" in card
    assert "| astronaut.jpg | 56 x 56 |" in card
    assert "{{" not in card and "None" not in card
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert processor.image_size == 56


def test_usage_example_of_the_card_runs(tmp_path, monkeypatch):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    convert(source, tmp_path / "my-model")
    example = (tmp_path / "my-model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(example, namespace)
    assert [len(features) for features in namespace["per_image"]] == [34 * 46, 36 * 21]


def test_converted_repo_converts_again(tmp_path):
    model = reference_model(**LIT)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    first = convert(source, tmp_path / "first")
    second = convert(first, tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


def test_fields_of_a_converted_repo_are_kept(tmp_path):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))
    first = convert(source, tmp_path / "first")
    fields = json.loads((first / "config.json").read_text()) | {"patch_layout": "channels_last", "merge_temporal": True}
    (first / "config.json").write_text(json.dumps(fields))
    second = convert(first, tmp_path / "second")
    assert json.loads((second / "config.json").read_text()) == fields
    assert json.loads((second / "preprocessor_config.json").read_text())["patch_layout"] == "channels_last"


def test_main_prints_the_error_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(tmp_path / "nothing here"), str(tmp_path / "out")])
    assert main() == 1
    assert "nothing here does not exist" in capsys.readouterr().err
