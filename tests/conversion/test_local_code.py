# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The clone's own code: one class each for all who load it; its types, as the package that the files become."""

import dis
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest
from image_text_checkpoints import Aimv2PackingImageTextConfig, Aimv2PackingImageTextModel
from reference import REPO, Aimv2PackingConfig, Aimv2PackingModel, hub_module

from conversion import checkpoint_formats, features, image_text, verification
from conversion.code_files import copy_code
from conversion.local_code import local_class


# What is appended to the modeling file, and what the checker has to say.
WRONG_CALLS = [
    (
        "from .layout_aimv2_packing import validate_hidden_states\nvalidate_hidden_states(None)\n",
        'Missing positional argument "config" in call to "validate_hidden_states"',
    ),
    (
        "from .layout_aimv2_packing import PackedLayout\nPackedLayout.no_such_field\n",
        '"type[PackedLayout]" has no attribute "no_such_field"',
    ),
]


def test_all_who_load_this_clone_share_its_classes():
    classes = [module.Aimv2PackingConfig for module in (checkpoint_formats, features, verification)]
    assert {*classes, Aimv2PackingModel.config_class, hub_module("layout").Aimv2PackingConfig} == {Aimv2PackingConfig}
    classes = [module.Aimv2PackingImageTextConfig for module in (image_text, verification)]
    assert {*classes, Aimv2PackingImageTextModel.config_class} == {Aimv2PackingImageTextConfig}
    assert local_class("modeling_aimv2_packing.Aimv2PackingModel") is Aimv2PackingModel
    assert issubclass(Aimv2PackingImageTextModel, hub_module("modeling").Aimv2PackingPreTrainedModel)


@pytest.fixture(scope="module")
def checked_package(tmp_path_factory) -> Path:
    pytest.importorskip("mypy", reason="needs requirements-dev.txt")
    folder = tmp_path_factory.mktemp("types") / "aimv2_packing"
    folder.mkdir()
    copy_code(folder)
    return folder


def check_types(package: Path) -> str:
    """What mypy says of a package by the settings of this repo; a second run reads what the first has kept."""
    settings = ["--config-file", str(REPO / "pyproject.toml"), "--cache-dir", str(package.parent / "cache")]
    command = [sys.executable, "-m", "mypy", *settings, "--package", package.name]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False).stdout


def test_the_package_is_sound(checked_package):
    number = len(list(checked_package.glob("*.py")))
    outcome = re.fullmatch(r"Success: no issues found in (\d+) source files\n", said := check_types(checked_package))
    assert outcome, said
    assert int(outcome.group(1)) >= number


@pytest.mark.parametrize(("lines", "complaint"), WRONG_CALLS)
def test_a_wrong_call_between_the_files_is_refused(lines, complaint, checked_package):
    file = checked_package / "modeling_aimv2_packing.py"
    sound = file.read_text()
    file.write_text(f"{sound}\n\n{lines}")
    try:
        said = check_types(checked_package)
    finally:
        file.write_text(sound)
    assert complaint in said


def names_shared(code: CodeType) -> set[str]:
    """The names that a comprehension has for itself, and a closure beside it shares; from 3.12 on it is inlined."""
    parts = [part for part in code.co_consts if isinstance(part, CodeType)]
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_FAST_AND_CLEAR"}
    own.update(*(part.co_varnames for part in parts if part.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>")))
    return (own & set(code.co_cellvars)).union(*map(names_shared, parts))


@pytest.mark.parametrize("path", sorted(REPO.glob("*_aimv2_packing.py")), ids=lambda path: path.name)
def test_comprehensions_share_no_name_with_a_closure(path):
    """CPython 3.13.0 crashes where a tracer or debugger reads the locals of one that does (gh-128396)."""
    assert names_shared(compile(path.read_text(), path.name, "exec")) == set()
