# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`--verify` passes on equal models, fails on different ones, and says what it could not compare."""

import hashlib
import json
import subprocess
from pathlib import Path

import checkpoints
import pytest
import torch
from PIL import Image
from reference import apple_forward, random_images, reference_model

from conversion import code_files, features
from conversion.checkpoint_formats import find_encoder
from conversion.code_files import CODE_FILES, origin
from conversion.safetensors_files import read_checkpoint
from convert_weights import main, parse_arguments, run


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(features, "RANDOM_SIZES", 2)


def save(folder: Path, model: torch.nn.Module) -> Path:
    return checkpoints.save(folder, checkpoints.apple(model), checkpoints.apple_config(model))


def verify(source: Path, *arguments: str) -> dict:
    report = source.parent / "report.json"
    report.unlink(missing_ok=True)
    try:
        run(parse_arguments([str(source), *arguments, "--verify", "--report", str(report)]))
    except ValueError as error:
        assert "differs from" in str(error) or "is not this tree's" in str(error)
        assert json.loads(report.read_text())["passed"] is False
    return json.loads(report.read_text())


@pytest.mark.parametrize("fields", [{}, {"use_head": True}, {"patch_size": 8}], ids=["native", "head", "patch size"])
def test_native(tmp_path, fields, capsys):
    report = verify(save(tmp_path / "in", reference_model(**fields)), str(tmp_path / "out"))
    assert report["passed"] and report["identical_weights"] and report["notes"] == []
    assert len(report["images"]) == 6
    assert len({(image["height"], image["width"]) for image in report["images"]}) == 6
    for image in report["images"]:
        assert 0 < image["max_diff"] < 1e-4 and 0 <= image["mean_diff"] <= image["max_diff"]
        assert 0.99999 < image["min_cosine"] <= image["mean_cosine"] < 1.00001
    printed = capsys.readouterr().out
    assert "| astronaut.jpg | 448 x 448 |" in printed
    assert "Verdict: passed." in printed


def worst_of(report: dict) -> tuple[float, float, float]:
    images = report["images"]
    return (
        max(image["max_diff"] for image in images),
        max(image["mean_diff"] for image in images),
        min(image["min_cosine"] for image in images),
    )


@pytest.mark.parametrize(
    ("scale", "verdicts"), [(1, ["met", "met"]), (1.0005, ["met", "NOT met"]), (1.1, ["NOT met"] * 2)]
)
def test_both_sets_of_thresholds_are_shown(tmp_path, capsys, scale, verdicts):
    """What is usual for a port, max 0.01, mean 0.001 and cosine 0.99, and this tool's own."""
    model = reference_model()
    run(parse_arguments([str(save(tmp_path / "in", model)), str(tmp_path / "out")]))
    model.rms_norm.weight.data.mul_(scale)
    report = verify(tmp_path / "out", "--reference", str(save(tmp_path / "other", model)))
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("| measured", "| usual", "| asked"))
    ]
    largest, mean, cosine = worst_of(report)
    assert rows == [
        f"| measured, worst of all images | {largest:.1e} | {mean:.1e} | {cosine:.7f} |  |",
        f"| usual for a port | 1.0e-02 | 1.0e-03 | 0.9900000 | {verdicts[0]} |",
        f"| asked here, float32 | {report['max_diff_bound']:.1e} |  | 0.9999900 | {verdicts[1]} |",
    ]
    assert report["aligned"] == (verdicts[0] == "met") and report["passed"] == (verdicts[1] == "met")


def test_learned_positions_are_compared_at_their_size(tmp_path):
    report = verify(save(tmp_path / "in", reference_model(is_native=False)), str(tmp_path / "out"))
    assert report["passed"]
    assert {(image["height"], image["width"]) for image in report["images"]} == {(56, 56)}
    assert "learned positions for 56 x 56 pixels only" in report["notes"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path, dtype):
    report = verify(save(tmp_path / "in", reference_model()), str(tmp_path / "out"), "--dtype", dtype)
    assert report["passed"] and report["dtype"] == dtype
    in_float32 = verify(tmp_path / "out", "--dtype", "float32")
    assert in_float32["passed"] and in_float32["dtype"] == "float32"


def test_own_images(tmp_path):
    source = save(tmp_path / "in", reference_model())
    Image.effect_noise((300, 200), 50).save(tmp_path / "grey.png")
    Image.radial_gradient("L").convert("RGBA").save(tmp_path / "alpha.png")
    report = verify(source, str(tmp_path / "out"), "--images", str(tmp_path / "grey.png"), str(tmp_path / "alpha.png"))
    assert report["passed"] and [image["image"] for image in report["images"]] == ["grey.png", "alpha.png"]


def test_image_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    """EPS, whatever its name: PIL would hand it to Ghostscript."""
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    capsys.readouterr()
    arguments = [str(tmp_path / "out"), "--verify", "--images", str(tmp_path / "a.jpg")]
    monkeypatch.setattr("sys.argv", ["convert_weights.py", *arguments])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a.jpg' holds no image of the formats" in error


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.encoder.layers[1].ffn.up_proj.weight.data.mul_(1.01),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-2),
        lambda model: setattr(model.config, "num_attention_heads", 4),
        lambda model: model.head.output_proj.bias.data.add_(0.1),
        lambda model: model.rms_norm.weight.data[3].fill_(float("nan")),
    ],
    ids=["weight", "eps", "heads", "head", "NaN"],
)
def test_another_reference_fails(tmp_path, change):
    model = reference_model(use_head=True)
    run(parse_arguments([str(save(tmp_path / "in", model)), str(tmp_path / "out")]))
    assert verify(tmp_path / "out", "--reference", str(tmp_path / "in"))["passed"]
    change(model)
    report = verify(tmp_path / "out", "--reference", str(save(tmp_path / "other", model)))
    assert not report["passed"]
    assert "NaN" not in (tmp_path / "report.json").read_text(), "JSON has no NaN"


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 128},
        {"num_hidden_layers": 3},
        {"patch_size": 8},
        {"use_head": True},
        {"is_native": False},
        {"qkv_bias": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_reference_of_another_geometry(tmp_path, fields, monkeypatch, capsys):
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    other = save(tmp_path / "other", reference_model(**fields))
    arguments = [str(tmp_path / "out"), "--verify", "--reference", str(other)]
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["convert_weights.py", *arguments])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {tmp_path / 'out'} and other are models of different")
    assert next(iter(fields)) in error


def test_code_is_compared_as_plainly_as_features(tmp_path, capsys):
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    run(parse_arguments([str(tmp_path / "out"), "--verify-code"]))
    assert f"Code: equal to this tree's, file by file ({len(CODE_FILES)} files)" in capsys.readouterr().out
    code = tmp_path / "out" / "modeling_aimv2_packing.py"
    code.write_text(code.read_text() + "\n# changed\n")
    (tmp_path / "out" / "configuration_aimv2_packing.py").unlink()
    (tmp_path / "out" / "folder").mkdir()
    (tmp_path / "out" / "folder" / "more.py").write_text("")
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        fields["auto_map"]["AutoModelForCausalLM"] = f"mallory/repo--{name.split('.', maxsplit=1)[0]}.Model"
        (tmp_path / "out" / name).write_text(json.dumps(fields))
    (tmp_path / "out" / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Normalize"}, {"type": "more.Module"}])
    )
    with pytest.raises(
        ValueError, match=r"The code of .*out is not this tree's: do not trust it before you have read it"
    ):
        run(parse_arguments([str(tmp_path / "out"), "--verify-code"]))
    differences = {
        "modeling_aimv2_packing.py differs",
        "configuration_aimv2_packing.py is missing",
        "folder/more.py is not in this tree",
        "config.json names mallory/repo--config.Model, which is not in this tree",
        "preprocessor_config.json names mallory/repo--preprocessor_config.Model, which is not in this tree",
        "modules.json is not what the converter writes",
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Code: NOT this tree's") and {line.strip() for line in lines[1:]} == differences
    report = verify(tmp_path / "out", "--reference", str(tmp_path / "in"))
    assert not report["passed"] and set(report["code_differences"]) == differences
    assert report["identical_weights"] and all(image["passed"] for image in report["images"])
    printed = capsys.readouterr().out
    assert "Code: NOT this tree's" in printed and "Verdict: FAILED." in printed


def test_card_lists_the_code_that_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.model_card.origin", lambda: "commit 1 of a clone")
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    card = (tmp_path / "out" / "README.md").read_text()
    for path in (tmp_path / "out").glob("*.py"):
        assert f"| {path.name} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in card
    assert "They are those of commit 1 of a clone." in card


def test_origin_is_what_git_knows(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path / "clone"), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "clone").mkdir()
    code = tmp_path / "clone" / "modeling_aimv2_packing.py"
    code.write_text("1\n")
    monkeypatch.setattr(code_files, "REPO", tmp_path / "clone")
    monkeypatch.setattr(code_files, "CODE_FILES", [code])
    assert origin() == "an unknown commit: the converter did not run from a clone"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert origin() == f"commit {commit} of a clone that names no remote repo"
    git("remote", "add", "origin", "https://alice:secret@example.org/a/b.git")
    assert origin() == f"commit {commit} of https://example.org/a/b.git"
    git("remote", "set-url", "origin", "git@example.org:a/b.git")
    assert origin() == f"commit {commit} of git@example.org:a/b.git"
    # A folder of this machine is no repo to others, and its path is nobody's business.
    for url in (tmp_path, f"file://{tmp_path}", "../other", "C:\\other"):
        git("remote", "set-url", "origin", str(url))
        assert origin() == f"commit {commit} of a clone that names no remote repo"
    git("remote", "set-url", "origin", "https://example.org/a/b.git")
    code.write_text("2\n")
    assert origin() == f"commit {commit} with changes that are not committed of https://example.org/a/b.git"
    (tmp_path / "clone" / "copy").mkdir()
    monkeypatch.setattr(code_files, "REPO", tmp_path / "clone" / "copy")
    assert origin() == "an unknown commit: the converter did not run from a clone"


def test_failed_verification_writes_nothing(tmp_path):
    model = reference_model()
    source = save(tmp_path / "in", model)
    model.encoder.layers[0].attention.q_proj.weight.data.mul_(2)
    reference = save(tmp_path / "reference", model)
    report = verify(source, str(tmp_path / "out"), "--reference", str(reference))
    assert not report["passed"] and not report["identical_weights"]
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_exit_code(tmp_path, monkeypatch, capsys):
    model = reference_model()
    source = save(tmp_path / "in", model)
    model.rms_norm.weight.data.mul_(1.5)
    reference = save(tmp_path / "reference", model)
    photograph = str(features.PHOTOGRAPHS / "cat.jpg")
    command = ["convert_weights.py", str(source), str(tmp_path / "out"), "--verify", "--images", photograph]
    monkeypatch.setattr("sys.argv", [*command, "--reference", str(reference)])
    assert main() == 1
    printed = capsys.readouterr()
    assert "Verdict: FAILED." in printed.out and "error: " in printed.err


def test_channels_last(tmp_path):
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    for name in ("config.json", "preprocessor_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text()) | {"patch_layout": "channels_last"}
        (tmp_path / "out" / name).write_text(json.dumps(fields))
    assert verify(tmp_path / "out", "--reference", str(tmp_path / "in"))["passed"]


def test_reference_is_apples_forward(tmp_path):
    """What the tool compares with, on weights in Apple's names, against Apple's forward in float64."""
    model = reference_model()
    source = save(tmp_path / "in", model)
    encoder = find_encoder(read_checkpoint(source / "model.safetensors"), checkpoints.apple_config(model))
    weights = {name: tensor.load(torch.float32) for name, tensor in encoder.tensors.items()}
    rebuilt = type(model).from_pretrained(None, config=encoder.config, state_dict=weights)
    image = random_images([(5, 7)])[0]
    patches = image.reshape(3, 5, 14, 7, 14).permute(1, 3, 0, 2, 4).reshape(35, -1)
    found = features.original_features(
        rebuilt.eval(), {"hidden_states": patches, "grid_thw": torch.tensor([[1, 5, 7]])}, encoder.config
    )
    torch.testing.assert_close(found.double(), apple_forward(model, image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_that_the_configuration_names_is_not_run(tmp_path, name):
    run(parse_arguments([str(save(tmp_path / "in", reference_model())), str(tmp_path / "out")]))
    (tmp_path / "out" / "trap.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\n")
    fields = json.loads((tmp_path / "out" / name).read_text())
    fields["auto_map"] = dict.fromkeys(fields["auto_map"], "trap.Trap")
    (tmp_path / "out" / name).write_text(json.dumps(fields))
    report = verify(tmp_path / "out", "--reference", str(tmp_path / "in"))
    assert not report["passed"] and all(image["passed"] for image in report["images"])
    assert f"{name} names trap.Trap, which is not in this tree" in report["code_differences"]
    assert not (tmp_path / "trapped").exists()
