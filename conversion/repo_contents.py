# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether a repo holds what the converter writes and nothing else. What is known is allowed, and the rest refused: a
library may read a file, or a field of one, that nobody here has heard of.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .code_files import REPO, sha256
from .messages import printable
from .repo_kinds import CONVERTED_TYPES, PROCESSOR, TOKENIZER_FILES, RepoKind, repo_kind
from .safetensors_files import INDEX_NAME, read_json_value


# What git and the Hub's client put into a folder, and no library reads from it.
GIT_FILES = {".gitattributes", ".gitignore"}
TOOL_FOLDERS = {".git", ".cache"}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
LICENCE = re.compile(r"(licen[cs]e|copying|notice)([-_][a-z0-9]+)*(\.(txt|md))?", re.IGNORECASE)


class Exactly(NamedTuple):
    """The one value that a file or a field may hold."""

    value: Any


class Names(NamedTuple):
    """The classes that an `auto_map` may name, any of these."""

    values: tuple[dict[str, Any], ...]


# What a value may be: a type (`object`: any JSON), a pattern of whole strings, `Exactly` one, one of a tuple, a list of
# such values, or an object of such fields, in which `ANY` stands for all names that are not listed.
ANY = ""
NUMBER = (int, float)
DTYPE = re.compile("float32|float64|float16|bfloat16")
VERSION = re.compile(r"[0-9A-Za-z.+]{1,40}")
WORD = re.compile(r"[A-Za-z0-9_]{1,60}")
LAYER_FIELDS = {
    "attention_dropout": NUMBER,
    "dtype": DTYPE,
    "hidden_act": WORD,
    "hidden_size": int,
    "initializer_range": NUMBER,
    "intermediate_size": int,
    "mlp_bias": bool,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "qkv_bias": bool,
    "rms_norm_eps": NUMBER,
}
VISION_FIELDS = {
    **LAYER_FIELDS,
    "image_size": int,
    "is_native": bool,
    "merge_temporal": bool,
    "model_type": Exactly(CONVERTED_TYPES[0]),
    "num_channels": int,
    "patch_layout": re.compile("channels_(first|last)"),
    "patch_size": int,
    "use_head": bool,
}
TEXT_FIELDS = {
    **LAYER_FIELDS,
    "eos_token_id": int,
    "max_position_embeddings": int,
    "model_type": Exactly("aimv2_text_model"),
    "vocab_size": int,
}
IMAGE_TEXT_FIELDS = {
    "dtype": DTYPE,
    "initializer_factor": NUMBER,
    "logit_scale_init_value": NUMBER,
    "max_logit_scale": NUMBER,
    "model_type": Exactly(CONVERTED_TYPES[1]),
    "projection_dim": int,
    "text_config": TEXT_FIELDS,
    "vision_config": VISION_FIELDS,
}
IMAGE_PROCESSOR_FIELDS = {
    "allow_urls": bool,
    "do_convert_rgb": bool,
    "do_normalize": bool,
    "do_rescale": bool,
    "do_resize": bool,
    "image_mean": [NUMBER],
    "image_processor_type": re.compile("Aimv2PackingImageProcessor(Pil)?"),
    "image_size": (int, Exactly(None)),
    "image_std": [NUMBER],
    "max_image_pixels": int,
    "max_patches": int,
    "merge_size": int,
    "min_patches": int,
    "patch_layout": re.compile("channels_(first|last)"),
    "patch_size": int,
    "resample": int,
    "rescale_factor": NUMBER,
    "temporal_patch_size": int,
}
TOKEN = (
    str,
    Exactly(None),
    {
        "__type": Exactly("AddedToken"),
        "content": str,
        "id": int,
        "lstrip": bool,
        "normalized": bool,
        "rstrip": bool,
        "single_word": bool,
        "special": bool,
    },
)
SPECIAL_TOKENS = {f"{name}_token": TOKEN for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk")}
TOKENIZER_FIELDS = {
    **SPECIAL_TOKENS,
    "add_bos_token": bool,
    "add_eos_token": bool,
    "add_prefix_space": bool,
    "auto_map": Names((PROCESSOR["auto_map"],)),
    "added_tokens_decoder": {ANY: TOKEN},
    "additional_special_tokens": [TOKEN],
    "backend": Exactly("tokenizers"),
    "clean_up_tokenization_spaces": bool,
    "do_lower_case": bool,
    "errors": WORD,
    "extra_special_tokens": ([TOKEN], {ANY: TOKEN}),
    "is_local": bool,
    "local_files_only": bool,
    "max_length": (int, Exactly(None)),
    "model_input_names": [WORD],
    "model_max_length": NUMBER,
    "pad_to_multiple_of": (int, Exactly(None)),
    "processor_class": Exactly(PROCESSOR["processor_class"]),
    "padding_side": re.compile("left|right"),
    "tokenizer_class": WORD,
    "truncation_side": re.compile("left|right"),
}
TOKENIZER_PARTS = ("decoder", "model", "normalizer", "padding", "post_processor", "pre_tokenizer", "truncation")
TEXT_FILES = {
    # Read by the library tokenizers, which knows no reference to another file or to code.
    "tokenizer.json": {**dict.fromkeys(TOKENIZER_PARTS, object), "added_tokens": [TOKEN], "version": VERSION},
    "tokenizer_config.json": TOKENIZER_FIELDS,
    "special_tokens_map.json": {**SPECIAL_TOKENS, "additional_special_tokens": [TOKEN]},
    "vocab.json": {ANY: int},
}


@cache
def json_schemas(kind: RepoKind) -> dict[str, Any]:
    """What the JSON files of a repo of this kind may hold, by name."""
    images = kind.image_processor["auto_map"]
    image_processor = {**IMAGE_PROCESSOR_FIELDS, "auto_map": Names((images, images | PROCESSOR["auto_map"]))}
    schemas: dict[str, Any] = {
        "config.json": {
            **(IMAGE_TEXT_FIELDS if kind.image_text else VISION_FIELDS),
            "architectures": Exactly(kind.architectures),
            "auto_map": Names((kind.auto_map,)),
            "transformers_version": VERSION,
        },
        "preprocessor_config.json": image_processor,
        INDEX_NAME: {"metadata": {"total_size": int, "total_parameters": int}, "weight_map": {ANY: WEIGHTS}},
        **{name: Exactly(content) for name, content in kind.sentence_transformers.items()},
    }
    if kind.image_text:
        processor = {
            name: Names((value,)) if name == "auto_map" else Exactly(value) for name, value in PROCESSOR.items()
        }
        schemas["processor_config.json"] = {**processor, "image_processor": image_processor}
        schemas |= TEXT_FILES
    return schemas


def is_written(name: str, kind: RepoKind) -> bool:
    """Whether the converter writes a file of this name into a repo of this kind."""
    texts = TOKENIZER_FILES if kind.image_text else ()
    licence = name.removeprefix("WEIGHTS_")
    return (
        name in ("README.md", "LICENSE", *texts, *json_schemas(kind))
        or name in {path.name for path in kind.code_files}
        or WEIGHTS.fullmatch(name) is not None
        or (licence != name and LICENCE.fullmatch(licence) is not None)
    )


def file_names(folder: Path) -> list[str]:
    """All files of a folder, links included, without what git and the Hub's client put there."""
    names, pending = [], [folder]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                pending += [] if name in TOOL_FOLDERS else [path]
            elif name not in GIT_FILES:
                names.append(name)
    return sorted(names)


def repo_differences(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """
    How `folder` differs from what the converter writes: in code, file by file, in what its JSON files hold, and in
    files that it does not write. A line each; none where there is nothing. Nothing of `folder` is run.

    Args:
        folder (`Path`): A converted repo, or as much of it as is code and JSON.
        names (iterable of `str`, *optional*): All its files, by default those in `folder`.

    Raises:
        ValueError: a JSON file cannot be read.
    """
    kind, found = repo_kind(folder), sorted(file_names(folder) if names is None else set(names) - GIT_FILES)
    code = {path.name: path for path in kind.code_files}
    lines = [f"{name} is missing" for name in code if name not in found]
    for name in found:
        if not is_written(name, kind):
            is_code = name.endswith(".py") and not (REPO / name).is_file()
            lines.append(f"{printable(name)} is not in this tree" if is_code else foreign(name))
        elif name in code and not (folder / name).is_file():
            lines.append(f"{name} is no regular file")
        elif name in code and sha256(folder / name) != sha256(code[name]):
            lines.append(f"{name} differs")
    return lines + json_differences(folder, found)


def json_differences(folder: Path, names: Iterable[str]) -> list[str]:
    """
    How those of the JSON files called `names` that the converter writes differ from what it writes, a line each.

    Raises:
        ValueError: one of them cannot be read.
    """
    schemas = json_schemas(repo_kind(folder))
    present = [name for name in schemas if name in set(names)]
    return [line for name in present for line in mismatches(read_json_value(folder / name), schemas[name], name)]


def foreign(name: str) -> str:
    return f"{printable(name)} is no file that the converter writes"


def changes_code_only(differences: Iterable[str]) -> bool:
    """Whether these lines of [`repo_differences`] are about the contents of Python files and nothing else."""
    return all(re.fullmatch(r"\w+\.py (differs|is missing)", line) for line in differences)


def mismatches(value: Any, schema: Any, where: str) -> Iterator[str]:
    """How `value`, at `where`, is not what `schema` allows."""
    if isinstance(schema, Names):
        yield from foreign_names(value, schema, where)
    elif isinstance(schema, Exactly):
        if value != schema.value or type(value) is not type(schema.value):
            yield f"{where} is not what the converter writes"
    elif isinstance(schema, tuple):
        if all(any(True for _ in mismatches(value, choice, where)) for choice in schema):
            yield f"{where} holds {shortened(value)}"
    elif isinstance(schema, dict) and isinstance(value, dict):
        for name, inner in value.items():
            if name in schema or ANY in schema:
                yield from mismatches(inner, schema.get(name, schema.get(ANY)), f"{where}, {printable(name)}")
            else:
                yield f"{where} has the field {printable(name)}, which the converter does not write"
    elif isinstance(schema, list) and isinstance(value, list):
        for inner in value:
            yield from mismatches(inner, schema[0], where)
    elif isinstance(schema, re.Pattern) and isinstance(value, str):
        if not schema.fullmatch(value):
            yield f"{where} holds {shortened(value)}"
    elif schema is not object and type(value) is not schema:
        yield f"{where} holds {shortened(value)}"


def foreign_names(value: Any, allowed: Names, where: str) -> Iterator[str]:
    if value in allowed.values:
        return
    known = {name for auto_map in allowed.values for name in flat(auto_map)}
    if unknown := sorted(set(flat(value)) - known):
        where = where.removesuffix(", auto_map")
        yield from (f"{where} names {printable(name)}, which is not in this tree" for name in unknown)
    else:
        yield f"{where} is not what the converter writes"


def flat(auto_map: Any) -> list[str]:
    """The names in an `auto_map`: a class may stand for itself, or be one of a pair."""
    named = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    return [name for each in named for name in (each if isinstance(each, list) else [each]) if isinstance(name, str)]


def shortened(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
