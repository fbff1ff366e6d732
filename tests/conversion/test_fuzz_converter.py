# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Random damage to checkpoints: the converter gives exactly the tensors that are stored, or a clear error and no file.
`pytest --hypothesis-profile thorough --timeout 0` tries many more cases.
"""

import json
import math
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import checkpoints
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from image_text_checkpoints import reference_image_text_model
from PIL import Image
from reference import reference_model
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionConfig, Aimv2VisionModel

from convert_weights import parse_arguments, run


# So small that the header is a good part of the file, and every byte is hit sooner or later.
MODEL = reference_model(hidden_size=8, intermediate_size=4, patch_size=2, image_size=4, is_native=False)
CONFIG = checkpoints.apple_config(MODEL)
IMAGE_TEXT_MODEL = reference_image_text_model(vision={"num_hidden_layers": 1}, projection_dim=4)
IMAGE_TEXT = checkpoints.apple_image_text(IMAGE_TEXT_MODEL)
IMAGE_TEXT_CONFIG = checkpoints.apple_image_text_config(IMAGE_TEXT_MODEL)
FORMATS: dict[str, Callable] = {
    "apple": checkpoints.apple,
    "timm": checkpoints.timm,
    "transformers": checkpoints.transformers,
    "ovis2": lambda model, prefix="": checkpoints.ovis2(model, prefix),
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
# What only `config.json` tells, and what it is when that is silent.
SETTINGS = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "patch_layout": "channels_first",
    "merge_temporal": False,
}
# A case that takes longer is a failure.
BOUNDED = settings(deadline=20_000)

formats = st.sampled_from(sorted(FORMATS))
odd_integers = st.sampled_from([-1, 0, 1, 3, 1 << 31, (1 << 62) - 1, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | odd_integers | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class Stored(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Whatever a header claims, a case that asks for more memory than this fails with a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def checkpoint(checkpoint_format: str, shards: int = 1, prefix: str = "") -> Iterator[Path]:
    """A folder with an intact checkpoint, alone in a temporary folder."""
    with TemporaryDirectory() as folder:
        yield checkpoints.save(Path(folder).resolve() / "in", FORMATS[checkpoint_format](MODEL, prefix), CONFIG, shards)


def read_file(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, read without any code of the converter."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return {
        name: Stored(entry["dtype"], entry["shape"], content[start:][slice(*entry["data_offsets"])])
        for name, entry in json.loads(content[8:start]).items()
        if name != "__metadata__"
    }


def read_folder(folder: Path) -> dict[str, Stored]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_bytes())["weight_map"]
    return {name: read_file(folder / file)[name] for name, file in weight_map.items()}


def write_file(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_tensors(path: Path, tensors: dict[str, Stored]) -> None:
    """A file whose header is true, whatever the tensors."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    write_file(path, json.dumps(header).encode(), data)


def convert_or_refuse(source: Path, checkpoint_format: str, *arguments: str, prefix: str = "") -> dict[str, Any] | None:
    """The configuration of a right output; or `None` when the source is refused with a clear error and no output."""
    output = source.parent / "out"
    before = sorted(os.listdir(source.parent))
    try:
        run(parse_arguments([str(source), str(output), *arguments]))
    except (ValueError, OSError) as error:
        # What `main` prints as an error; one that names neither a file nor the encoder comes from too deep down.
        assert str(source) in str(error) or "AIMv2 vision encoder" in str(error), repr(error)
        assert sorted(os.listdir(source.parent)) == before
        event("refused")
        return None
    assert sorted(os.listdir(source.parent)) == sorted([*before, "out"])
    event("converted")
    return assert_right(source, output, checkpoint_format, prefix)


def assert_right(source: Path, output: Path, checkpoint_format: str, prefix: str) -> dict[str, Any]:
    """`output` holds what `source` holds, byte for byte under the other names, and fits transformers' model."""
    written, stored = read_folder(output), read_folder(source)
    fields = json.loads((output / "config.json").read_bytes())
    config = Aimv2VisionConfig(**fields)
    with torch.device("meta"):
        expected = Aimv2VisionModel(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        name: tuple(parameter.shape) for name, parameter in expected.items()
    }
    state = {
        name: torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).view(tensor.shape)
        for name, tensor in written.items()
    }
    back = FORMATS[checkpoint_format](SimpleNamespace(state_dict=lambda: state, config=config), prefix)
    assert back.keys() == stored.keys()
    for name, tensor in back.items():
        assert DTYPES[stored[name].dtype] == tensor.dtype, name
        assert stored[name].data == tensor.view(torch.uint8).numpy().tobytes(), name
    return config.to_dict()


@given(checkpoint_format=formats, data=st.data())
@BOUNDED
def test_flipped_cut_and_inserted_bytes(checkpoint_format, data):
    with checkpoint(checkpoint_format) as source:
        path = source / "model.safetensors"
        content = bytearray(path.read_bytes())
        data_start = 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, 8) | st.integers(8, data_start) | st.integers(0, len(content)))
            change = data.draw(st.sampled_from(["flip", "cut off", "insert", "remove", "append", "length"]))
            if change == "flip" and at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            elif change == "cut off":
                del content[at:]
            elif change == "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            elif change == "remove":
                del content[at : at + data.draw(st.integers(1, 9))]
            elif change == "append":
                content += data.draw(st.binary(min_size=1, max_size=9))
            elif change == "length":
                length = data.draw(st.integers(0, 2 * data_start) | st.integers(0, (1 << 64) - 1))
                content[:8] = struct.pack("<Q", length)
        path.write_bytes(content)
        convert_or_refuse(source, checkpoint_format)


@given(checkpoint_format=formats, data=st.data(), shards=st.sampled_from([1, 2]))
@BOUNDED
def test_flipped_values_are_converted_as_they_are(checkpoint_format, data, shards):
    with checkpoint(checkpoint_format, shards) as source:
        path = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
        content = bytearray(path.read_bytes())
        data_start = 8 + struct.unpack("<Q", content[:8])[0]
        for at in data.draw(st.lists(st.integers(data_start, len(content) - 1), min_size=1, max_size=20)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        assert convert_or_refuse(
            source, checkpoint_format, "--max-shard-size", data.draw(st.sampled_from(["5GB", "1KB"]))
        )


@given(checkpoint_format=formats, data=st.data())
@BOUNDED
def test_headers_that_lie(checkpoint_format, data):
    with checkpoint(checkpoint_format) as source:
        path = source / "model.safetensors"
        content = path.read_bytes()
        data_start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:data_start])
        entries = list(header.items())
        for _ in range(data.draw(st.integers(1, 3))):
            index = data.draw(st.integers(0, len(entries) - 1))
            name, entry = entries[index]
            change = data.draw(st.sampled_from(["offsets", "shape", "dtype", "entry", "name", "repeat", "drop", "add"]))
            if change == "offsets" and isinstance(entry, dict):
                offset = st.integers(0, len(content)) | odd_integers | json_values
                entry = entry | {"data_offsets": data.draw(st.lists(offset, min_size=2, max_size=2) | json_values)}
            elif change == "shape" and isinstance(entry, dict):
                length = st.sampled_from([2, 4, 8]) | odd_integers | json_values
                entry = entry | {"shape": data.draw(st.lists(length, max_size=4) | json_values)}
            elif change == "dtype" and isinstance(entry, dict):
                entry = entry | {"dtype": data.draw(st.sampled_from(sorted(ITEM_BYTES)) | json_values)}
            elif change == "entry":
                entry = data.draw(json_values)
            elif change == "name":
                name = data.draw(st.text(max_size=5) | st.sampled_from(["__metadata__", name + ".weight"]))
            elif change == "repeat":
                entries.append((name, entry))
            elif change == "add":
                entries.append((data.draw(st.text(max_size=5)), entry))
            entries[index : index + 1] = [] if change == "drop" and len(entries) > 1 else [(name, entry)]
        pairs = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries)
        write_file(path, "{{{}}}".format(",".join(pairs)).encode(), content[data_start:])
        convert_or_refuse(source, checkpoint_format)


@given(checkpoint_format=formats, data=st.data(), configured=st.booleans())
@BOUNDED
def test_true_headers_of_other_tensors(checkpoint_format, data, configured):
    with checkpoint(checkpoint_format) as source:
        path = source / "model.safetensors"
        tensors = read_file(path)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(tensors)))
            change = data.draw(st.sampled_from(["shape", "empty", "dtype", "copy", "rename", "swap", "drop"]))
            tensor = tensors[name]
            if change == "shape":
                shape = data.draw(st.permutations(tensor.shape)) + data.draw(st.lists(st.just(1), max_size=2))
                tensors[name] = tensor._replace(shape=data.draw(st.sampled_from([shape, shape[::-1]])))
            elif change == "empty":
                shape = data.draw(st.lists(odd_integers.filter(lambda x: 0 <= x < 1 << 64), max_size=4))
                tensors[name] = Stored(tensor.dtype, [*shape, 0][:: data.draw(st.sampled_from([1, -1]))], b"")
            elif change == "dtype":
                dtype = data.draw(st.sampled_from(sorted(ITEM_BYTES)))
                tensors[name] = Stored(dtype, tensor.shape, bytes(math.prod(tensor.shape) * ITEM_BYTES[dtype]))
            elif change == "drop" and len(tensors) > 1:
                del tensors[name]
            else:
                other = data.draw(
                    st.sampled_from(sorted(tensors))
                    | st.sampled_from([name.replace("0", "1"), name.replace("1", "2"), "tower." + name])
                    | st.text(max_size=5)
                )
                tensors[other], replaced = tensor, tensors.get(other, tensor)
                if change == "swap":
                    tensors[name] = replaced
                elif change == "rename" and other != name:
                    del tensors[name]
        write_tensors(path, tensors)
        if not configured:
            (source / "config.json").unlink()
        convert_or_refuse(source, checkpoint_format)


@given(data=st.data(), configured=st.booleans())
@BOUNDED
def test_image_text_checkpoints_of_other_tensors(data, configured):
    """What is damaged is refused; what is converted holds every tensor, and transformers' model takes them all."""
    with TemporaryDirectory() as temporary:
        source = checkpoints.save(Path(temporary).resolve() / "in", IMAGE_TEXT, IMAGE_TEXT_CONFIG)
        path, output = source / "model.safetensors", source.parent / "out"
        tensors = read_file(path)
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from([name for name in sorted(tensors) if "image_encoder" not in name]))
            change = data.draw(st.sampled_from(["shape", "empty", "dtype", "drop", "rename"]))
            tensor = tensors[name]
            if change == "shape":
                tensors[name] = tensor._replace(shape=[*data.draw(st.permutations(tensor.shape)), 1][::-1])
            elif change == "empty":
                shape = data.draw(st.lists(odd_integers.filter(lambda x: 0 <= x < 1 << 64), max_size=3))
                tensors[name] = Stored(tensor.dtype, [*shape, 0][:: data.draw(st.sampled_from([1, -1]))], b"")
            elif change == "dtype":
                dtype = data.draw(st.sampled_from(sorted(ITEM_BYTES)))
                tensors[name] = Stored(dtype, tensor.shape, bytes(math.prod(tensor.shape) * ITEM_BYTES[dtype]))
            else:
                del tensors[name]
                if change == "rename":
                    tensors[data.draw(st.sampled_from([name.replace("0", "1"), name + ".x"]))] = tensor
        write_tensors(path, tensors)
        if configured:
            fields = IMAGE_TEXT_CONFIG["text_config"] | data.draw(
                st.dictionaries(st.sampled_from(sorted(IMAGE_TEXT_CONFIG["text_config"])), json_values, max_size=2)
            )
            (source / "config.json").write_text(json.dumps(IMAGE_TEXT_CONFIG | {"text_config": fields}))
        try:
            run(parse_arguments([str(source), str(output)]))
        except (ValueError, OSError) as error:
            assert str(source) in str(error) or "AIMv2 vision encoder" in str(error), repr(error)
            assert os.listdir(source.parent) == ["in"]
            event("refused")
            return
        written = read_file(output / "model.safetensors")
        if "visual_projection.weight" in written:
            event("image and text")
            config = Aimv2Config(**json.loads((output / "config.json").read_bytes()))
            with torch.device("meta"):
                expected = Aimv2Model(config).state_dict()
            assert {k: tuple(x.shape) for k, x in written.items()} == {k: tuple(x.shape) for k, x in expected.items()}
            assert sum(len(x.data) for x in written.values()) == sum(len(x.data) for x in tensors.values())
        else:
            assert not {"image_projector.weight", "log_logit_scale"} & tensors.keys()


@given(checkpoint_format=formats, data=st.data())
@BOUNDED
def test_indexes_and_links_that_lie(checkpoint_format, data):
    with checkpoint(checkpoint_format, shards=2) as source:
        index = source / "model.safetensors.index.json"
        fields = json.loads(index.read_bytes())
        weight_map = fields["weight_map"]
        shards = sorted(set(weight_map.values()))
        (source.parent / "secret.safetensors").write_bytes((source / shards[0]).read_bytes())
        for _ in range(data.draw(st.integers(1, 2))):
            name, shard = data.draw(st.sampled_from(sorted(weight_map))), source / data.draw(st.sampled_from(shards))
            change = data.draw(st.sampled_from(["file", "value", "name", "drop", "map", "link", "folder", "bytes"]))
            if change == "file":
                hostile = ["../secret.safetensors", str(source.parent / "secret.safetensors"), "", ".", "..", "\0"]
                hostile += ["x" * 300 + ".safetensors", "a\0.safetensors", "\ud800.safetensors", "./" + shards[0]]
                old, new = data.draw(st.sampled_from(shards)), data.draw(st.sampled_from(hostile) | st.text(max_size=9))
                weight_map = {key: new if value == old else value for key, value in weight_map.items()}
            elif change == "value":
                weight_map[name] = data.draw(st.sampled_from(shards) | json_values)
            elif change == "name":
                weight_map[data.draw(st.text(max_size=5))] = weight_map[name]
            elif change == "drop" and len(weight_map) > 1:
                del weight_map[name]
            elif change == "map":
                fields = data.draw(st.sampled_from([weight_map, {"weight_map": [weight_map]}, [fields]]) | json_values)
            elif change in ("link", "folder") and shard.is_file():
                shard.unlink()
                if change == "folder":
                    shard.mkdir()
                else:
                    targets = [shard.name, shards[0], shards[1], "nowhere", "..", "../secret.safetensors", "/dev/zero"]
                    shard.symlink_to(data.draw(st.sampled_from(targets)))
            elif change == "bytes" and shard.is_file():
                content = bytearray(shard.read_bytes())
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
                shard.write_bytes(content)
        if isinstance(fields, dict) and isinstance(fields.get("weight_map"), dict):
            fields["weight_map"] = weight_map
        index.write_text(json.dumps(fields))
        convert_or_refuse(source, checkpoint_format)


@given(checkpoint_format=formats, data=st.data(), nested=st.booleans())
@BOUNDED
def test_source_configurations(checkpoint_format, data, nested):
    prefix = "tower." if nested else ""
    with checkpoint(checkpoint_format, prefix=prefix) as source:
        fields = CONFIG | {"model_type": data.draw(st.sampled_from(["aimv2", "aimv2_vision_model", "aimv2_packing"]))}
        names = st.sampled_from([*CONFIG, *SETTINGS, "use_head", "is_native", "image_size"]) | st.text(max_size=5)
        values = json_values | st.sampled_from([0.5, 2, 4, 8, "gelu", "channels_last"])
        fields |= data.draw(st.dictionaries(names, values, max_size=3))
        for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
            fields.pop(name, None)
        whole = {"vision_config": fields} | data.draw(st.dictionaries(st.text(max_size=5), json_values, max_size=2))
        (source / "config.json").write_text(json.dumps(whole if nested else fields))
        written = convert_or_refuse(source, checkpoint_format, prefix=prefix)
        if written and not nested:
            for name, default in SETTINGS.items():
                assert written.get(name, default) == fields.get(name, default), name


@given(data=st.data())
@BOUNDED
def test_files_beside_the_weights(data):
    """`config.json` and the card as bytes: only the first may stop a conversion."""
    with checkpoint("transformers") as source:
        content = (source / "config.json").read_bytes()
        junk = st.binary(max_size=20)
        deep = st.builds(
            lambda depth, part: (part * depth).encode(), st.integers(0, 2000), st.sampled_from(["[", '{"a":'])
        )
        cut = st.builds(lambda at, middle: content[:at] + middle + content[at:], st.integers(0, len(content)), junk)
        if data.draw(st.booleans()):
            (source / "config.json").write_bytes(data.draw(cut | junk | deep))
            convert_or_refuse(source, "transformers")
            return
        line = st.sampled_from(
            ["license: mit", "license: *a", "license_name: &a [x]", "license: 2020-01-01", "a: b: c"]
        )
        lines = st.lists(line | st.text(st.characters(codec="utf-8"), max_size=9), max_size=5).map(
            lambda lines: "\n".join(["---", *lines, "---"]).encode()
        )
        (source / "README.md").write_bytes(data.draw(lines | junk | deep))
        assert convert_or_refuse(source, "transformers")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    run(parse_arguments([str(checkpoints.save(folder / "in", checkpoints.apple(MODEL), CONFIG)), str(folder / "out")]))
    Image.new("RGB", (4, 4), "gray").save(folder / "image.png")
    return folder / "out"


@given(data=st.data())
@BOUNDED
def test_verifying_what_is_damaged(converted, data):
    """Damage to a converted repo is refused, or reported: the weights are said to be equal if and only if they are."""
    with TemporaryDirectory() as temporary:
        folder = shutil.copytree(converted, Path(temporary) / "out")
        damaged = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
        if damaged.name == "config.json":
            fields = json.loads(damaged.read_bytes())
            names = st.sampled_from([*fields, *SETTINGS, "to_dict", "torch_dtype"])
            fields |= data.draw(st.dictionaries(names, json_values | st.sampled_from([0.5, "gelu", "nn"]), max_size=2))
            damaged.write_text(json.dumps(fields))
        else:
            content = bytearray(damaged.read_bytes())
            for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            damaged.write_bytes(content)
        arguments = [str(folder), "--verify", "--reference", str(converted.parent / "in")]
        images, report = converted.parent / "image.png", folder / "report.json"
        try:
            run(parse_arguments([*arguments, "--images", str(images), "--report", str(report)]))
        except (ValueError, OSError) as error:
            assert str(folder) in str(error) or "AIMv2 vision encoder" in str(error), repr(error)
        if report.exists():
            equal = read_folder(folder) == read_folder(converted)
            assert json.loads(report.read_bytes())["identical_weights"] == equal
