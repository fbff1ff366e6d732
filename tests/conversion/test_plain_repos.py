# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`--plain`: a repo of the plain model alone, with the same weights, features and image processor, and fewer files."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from hub_server import Hub
from image_text_checkpoints import TEXTS, clip_tokenizer, reference_image_text_model
from PIL import Image
from reference import reference_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_hub import COMMANDS, client
from transformers import AutoModel, AutoProcessor

from conversion import features
from conversion.code_files import with_imports
from conversion.repo_contents import repo_differences
from convert_weights import main, parse_arguments, run


MOST_FILES = {"vision": 6, "texts": 9}
IMAGES = [Image.effect_noise(size, 60).convert("RGB") for size in [(80, 60), (33, 150), (56, 56)]]


def convert(source: Path, output: Path, *arguments: str) -> Path:
    run(parse_arguments([str(source), str(output), *arguments]))
    return output


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    model = reference_model(is_native=False, use_head=True)
    checkpoints.save(folder / "vision", checkpoints.apple(model), checkpoints.apple_config(model))
    reference_image_text_model().save_pretrained(folder / "texts")
    clip_tokenizer().save_pretrained(folder / "texts")
    return {name: folder / name for name in ("vision", "texts")}


@pytest.fixture(scope="module", params=["vision", "texts"])
def repos(request, sources, tmp_path_factory) -> tuple[str, Path, Path]:
    """Which source, its plain repo, and its accelerated one."""
    folder = tmp_path_factory.mktemp(request.param)
    source = sources[request.param]
    return request.param, convert(source, folder / "plain", "--plain"), convert(source, folder / "accelerated")


def test_it_carries_only_what_the_plain_model_needs(repos):
    kind, plain, accelerated = repos
    code = {path.name for path in plain.glob("*.py")}
    assert len(code) <= MOST_FILES[kind]
    assert not any("accelerated" in name or "engine" in name or "triton" in name or "graphs" in name for name in code)
    assert code < {path.name for path in accelerated.glob("*.py")}
    assert repo_differences(plain) == repo_differences(accelerated) == []
    auto_map = json.loads((plain / "config.json").read_text())["auto_map"]
    module = {"vision": "modeling", "texts": "image_text"}[kind]
    assert auto_map["AutoModel"].startswith(f"{module}_aimv2_packing.Aimv2Packing") and "Accelerated" not in str(
        auto_map
    )
    card = (plain / "README.md").read_text()
    assert all(f"| {name} |" in card for name in code) and "accelerated_" not in card
    for name in ("preprocessor_config.json", "modules.json", "sentence_bert_config.json"):
        assert (plain / name).read_bytes() == (accelerated / name).read_bytes()


def test_files_are_found_by_their_imports():
    names = {path.name.removesuffix("_aimv2_packing.py") for path in with_imports("modeling_aimv2_packing")}
    assert names == {"configuration", "layout", "modeling"}
    every = with_imports("accelerated_image_text_aimv2_packing")
    assert {"cpu_engine_aimv2_packing.py", "image_text_aimv2_packing.py"} <= {path.name for path in every}


@torch.no_grad()
def test_its_features_are_those_of_the_accelerated_repo(repos):
    kind, plain, accelerated = repos
    loaded = [AutoModel.from_pretrained(folder, trust_remote_code=True).eval() for folder in (plain, accelerated)]
    for name, tensor in load_file(accelerated / "model.safetensors").items():
        assert torch.equal(loaded[0].state_dict()[name], tensor)
    texts = {"text": TEXTS, "padding": True} if kind == "texts" else {}
    outputs = []
    for model, folder in zip(loaded, (plain, accelerated), strict=True):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        outputs.append(model(**processor(images=IMAGES, return_tensors="pt", **texts)))
    for name in ("last_hidden_state", "pooler_output") if kind == "vision" else ("image_embeds", "logits_per_image"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=0, atol=1e-5)
    towers = [getattr(model, "vision_model", model) for model in loaded]
    assert not hasattr(towers[0], "last_engine") and towers[1].last_engine == "cpu"


def test_sentence_transformers_knows_both(repos):
    _, plain, accelerated = repos
    encoded = [
        SentenceTransformer(str(folder), trust_remote_code=True).encode(IMAGES, convert_to_tensor=True)
        for folder in (plain, accelerated)
    ]
    torch.testing.assert_close(encoded[0], encoded[1], rtol=0, atol=1e-5)


def test_saving_the_loaded_model_keeps_the_kind(repos, tmp_path):
    _, plain, _ = repos
    AutoModel.from_pretrained(plain, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert "Accelerated" not in type(again).__name__
    assert all(line.endswith("is missing") for line in repo_differences(tmp_path / "saved"))


def test_verification_runs_the_plain_model(repos, monkeypatch, capsys):
    kind, plain, _ = repos
    monkeypatch.setattr(features, "RANDOM_SIZES", 1)
    ran = []
    load = __import__("conversion.verification", fromlist=["load"]).load

    def watched(model_class, *arguments):
        ran.append(model_class.__name__)
        return load(model_class, *arguments)

    monkeypatch.setattr("conversion.verification.load", watched)
    run(parse_arguments([str(plain), "--verify"]))
    assert ran[1] == {"vision": "Aimv2PackingModel", "texts": "Aimv2PackingImageTextModel"}[kind]
    printed = capsys.readouterr().out
    assert "Verdict: passed." in printed
    assert f"Code: equal to this tree's, file by file ({len(list(plain.glob('*.py')))} files)." in printed


def test_engines_beside_a_plain_model_are_a_difference(repos, tmp_path):
    _, plain, accelerated = repos
    names = ["cpu_engine_aimv2_packing.py", "accelerated_aimv2_packing.py"]
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in names:
        (tmp_path / name).write_bytes((accelerated / name).read_bytes())
    assert repo_differences(tmp_path) == [f"{name} is no file that the converter writes" for name in sorted(names)]
    config = json.loads((plain / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "accelerated_aimv2_packing.Aimv2PackingAcceleratedModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert any("missing" in line for line in repo_differences(tmp_path))


@pytest.mark.parametrize(("first", "second"), [(["--plain"], []), ([], ["--plain"])], ids=["plain", "accelerated"])
def test_converting_again_with_the_other_flag_is_a_difference(sources, tmp_path, first, second, monkeypatch, capsys):
    output = convert(sources["vision"], tmp_path / "out", *first)
    expected = "has no engines, as --plain makes it" if first else "has engines, without which --plain makes it"
    for more in ([], ["--push-to-hub", "alice/m"]):
        command = ["convert_weights.py", str(sources["vision"]), str(output), *second, *more]
        monkeypatch.setattr("sys.argv", command)
        assert main() == 1
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and expected in error
    convert(sources["vision"], output, *second, "--overwrite")
    assert repo_differences(output) == [] and (output / "accelerated_aimv2_packing.py").exists() == bool(first)


def test_a_plain_repo_replaces_an_accelerated_one_on_the_hub(repos, tmp_path):
    _, plain, accelerated = repos
    hub = Hub()
    try:
        commands = [
            *(("hf_alice", str(folder), "--push-to-hub", "alice/m") for folder in (accelerated, plain)),
            ("hf_alice", "alice/m", "--verify-code"),
        ]
        result = client(hub, tmp_path, COMMANDS.format(commands=commands))
        files = hub.repos["alice/m"].commit("main").files
        assert {name for name in files if name.endswith(".py")} == {path.name for path in plain.glob("*.py")}
        assert result.stdout.count("----- 0") == 3, result.stdout + result.stderr
    finally:
        hub.close()


def test_plain_is_for_converting(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["source", "--plain", "--verify"])
    assert "--plain is for converting: give OUTPUT_DIR" in capsys.readouterr().err
