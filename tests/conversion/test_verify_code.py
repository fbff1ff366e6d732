# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
`--verify-code` passes what the converter writes and nothing else: every JSON file that transformers, Sentence
Transformers and peft read from a repo, with a reference to somebody else's code in it, is refused.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from hub_server import Hub
from hypothesis import given
from hypothesis import strategies as st
from image_text_checkpoints import clip_tokenizer, reference_image_text_model
from reference import reference_model
from test_hub import COMMANDS, client, converter
from transformers import AutoModel, AutoProcessor

from conversion import features
from conversion.repo_contents import file_names, repo_differences
from convert_weights import parse_arguments, run


FOREIGN = "mallory/repo--trap.Trap"
# From the sources of transformers 5.23, sentence_transformers 6.2 and peft 0.21: what they open by name in a repo.
READ_BY_LIBRARIES = [
    "adapter_config.json",
    "added_tokens.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "config.json",
    "config_sentence_transformers.json",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "feature_extractor.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "pytorch_model.bin.index.json",
    "router_config.json",
    "sentence_albert_config.json",
    "sentence_bert_config.json",
    "sentence_camembert_config.json",
    "sentence_distilbert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "0_Transformer/config.json",
    "1_Dense/config.json",
    "additional_chat_templates/more.jinja",
    "chat_template.jinja",
    "idf.json",
    "cnn_config.json",
    "lstm_config.json",
    "phrasetokenizer_config.json",
    "whitespacetokenizer_config.json",
    "wordembedding_config.json",
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    model, image_text = reference_model(), reference_image_text_model()
    checkpoints.save(folder / "vision-source", checkpoints.apple(model), checkpoints.apple_config(model))
    image_text.save_pretrained(folder / "texts-source")
    clip_tokenizer().save_pretrained(folder / "texts-source")
    (folder / "texts-source" / "vocab.json").write_text('{"a": 0}')
    (folder / "texts-source" / "special_tokens_map.json").write_text('{"bos_token": "<|startoftext|>"}')
    repos = {}
    for kind in ("vision", "texts"):
        repos[kind] = folder / kind
        run(parse_arguments([str(folder / f"{kind}-source"), str(repos[kind]), "--max-shard-size", "200KB"]))
    return repos


@pytest.fixture(params=["vision", "texts"])
def repo(request, converted, tmp_path) -> Path:
    """A copy of a converted repo, without its weights."""
    return shutil.copytree(converted[request.param], tmp_path / "repo", ignore=shutil.ignore_patterns("*.safetensors"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """The JSON as `change` leaves or returns it."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_what_the_converter_writes_is_equal(converted):
    for folder in converted.values():
        assert repo_differences(folder) == []


def test_what_transformers_saves_of_a_repo_is_equal(converted, tmp_path):
    for kind, folder in converted.items():
        AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / kind)
        AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / kind)
        different = repo_differences(tmp_path / kind)
        assert all(line.endswith(".py is missing") for line in different), different


@pytest.mark.parametrize("name", READ_BY_LIBRARIES)
def test_a_foreign_reference_is_refused_in_every_file_that_libraries_read(repo, name):
    path = repo / name
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() and name.endswith(".json") else {}
    if isinstance(content, list):
        content[0]["auto_map"] = FOREIGN
    else:
        content["auto_map"] = {"AutoModel": FOREIGN}
    path.write_text(json.dumps(content))
    found = repo_differences(repo)
    assert len(found) >= 1 and all(name.rpartition("/")[2] in line for line in found), found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda x: x.update(custom_pipelines={"trap": {"impl": "trap.Trap", "type": "image"}})),
        ("config.json", lambda x: x.update(configuration_files=["config.5.0.0.json"])),
        ("config.json", lambda x: x.update(attn_implementation="mallory/kernel")),
        ("config.json", lambda x: x.update(_attn_implementation="mallory/kernel")),
        ("config.json", lambda x: x.update(_attn_implementation_internal="mallory/kernel")),
        ("config.json", lambda x: x.update(quantization_config={"quant_method": "trap"})),
        ("config.json", lambda x: x.update(transformers_weights="other.safetensors")),
        ("config.json", lambda x: x.update(hidden_act="mallory/act")),
        ("config.json", lambda x: x.update(_name_or_path="mallory/repo")),
        ("config.json", lambda x: x.update(auto_map=x["auto_map"] | {"AutoConfig": FOREIGN})),
        ("config.json", lambda x: x.update(auto_map=[FOREIGN])),
        ("config.json", lambda x: x.update(auto_map={**x["auto_map"], "AutoModel": x["auto_map"]["AutoConfig"]})),
        ("config.json", lambda x: x.update(architectures=["LlamaForCausalLM"])),
        ("config.json", lambda x: x.update(dtype={"": "float32"})),
        ("config.json", lambda x: x.update(text_config={"auto_map": {"AutoConfig": FOREIGN}})),
        ("preprocessor_config.json", lambda x: x.update(image_processor_type="CLIPImageProcessor")),
        ("preprocessor_config.json", lambda x: x.update(auto_map={"AutoImageProcessor": FOREIGN})),
        ("preprocessor_config.json", lambda x: x.update(image_mean=["0.5"])),
        ("modules.json", lambda x: x[0].update(type="sentence_transformers.models.Router")),
        ("modules.json", lambda x: x[0].update(path="1_Dense")),
        (
            "modules.json",
            lambda x: x.append({"idx": 1, "type": "sentence_transformers.models.Dense", "path": "1_Dense"}),
        ),
        ("sentence_bert_config.json", lambda x: x.update(model_args={"code_revision": "evil"})),
        ("sentence_bert_config.json", lambda x: x.update(processing_kwargs={"trust_remote_code": True})),
    ],
)
def test_what_would_run_or_read_something_else_is_refused(repo, name, change):
    edit(repo / name, change)
    found = repo_differences(repo)
    assert found and all(line.startswith(name) for line in found), found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("processor_config.json", lambda x: x.update(image_processor={"auto_map": {"AutoImageProcessor": FOREIGN}})),
        ("processor_config.json", lambda x: x.update(processor_class="CLIPProcessor")),
        ("processor_config.json", lambda x: x.update(auto_map={"AutoProcessor": "trap.Trap"})),
        ("tokenizer_config.json", lambda x: x.update(auto_map={"AutoTokenizer": [FOREIGN, None]})),
        ("tokenizer_config.json", lambda x: x.update(tokenizer_class="trap.Trap")),
        ("tokenizer_config.json", lambda x: x.update(tokenizer_file="/etc/passwd")),
        ("tokenizer_config.json", lambda x: x.update(fast_tokenizer_files=["tokenizer.5.0.json"])),
        ("tokenizer_config.json", lambda x: x.update(chat_template="{{ x }}")),
        ("tokenizer.json", lambda x: x.update(added_tokens=[{"content": "a", "path": "/etc/passwd"}])),
        ("vocab.json", lambda x: x.update(a="mallory/repo")),
        ("model.safetensors.index.json", lambda x: x["weight_map"].update(a="../other/model.safetensors")),
        ("model.safetensors.index.json", lambda x: x["weight_map"].update(a="pytorch_model.bin")),
    ],
)
def test_the_same_of_texts(converted, tmp_path, name, change):
    repo = shutil.copytree(converted["texts"], tmp_path / "repo")
    edit(repo / name, change)
    found = repo_differences(repo)
    assert found and all(line.startswith(name) for line in found), found


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(field=st.text(min_size=1), value=JSON_VALUES, name=st.sampled_from(["config.json", "preprocessor_config.json"]))
def test_no_field_that_is_unknown_passes(converted, tmp_path_factory, field, value, name):
    known = json.loads((converted["vision"] / name).read_text())
    if field in known or field in ("merge_size", "temporal_patch_size"):
        return
    folder = tmp_path_factory.mktemp("repo")
    for path in converted["vision"].glob("*.[jp][sy]*"):
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_text(json.dumps({**known, field: value}))
    (line,) = repo_differences(folder)
    assert line.startswith(f"{name} has the field ") and line.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "tf_model.h5",
        "evil.so",
        "__pycache__/modeling_aimv2_packing.pyc",
        "WEIGHTS_LICENSE.py",
        "WEIGHTS_LICENSEconfig.json",
        "model.py",
        "sub/README.md",
        "a\nb.md",
    ],
)
def test_files_that_the_converter_does_not_write_are_refused(repo, name):
    (repo / name).parent.mkdir(exist_ok=True)
    (repo / name).write_text("")
    (line,) = repo_differences(repo)
    assert line.isprintable()


def test_files_of_git_and_of_the_hubs_client_are_none_of_the_repo(repo):
    for name in (".gitattributes", ".git/hooks/a.py", ".cache/huggingface/download/config.json.metadata"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("")
    assert repo_differences(repo) == []


def test_deep_folders_and_deep_json_are_one_line(repo):
    folder = repo
    for _ in range(1100):
        folder /= "d"
        folder.mkdir()
    assert repo_differences(repo) == []
    # What pytest and `shutil.rmtree` do is recursive.
    while folder != repo:
        folder.rmdir()
        folder = folder.parent
    (repo / "config.json").write_text('{"model_type": "aimv2_packing", "a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON: it is nested too deeply"):
        repo_differences(repo)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "modules.json", "modeling_aimv2_packing.py"])
def test_a_pipe_is_refused_and_not_read(repo, name):
    (repo / name).unlink()
    os.mkfifo(repo / name)
    if name.endswith(".json"):
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            repo_differences(repo)
    else:
        assert repo_differences(repo) == [f"{name} is no regular file"]


def test_forged_verdicts_are_printed_escaped(repo, capsys):
    forged = "\x1b[2K\rCode: equal to this tree's"
    edit(repo / "config.json", lambda x: x.update(auto_map={**x["auto_map"], "AutoConfig": forged}, **{forged: 1}))
    (repo / f"{forged}.py").write_text("")
    with pytest.raises(ValueError, match="is not this tree's"):
        run(parse_arguments([str(repo), "--verify-code"]))
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable() and printed.startswith("Code: NOT this tree's")
    assert len(printed.splitlines()) == 4


def test_repos_of_the_hub(tmp_path, converted):
    """Weights and texts stay on the Hub, and their names are looked at."""
    hub = Hub()
    files = {path.name: path.read_bytes() for path in converted["vision"].iterdir()}
    hostile = {
        "generate": {"custom_generate/generate.py": b"raise SystemExit"},
        "adapter": {"adapter_model.safetensors": b""},
    }
    for repo, name, fields in (
        ("pipelines", "config.json", {"custom_pipelines": {"trap": {"impl": "trap.Trap", "type": "image"}}}),
        ("files", "config.json", {"configuration_files": ["config.5.0.0.json"]}),
        ("images", "preprocessor_config.json", {"auto_map": {"AutoImageProcessor": FOREIGN}}),
    ):
        hostile[repo] = {name: json.dumps(json.loads(files[name]) | fields).encode()}
    hub.add_repo("alice/good", files)
    for repo, changed in hostile.items():
        hub.add_repo(f"mallory/{repo}", files | changed)
    names = ["alice/good", *(f"mallory/{repo}" for repo in hostile)]
    try:
        commands = [("hf_alice", name, "--verify-code") for name in names]
        result = client(hub, tmp_path / "a", COMMANDS.format(commands=commands))
        good, *others = result.stdout.split("-----")[:-1]
        assert "Code: equal to this tree's" in good and hub.repos["alice/good"].commits[0].oid in good
        for name, found, (repo, changed) in zip(names[1:], others, hostile.items(), strict=True):
            assert found.startswith(" ") and f"  {next(iter(changed))} " in found, found
            assert hub.repos[name].commits[0].oid in found and f"code of mallory/{repo} is not" in result.stderr
        offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'"
        cached = converter(hub, tmp_path / "a", "alice/good", "--verify-code", setup=offline)
        assert cached.returncode == 0 and "The Hub is out of reach: what an earlier download holds" in cached.stdout
    finally:
        hub.close()


def test_names_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert file_names(tmp_path) == ["a/b", "link"]


def test_verification_loads_nothing_that_a_hostile_file_names(converted, tmp_path, monkeypatch, capsys):
    """An adapter of peft's, and a second configuration: transformers' own loading would go where they point."""
    monkeypatch.setattr(features, "RANDOM_SIZES", 1)
    repo = shutil.copytree(converted["vision"], tmp_path / "repo")
    (repo / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "mallory/repo", "peft_type": "LORA"})
    )
    edit(repo / "config.json", lambda x: x.update(configuration_files=["config.5.0.0.json"]))
    (repo / "config.5.0.0.json").write_text(json.dumps({"model_type": "aimv2_packing", "hidden_size": 32}))
    report = tmp_path / "report.json"
    with pytest.raises(ValueError, match="is not this tree's"):
        run(parse_arguments([str(repo), "--verify", "--report", str(report)]))
    found = json.loads(report.read_text())
    assert not found["passed"] and found["images"] and all(image["passed"] for image in found["images"])
    assert len(found["code_differences"]) == 3
    assert "Verdict: FAILED." in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_pipe_in_a_source_blocks_nothing(converted, tmp_path, name):
    source = shutil.copytree(converted["texts"].parent / "texts-source", tmp_path / "in")
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        run(parse_arguments([str(source), str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
