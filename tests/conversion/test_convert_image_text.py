# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""An image-text checkpoint ("LiT") of either format becomes one repo with both encoders and the tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from image_text_checkpoints import TEXTS, clip_tokenizer, reference_image_text_model
from PIL import Image
from reference import REPO, pack, random_images
from safetensors.torch import load_file
from transformers import Aimv2Model, Aimv2VisionModel, AutoModel, AutoProcessor

# transformers 5.15 without torchvision exports only a placeholder under the top-level name.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from conversion import features
from convert_weights import main, parse_arguments, run


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(features, "RANDOM_SIZES", 2)


def save_apple(folder: Path, model: Aimv2Model, shards: int = 1) -> Path:
    tensors, config = checkpoints.apple_image_text(model), checkpoints.apple_image_text_config(model)
    return checkpoints.save(folder, tensors, config, shards)


def save_transformers(folder: Path, model: Aimv2Model) -> Path:
    model.save_pretrained(folder)
    return folder


FORMATS: dict[str, Callable[[Path, Aimv2Model], Path]] = {"apple": save_apple, "transformers": save_transformers}


def convert(source: Path, output: Path, *arguments: str) -> Path:
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


def assert_loads(folder: Path, model: Aimv2Model) -> None:
    """In transformers and packed, with `model`'s weights bit for bit, and with the same features and logits."""
    plain, info = Aimv2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    packed = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(packed).__name__ == "Aimv2PackingAcceleratedImageTextModel"
    for loaded in (plain, packed):
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    images = random_images([(4, 4), (4, 4)])
    texts = clip_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=torch.stack(images), **texts)
        outputs = packed(**pack(images), **texts)
        image_features = model.get_image_features(torch.stack(images)).pooler_output
        text_features = model.get_text_features(**texts).pooler_output
        packed_images = packed.get_image_features(**pack(images)).pooler_output
        packed_texts = packed.get_text_features(**texts).pooler_output
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_images, image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_texts, text_features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoint_format", sorted(FORMATS))
@pytest.mark.parametrize("fields", [{}, {"text_config": {"rms_norm_eps": 1e-3}}], ids=["released", "eps"])
def test_whole_model(tmp_path, checkpoint_format, fields):
    model = reference_image_text_model()
    for name, value in fields.get("text_config", {}).items():
        setattr(model.config.text_config, name, value)
        model = Aimv2Model.from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()
    assert_loads(convert(FORMATS[checkpoint_format](tmp_path / "in", model), tmp_path / "out"), model)


def test_shards_and_dtype(tmp_path):
    model = reference_image_text_model()
    source = save_apple(tmp_path / "in", model, shards=3)
    assert_loads(convert(source, tmp_path / "out", "--max-shard-size", "100KB"), model)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    stored = load_file(convert(source, tmp_path / "half", "--dtype", "bfloat16") / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor.bfloat16()), name


def test_inside_a_larger_checkpoint_and_as_older_checkpoints_are_stored(tmp_path, capsys):
    model = reference_image_text_model()
    tensors = checkpoints.apple_image_text(model, "tower.")
    # Positions with a first dimension, the scale as a vector, and tensors that belong to another model.
    tensors["tower.text_encoder.preprocessor.positional_embedding"].unsqueeze_(0)
    tensors["tower.log_logit_scale"] = tensors["tower.log_logit_scale"].reshape(1)
    tensors |= {
        "lm.layers.0.weight": torch.ones(2),
        "lm.layers.1.weight": torch.ones(2),
        "lm_head.weight": torch.ones(1),
    }
    config = {"model_type": "other", "tower_config": checkpoints.apple_image_text_config(model)}
    assert_loads(convert(checkpoints.save(tmp_path / "in", tensors, config), tmp_path / "out"), model)
    assert "Left out of the source: lm.layers (2 tensors), lm_head." in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| left out of the source | lm.layers (2 tensors), lm_head |" in card


@pytest.mark.parametrize("checkpoint_format", sorted(FORMATS))
def test_vision_only(tmp_path, checkpoint_format, capsys):
    model = reference_image_text_model()
    output = convert(FORMATS[checkpoint_format](tmp_path / "in", model), tmp_path / "out", "--vision-only", "--verify")
    printed = capsys.readouterr().out
    assert "Verdict: passed." in printed and "Left out of the source: " in printed
    for part in {"apple": ["text_encoder", "text_projector", "image_projector", "log_logit_scale"]}.get(
        checkpoint_format, ["text_model", "text_projection", "visual_projection", "logit_scale"]
    ):
        assert part in printed.split("Left out of the source: ")[1]
    plain, info = Aimv2VisionModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.vision_model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    assert type(AutoModel.from_pretrained(output, trust_remote_code=True)).__name__ == "Aimv2PackingAcceleratedModel"
    assert not list(output.glob("*token*")) and not (output / "processor_config.json").exists()


def test_converts_again(tmp_path):
    first = convert(save_apple(tmp_path / "in", reference_image_text_model()), tmp_path / "first")
    second = convert(first, tmp_path / "second")
    for name in ("model.safetensors", "config.json", "processor_config.json", "sentence_bert_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    vision = convert(first, tmp_path / "vision", "--vision-only")
    assert json.loads((vision / "config.json").read_text())["model_type"] == "aimv2_packing"


def test_output_is_a_complete_model_repo_with_its_tokenizer(tmp_path, capsys, monkeypatch):
    source = save_apple(tmp_path / "in", reference_image_text_model())
    clip_tokenizer().save_pretrained(source)
    fields = json.loads((source / "tokenizer_config.json").read_text())
    fields["auto_map"] = {"AutoTokenizer": ["trap.Tokenizer", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    (source / "trap.py").write_text("raise SystemExit('the code of the source was run')")
    output = convert(source, tmp_path / "my-model", "--verify")
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert "Code: equal to this tree's" in printed.out
    tokenizer_files = {path.name for path in source.iterdir()} - {"trap.py", "model.safetensors", "config.json"}
    assert tokenizer_files
    assert {path.name for path in output.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "LICENSE",
        "README.md",
        *tokenizer_files,
        *(path.name for path in REPO.glob("*_aimv2_packing.py")),
    }
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    inputs = processor(images=[Image.new("RGB", (80, 60))], text=TEXTS, padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == clip_tokenizer()(TEXTS, padding=True)["input_ids"]
    assert inputs["grid_thw"].tolist() == [[1, 4, 4]]
    card = (output / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card and "{{" not in card and "None" not in card
    assert "| dimension of the joint space | 40 |" in card and "| left out of the source | nothing |" in card
    assert "| logits |" in card
    examples = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for example in examples:
        exec(example, namespace)
    assert namespace["probabilities"].shape == (2, 2)
    assert namespace["vectors"].shape == (2, 40)


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [
        ([], "tokenizer_config.json and tokenizer.json, or vocab.json and merges.txt"),
        (["tokenizer_config.json", "vocab.json"], "it lacks tokenizer.json, or vocab.json and merges.txt"),
        (["tokenizer.json"], "it lacks tokenizer_config.json"),
    ],
)
def test_source_without_a_whole_tokenizer(tmp_path, kept, lacking, capsys):
    source = save_apple(tmp_path / "in", reference_image_text_model())
    for name in kept:
        (source / name).write_text("{}")
    output = convert(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert "warning: in has no complete tokenizer" in error and lacking in error
    assert AutoImageProcessor.from_pretrained(output, trust_remote_code=True).image_size == 56


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_tokenizer_files_that_are_none_are_refused(tmp_path, content):
    source = save_apple(tmp_path / "in", reference_image_text_model())
    if content is None:
        (tmp_path / "secret").write_text("{}")
        (source / "vocab.json").symlink_to(tmp_path / "secret")
    else:
        (source / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocab\.json"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_projector.weight": None}, "missing: text_projector.weight"),
        ({"image_projector.weight": None}, "missing: image_projector.weight"),
        ({"log_logit_scale": None}, "missing: log_logit_scale"),
        ({"log_logit_scale": torch.ones(2)}, r"log_logit_scale is F32 \(2,\), expected floating-point \(\)"),
        ({"image_projector.weight": torch.ones(40, 65)}, r"image_projector.weight is F32 \(40, 65\), expected"),
        ({"text_projector.weight": torch.ones(41, 48)}, r"text_projector.weight is F32 \(41, 48\), expected"),
        ({"text_encoder.preprocessor.text_embedding.weight": None}, "text_embedding.weight is missing"),
        ({"text_encoder.preprocessor.positional_embedding": None}, "positional_embedding is missing"),
        ({"text_encoder.trunk.blocks.1.mlp.fc2.weight": None}, "missing: text_encoder.trunk.blocks.1.mlp.fc2.weight"),
        ({"text_encoder.trunk.extra": torch.ones(1)}, "left over: text_encoder.trunk.extra"),
        ({"text_encoder.trunk.blocks.0.norm_1.weight": torch.ones(9)}, r"norm_1.weight is \(9,\), expected \(48,\)"),
    ],
)
def test_model_that_is_not_complete(tmp_path, changes, message):
    model = reference_image_text_model()
    tensors = checkpoints.apple_image_text(model) | changes
    source = checkpoints.save(
        tmp_path / "in", {k: v for k, v in tensors.items() if v is not None}, checkpoints.apple_image_text_config(model)
    )
    with pytest.raises(ValueError, match=f"(?s)image-text model that is not complete.*--vision-only.*{message}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", "--vision-only")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "config.json says hidden_size 64, the tensors say 48"),
        ({"vocab_size": 9}, "config.json says vocab_size 9, the tensors say 517"),
        ({"hidden_act": "swish!"}, "hidden_act 'swish!' of the text encoder is no activation"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 of the text encoder do not divide 48"),
        ({"num_attention_heads": None}, "config.json says no num_attention_heads of the text encoder"),
        ({"eos_token_id": 517}, "eos_token_id 517 of the text encoder is none of its 517 tokens"),
        ({"eos_token_id": None}, "eos_token_id 49407 of the text encoder is none of its 517 tokens"),
        ({"hidden_act": "no such"}, "no such"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
)
def test_config_that_contradicts(tmp_path, changes, message):
    model = reference_image_text_model()
    config = checkpoints.apple_image_text_config(model)
    config["text_config"] = {k: v for k, v in (config["text_config"] | changes).items() if v is not None}
    source = checkpoints.save(tmp_path / "in", checkpoints.apple_image_text(model), config)
    with pytest.raises(ValueError, match=f"(?s)not complete.*{message}"):
        convert(source, tmp_path / "out")


def verify(source: Path, *arguments: str) -> dict:
    report = source.parent / "report.json"
    try:
        run(parse_arguments([str(source), *arguments, "--verify", "--report", str(report)]))
    except ValueError as error:
        assert "differs from" in str(error)
    return json.loads(report.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verification_compares_the_joint_space(tmp_path, dtype, capsys):
    source = save_apple(tmp_path / "in", reference_image_text_model())
    report = verify(source, str(tmp_path / "out"), "--dtype", dtype)
    assert report["passed"] and report["identical_weights"]
    assert [row["features"] for row in report["joint"]] == ["images", "texts", "logits"]
    bound = {"float32": 1e-4, "bfloat16": 0.5}[dtype]
    assert all(0 <= row["max_diff"] < bound and row["passed"] for row in report["joint"])
    assert "| texts |" in capsys.readouterr().out
    again = verify(tmp_path / "out")
    assert again["passed"] and len(again["joint"]) == 3


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda model: model.visual_projection.weight.data.mul_(1.01), {"images"}),
        (lambda model: model.text_model.encoder.layers[1].ffn.up_proj.weight.data.mul_(1.5), {"texts", "logits"}),
        (lambda model: model.logit_scale.data.add_(0.1), {"logits"}),
        (lambda model: model.text_projection.weight.data[0].fill_(float("nan")), {"texts", "logits"}),
    ],
    ids=["projection", "text encoder", "scale", "NaN"],
)
def test_another_reference_fails(tmp_path, change, differing):
    model = reference_image_text_model()
    convert(save_apple(tmp_path / "in", model), tmp_path / "out")
    change(model)
    report = verify(tmp_path / "out", "--reference", str(save_transformers(tmp_path / "other", model)))
    assert not report["passed"] and not report["identical_weights"]
    assert {row["features"] for row in report["joint"] if not row["passed"]} == differing
    assert all(image["passed"] for image in report["images"])


def test_reference_of_another_kind_or_geometry(tmp_path, monkeypatch, capsys):
    model = reference_image_text_model()
    source = save_apple(tmp_path / "in", model)
    convert(source, tmp_path / "out")
    vision = convert(source, tmp_path / "vision", "--vision-only")
    other = reference_image_text_model(projection_dim=24)
    save_apple(tmp_path / "other", other)
    capsys.readouterr()
    for reference, message in (
        (vision, "out is an image-text model and vision is a vision encoder: nothing to compare."),
        (tmp_path / "other", "models of different geometry (projection_dim 40 and 24): nothing to compare."),
    ):
        monkeypatch.setattr(
            "sys.argv", ["convert_weights.py", str(tmp_path / "out"), "--verify", "--reference", str(reference)]
        )
        assert main() == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert verify(vision, "--reference", str(source))["passed"]


def test_a_projection_dim_that_contradicts_the_tensors(tmp_path):
    model = reference_image_text_model()
    config = checkpoints.apple_image_text_config(model) | {"projection_dim": 7}
    source = checkpoints.save(tmp_path / "in", checkpoints.apple_image_text(model), config)
    with pytest.raises(ValueError, match="says projection_dim 7, the tensors say 40"):
        run(parse_arguments([str(source), str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
