# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What is no complete, safe AIMv2 checkpoint is refused with a message that says why, and nothing is written."""

import errno
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from reference import REPO, reference_model
from safetensors.torch import save_file

from conversion.hub_files import download_files, require_converted
from convert_weights import main, parse_arguments, run


def convert(source: Path, *arguments: str) -> None:
    output = source.parent / "out"
    try:
        run(parse_arguments([str(source), str(output), *arguments]))
    except BaseException:
        assert [path.name for path in source.parent.iterdir() if "out" in path.name] == []
        raise


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    encoded = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.fixture
def source(tmp_path) -> Path:
    model = reference_model(is_native=False)
    return checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model))


def change_tensors(source: Path, **changes: torch.Tensor | None) -> None:
    tensors = checkpoints.apple(reference_model(is_native=False)) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, source / "model.safetensors")


def change_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trunk.blocks.1.mlp.fc3.weight": None},
            r"the Apple checkpoint format\n  missing: trunk.blocks.1.mlp.fc3.weight",
        ),
        ({"trunk.blocks.1.extra": torch.ones(3)}, r"the Apple checkpoint format\n  left over: trunk.blocks.1.extra"),
        (
            {"trunk.blocks.5.norm_1.weight": torch.ones(64)},
            "config.json says num_hidden_layers 2, the tensors say 3",
        ),
        (
            {"trunk.blocks.0.attn.qkv.weight": torch.ones(64, 64)},
            r"wrong: trunk.blocks.0.attn.qkv.weight is \(64, 64\), expected \(192, 64\)",
        ),
        (
            {"trunk.post_trunk_norm.weight": torch.ones(64, dtype=torch.float8_e4m3fn)},
            "is F8_E4M3, expected one of F64, F32",
        ),
        ({"trunk.post_trunk_norm.weight": torch.ones(64, dtype=torch.int8)}, "is I8, expected one of F64, F32"),
        ({"preprocessor.pos_embed": torch.ones(1, 15, 64)}, r"position embedding is \(1, 15, 64\).*square grid"),
        ({"preprocessor.pos_embed": torch.ones(1, 25, 64)}, "config.json says image_size 56, the tensors say 70"),
        # As MLX stores it.
        ({"preprocessor.patchifier.proj.weight": torch.ones(64, 14, 14, 3)}, r"patch embedding is \(64, 14, 14, 3\)"),
        ({"preprocessor.patchifier.proj.weight": torch.ones(64, 588)}, "expected 4 dimensions"),
        ({"trunk.blocks.0.norm_1.weight": None, "trunk.blocks.1.norm_1.weight": None}, "`?num_hidden_layers"),
        ({"head.k.weight": torch.ones(64, 64)}, "left over: head.k.weight"),
        ({"head.cls_token": torch.ones(1, 1, 64)}, "missing: head.k.weight, head.v.weight, head.linear.weight"),
    ],
)
def test_tensors(source, changes, message):
    change_tensors(source, **changes)
    with pytest.raises(ValueError, match=f"(?s)No complete AIMv2 vision encoder.*{message}"):
        convert(source)


def test_stray_layer_without_a_config(tmp_path):
    model = reference_model(hidden_size=128, num_attention_heads=1)
    tensors = checkpoints.apple(model) | {"trunk.blocks.5.norm_1.weight": torch.ones(128)}
    with pytest.raises(ValueError, match=r"(?s)missing: trunk\.blocks\.2.*left over: trunk\.blocks\.5\.norm_1"):
        convert(checkpoints.save(tmp_path / "in", tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "config.json says hidden_size 128, the tensors say 64"),
        ({"num_hidden_layers": 3}, "config.json says num_hidden_layers 3, the tensors say 2"),
        ({"image_size": 224}, "config.json says image_size 224, the tensors say 56"),
        ({"num_attention_heads": 5}, "`hidden_size` must be divisible by `num_attention_heads`, got 64 and 5"),
        ({"num_attention_heads": "2"}, "num_attention_heads"),
        ({"num_attention_heads": None}, "no config.json says num_attention_heads"),
        ({"rms_norm_eps": -1.0}, "`rms_norm_eps` must be positive"),
        ({"hidden_act": "no such"}, "`hidden_act` must be one of"),
        ({"is_native": True}, "left over: preprocessor.pos_embed"),
        ({"num_attention_heads": [2]}, "num_attention_heads"),
        ({"num_attention_heads": None, "model_type": ["aimv2"]}, "no config.json says num_attention_heads"),
    ],
)
def test_config_that_contradicts(source, changes, message):
    change_config(source, **changes)
    with pytest.raises(ValueError, match=message):
        convert(source)


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1])
def test_sizes_that_no_tensor_can_have(source, length):
    def change(header):
        # A tensor without values may be of any size in a true header.
        taken = header["filling"] = header["trunk.blocks.0.mlp.fc1.weight"].copy()
        start = taken["data_offsets"][0]
        header["trunk.blocks.0.mlp.fc1.weight"] = taken | {"shape": [length, 0], "data_offsets": [start, start]}

    rewrite_header(source / "model.safetensors", change)
    change_config(source, intermediate_size=None)
    with pytest.raises(ValueError, match=rf"no tensor can hold a weight of .* \* {length}"):
        convert(source)


def test_more_layers_than_could_be_built(tmp_path):
    tensors = checkpoints.apple(reference_model(hidden_size=128, num_attention_heads=1))
    tensors |= {f"trunk.blocks.{index}.norm_1.weight": torch.ones(0) for index in range(2, 4_000)}
    with pytest.raises(ValueError, match=r"missing: trunk\.blocks\.2\..* more"):
        convert(checkpoints.save(tmp_path / "in", tensors))


def test_deeply_nested_config(tmp_path):
    model = reference_model(hidden_size=128, num_attention_heads=1)
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model, "tower."))
    (source / "config.json").write_text('{"a":' * 900 + json.dumps({"rms_norm_eps": -1.0}) + "}" * 900)
    convert(source)


def test_heads_that_differ(tmp_path):
    model = reference_model()
    config = checkpoints.apple_config(model)
    config = {"a": config, "b": config | {"num_attention_heads": 4}}
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model, "tower."), config)
    with pytest.raises(ValueError, match="num_attention_heads 2 and 4"):
        convert(source)


def test_no_aimv2_at_all(tmp_path):
    source = checkpoints.save(tmp_path / "in", {"wte.weight": torch.ones(3), "h.0.attn.weight": torch.ones(3)}, {})
    with pytest.raises(ValueError, match=r"No AIMv2 vision encoder among the checkpoint's 2 tensors \(h.0.attn.weight"):
        convert(source)


def test_another_vision_encoder(tmp_path):
    tensors = {
        "vision.embeddings.patch_embedding.weight": torch.ones(8, 3, 14, 14),
        "vision.post_layernorm.weight": torch.ones(8),
    }
    with pytest.raises(ValueError, match=r"nearest is the transformers Ovis2 checkpoint format under 'vision\.'"):
        convert(checkpoints.save(tmp_path / "in", tensors, {}))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: b"no JSON" + b" " * 100,
        lambda header: json.dumps(header).replace("norm_2", "norm_1").encode(),
        lambda header: header["trunk.post_trunk_norm.weight"].update(dtype="F16"),
        lambda header: header["trunk.post_trunk_norm.weight"].update(shape=[65]),
        lambda header: header["trunk.post_trunk_norm.weight"].update(data_offsets=[0, 256]),
        lambda header: header["trunk.post_trunk_norm.weight"].update(data_offsets=[1 << 40, (1 << 40) + 256]),
        lambda header: header.pop("trunk.post_trunk_norm.weight"),
    ],
    ids=["no JSON", "twice", "dtype", "shape", "overlap", "outside", "gap"],
)
def test_headers_that_lie(source, change):
    rewrite_header(source / "model.safetensors", change)
    with pytest.raises(ValueError, match=r"model\.safetensors is not an intact safetensors file"):
        convert(source)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 20_000, -1])
def test_cut_off_files(source, size):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not an intact safetensors file"):
        convert(source)


def test_header_length_that_lies(source):
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is not an intact safetensors file"):
        convert(source)


def test_file_that_shrinks_while_it_is_read(source, monkeypatch):
    from conversion.safetensors_files import StoredTensor

    whole = StoredTensor.chunks

    def chunks(self, buffer):
        os.truncate(self.path, 30_000)
        return whole(self, buffer)

    monkeypatch.setattr(StoredTensor, "chunks", chunks)
    with pytest.raises(ValueError, match="ended while it was read"):
        convert(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickle_is_refused_and_not_read(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_bytes(pickle.dumps(Trap()))
    for given in (source, source / name):
        with pytest.raises(ValueError, match=rf"pickle \({name}\).*huggingface.co/spaces/safetensors/convert"):
            convert(given)
    assert not (tmp_path / "trapped").exists()


def test_a_source_without_weights_is_told_what_to_give(source):
    (source / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no \.safetensors weights: give the folder, the file or the index that"
    ):
        convert(source)


def test_pickle_inside_an_index_is_refused(source):
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model.bin\)"):
        convert(source)


@pytest.mark.parametrize("kind", ["absolute", "parent", "link"])
def test_files_outside_the_folder_are_refused(tmp_path, kind):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model), shards=2)
    victim = source / "model-00001-of-00002.safetensors"
    outside = tmp_path / "secret.safetensors"
    victim.rename(outside)
    index = source / "model.safetensors.index.json"
    if kind == "link":
        victim.symlink_to(outside)
    else:
        index.write_text(
            index.read_text().replace(victim.name, str(outside) if kind == "absolute" else "../secret.safetensors")
        )
    with pytest.raises(ValueError, match=r"leads out of .*: refused"):
        convert(source)


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "README.md", "model.safetensors"])
def test_links_that_leave_the_folder_are_refused(source, tmp_path, name):
    (source / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"'{name}' leads out of"):
        convert(source)


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "model.safetensors"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_broken_links_are_refused(source, name, target):
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert(source)


def test_pipes_are_refused(source):
    os.mkfifo(source / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors is neither a folder nor a file"):
        convert(source / "pipe.safetensors")


@pytest.mark.parametrize("name", ["a\0.safetensors", "\ud800.safetensors", "a" * 300 + ".safetensors"])
def test_names_that_no_file_can_have(source, name):
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is no path of a file in .*in: "):
        convert(source)


@pytest.mark.parametrize("front_matter", ["a: b: c", "1: 2", "[a]: 1", "tags: 3", "license: [mit, {}]", "- a", "a: \1"])
def test_cards_that_cannot_be_read_stop_no_conversion(source, front_matter):
    (source / "README.md").write_text(f"---\n{front_matter}\n---\n")
    convert(source)
    assert "does not state it in a card" in (source.parent / "out" / "README.md").read_text()


def test_folder_of_licences(source):
    (source / "LICENSES").mkdir()
    convert(source)


def test_links_inside_the_hub_cache_are_followed(source, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    run(parse_arguments([str(snapshot), str(tmp_path / "out")]))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: "[]", "must hold a JSON object, got list"),
        (lambda index: "{", "cannot be read as JSON"),
        (lambda index: "[" * 100_000, "cannot be read as JSON"),
        (lambda index: "{}", "`weight_map` must map names to file names"),
        (lambda index: json.dumps({"weight_map": {"a": 1}}), "`weight_map` must map names to file names"),
        (lambda index: json.dumps(index).replace("00001-of", "00007-of"), "lacks the file 'model-00007-of-00002"),
        (lambda index: json.dumps(index).replace("norm_2", "norm_3"), "do not agree on the tensor"),
        (lambda index: json.dumps(index)[:-2] + ', "trunk.post_trunk_norm.weight": "x"}}', "holds the key .* twice"),
        (lambda index: json.dumps(index).replace("00001-of", "00002-of"), "do not agree on the tensor"),
    ],
)
def test_indexes_that_lie(tmp_path, change, message):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model), shards=2)
    index = source / "model.safetensors.index.json"
    index.write_text(change(json.loads(index.read_text())))
    with pytest.raises(ValueError, match=message):
        convert(source)


def test_tensor_in_two_shards(tmp_path):
    model = reference_model()
    source = checkpoints.save(tmp_path / "in", checkpoints.apple(model), checkpoints.apple_config(model), shards=2)
    save_file({"trunk.post_trunk_norm.weight": torch.ones(64)}, source / "third.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["another"] = "third.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"both hold the tensor 'trunk\.post_trunk_norm\.weight'"):
        convert(source)


def test_more_than_one_set_of_weights(source):
    (source / "model.safetensors").rename(source / "a.safetensors")
    (source / "b.safetensors").write_bytes((source / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"more than one set of weights: a.safetensors, b.safetensors. Name one file"):
        convert(source)
    run(parse_arguments([str(source / "a.safetensors"), str(source.parent / "out")]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(source, value, capsys):
    weight = torch.ones(64)
    weight[33] = value
    change_tensors(source, **{"trunk.blocks.1.norm_2.weight": weight})
    run(parse_arguments([str(source), str(source.parent / "out")]))
    errors = capsys.readouterr().err
    assert "warning: encoder.layers.1.rms_norm2.weight holds NaN or infinite values." in errors
    assert errors.count("warning") == 1


def test_values_too_large_for_the_dtype_are_named(source, capsys):
    change_tensors(source, **{"trunk.blocks.1.norm_2.weight": torch.full((64,), 1e6)})
    run(parse_arguments([str(source), str(source.parent / "out"), "--dtype", "float16"]))
    assert "encoder.layers.1.rms_norm2.weight holds NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "x.json"], "--report needs --verify"),
        (["--reference", "x"], "--reference needs --verify"),
        (["--private"], "--private needs --push-to-hub"),
        (["--hub-revision", "x"], "--hub-revision needs --push-to-hub"),
        (["--max-shard-size", "5 apples"], "max-shard-size"),
        (["--max-shard-size", "infGB"], "max-shard-size"),
        (["--max-shard-size=-5MB"], "must be like 5GB or 500MB: no tensor fits"),
        (["--max-shard-size", "0KB"], "must be like 5GB or 500MB: no tensor fits"),
        (["--verify", "--device", "no such device"], "device"),
        (["--verify", "--images", "no such image"], "no such image"),
        (["--dtype", "int8"], "invalid choice"),
        (["--verify-code"], "--verify-code takes a converted SOURCE"),
        (["--device", "cpu"], "--device needs --verify"),
        (["--verify", "--device", "meta"], "meta cannot be used here"),
        (["--verify", "--report", "no such folder/report.json"], "no such folder is no folder"),
        (["--verify", "--report", "."], ". is a folder"),
        (["--push-to-hub", "a name/of/nobody"], "Repo id must"),
        (["--push-to-hub", ""], "Repo id must"),
    ],
)
def test_bad_options_are_refused_before_any_work(source, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("convert_weights.read_source", None)
    with pytest.raises(SystemExit) as exit_code:
        parse_arguments([str(source), str(source.parent / "out"), *arguments])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push-to-hub", "user/name", "--dtype", "bfloat16"], "--dtype is for converting or verifying"),
        (["--push-to-hub", "user/name", "--max-shard-size", "1GB"], "--max-shard-size is for converting"),
        (["--verify", "--overwrite"], "--overwrite is for converting"),
        (["--verify-code", "--prefix", "x"], "--verify-code takes a converted SOURCE"),
        (["--verify-code", "--dtype", "bfloat16"], "--dtype is for converting or verifying"),
    ],
)
def test_options_that_a_converted_source_would_ignore_are_refused(source, arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([str(source), *arguments])
    assert message in capsys.readouterr().err


def test_images_are_read_before_the_conversion(source, monkeypatch):
    monkeypatch.setattr("convert_weights.convert", None)
    with pytest.raises(OSError, match="holds no image"):
        convert(source, "--verify", "--images", str(source / "config.json"))


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted. Nothing is half done: run the same command again."),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "CUDA out of memory. Less is needed with a smaller --dtype",
        ),
        (MemoryError(), 1, "not enough memory. Less is needed with a smaller --dtype"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 1, "out: File exists. Choose another folder."),
        (OSError(errno.ENAMETOOLONG, "Name too long", "out"), 1, "out: Name too long. Choose another folder."),
    ],
)
def test_what_stops_a_conversion_is_one_line(source, error, code, expected, monkeypatch, capsys):
    def stopped(*arguments):
        raise error

    monkeypatch.setattr("conversion.model_repo.write_checkpoint", stopped)
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(source), str(source.parent / "out")])
    assert main() == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    assert os.listdir(source.parent) == ["in"]


def test_a_missing_tensor_of_three_is_named_once(source):
    change_tensors(source, **{"trunk.blocks.0.attn.qkv.weight": None})
    with pytest.raises(ValueError, match=r"missing: trunk\.blocks\.0\.attn\.qkv\.weight$"):
        convert(source)


def test_revision_of_a_local_source(source):
    with pytest.raises(ValueError, match="--revision is for sources on the Hub"):
        convert(source, "--revision", "main")


def test_verifying_what_is_not_converted(source):
    with pytest.raises(ValueError, match="is not converted yet: give an OUTPUT_DIR"):
        run(parse_arguments([str(source), "--verify"]))


def no_network(monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("conversion.hub_files.HfApi", refuse)


@pytest.mark.parametrize("name", ["nosuch", "./a/nosuch", "a/b/nosuch", "~/nosuch", "/nosuch/model", "a/", "no such/x"])
def test_paths_that_do_not_exist_are_not_sought_on_the_hub(tmp_path, name, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for arguments in ([name, "out"], [name, "--verify"], [name, "--verify-code"]):
        with pytest.raises(ValueError, match=f"^{name} does not exist: give a file, a folder, or a Hub id"):
            run(parse_arguments(arguments))
    with pytest.raises(ValueError, match=f"^{name} does not exist"):
        require_converted(name)


class LoginPage:
    """What answers where a network wants a login first: a page, which is no JSON."""

    def model_info(self, *arguments, **options):
        return json.loads("<html>")


def test_a_network_that_answers_with_a_page_leaves_what_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.hub_files.HfApi", LoginPage)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^user/model is no local path, and the Hub at .* cannot be reached"):
        download_files("user/model", None, ["*.json"])
    snapshot = tmp_path / "models--user--model/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--user--model/refs").mkdir()
    (tmp_path / "models--user--model/refs/main").write_text("a" * 40)
    assert download_files("user/model", None, ["*.json"]) == snapshot
    with pytest.raises(ValueError, match="cannot be reached"):
        download_files("user/model", None, ["*.json", "*.safetensors"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_permission_denied_is_said(source, name, monkeypatch, capsys):
    opened = Path.open

    def denied(path: Path, *arguments, **options):
        if path == source / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(source), str(source.parent / "out")])
    assert main() == 1
    expected = f"error: {source / name}: Permission denied. Ask for the right to it, or choose another place.\n"
    assert capsys.readouterr().err == expected
    assert not (source.parent / "out").exists()


def test_disk_that_fills_up_is_said(source, monkeypatch, capsys):
    def fill(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("conversion.model_repo.write_checkpoint", fill)
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(source), str(source.parent / "out")])
    assert main() == 1
    expected = (
        "error: No space left on device. Free some space, or choose another disk; HF_HOME says where downloads go.\n"
    )
    assert capsys.readouterr().err == expected
    assert os.listdir(source.parent) == ["in"]


def test_unconverted_checkpoints_are_told_how_to_convert(source):
    expected = f"{source} is not converted: its model_type is 'aimv2'. If it is an AIMv2 checkpoint, convert it first: "
    with pytest.raises(ValueError, match=re.escape(f"{expected}python {REPO}/convert_weights.py {source} OUTPUT_DIR")):
        require_converted(str(source))
    with pytest.raises(ValueError, match=re.escape(f"{expected}python {REPO}/convert_weights.py {source} OUTPUT_DIR")):
        run(parse_arguments([str(source), "--verify-code"]))
    with pytest.raises(ValueError, match=f"{source.parent} is not converted: it has no config.json"):
        require_converted(str(source.parent))
    run(parse_arguments([str(source), str(source.parent / "out")]))
    assert require_converted(str(source.parent / "out")) is None
