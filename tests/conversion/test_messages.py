# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What others chose forges nothing on a terminal or in a list, and no password is printed."""

import ast
import errno
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import checkpoints
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import REPO, reference_model

from conversion.messages import next_step, printable, printable_lines, without_credentials
from convert_weights import main


def is_safe(text: str) -> bool:
    return not any(unicodedata.category(x) in ("Cc", "Cf", "Cs", "Zl", "Zp") for x in text)


@given(st.text())
def test_names_stay_on_one_line_and_can_be_read_back(name):
    shown = printable(name)
    assert is_safe(shown)
    assert shown == name or ast.literal_eval(shown) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.jpg", "cat.jpg"),
        ("größe 猫.jpg", "größe 猫.jpg"),
        ("a\nb", r"'a\nb'"),
        ("\x1b[2Jok", r"'\x1b[2Jok'"),
        ("a\u202egpj.exe", r"'a\u202egpj.exe'"),
        (b"\xff.jpg", r"'\udcff.jpg'"),
        (Path("a\rb"), r"'a\rb'"),
        (3, "3"),
    ],
)
def test_names(name, expected):
    assert printable(name) == expected


@given(st.text())
def test_messages_keep_their_lines(text):
    shown = printable_lines(text)
    assert all(is_safe(line) for line in shown.split("\n")) and shown.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://alice:secret@example.org/a/b.git", "https://example.org/a/b.git"),
        ("https://example.org/a?token=secret#secret", "https://example.org/a"),
        ("https://secret@secret@example.org:8080", "https://example.org:8080"),
        ("for url 'http://u:secret@h/x?sig=secret': no", "for url 'http://h/x': no"),
        ("git@example.org:a/b.git", "git@example.org:a/b.git"),
        ("no address, is it?", "no address, is it?"),
    ],
)
def test_credentials_are_left_out(text, expected):
    assert without_credentials(text) == expected


def test_next_steps_are_for_what_a_user_can_put_right():
    assert next_step(OSError(errno.ENOSPC, "full")) == "free some space, or choose another disk"
    assert next_step(OSError(errno.EBADF, "bad")) is None
    assert next_step(OSError("no number")) is None and next_step(ValueError("no")) is None


@pytest.mark.parametrize("kind", ["left over", "prefix", "missing", "none"])
def test_names_of_tensors_forge_no_line_of_an_error(tmp_path, monkeypatch, capsys, kind):
    model, forged = reference_model(hidden_size=128), "\nVerdict: passed.\n\x1b[2J"
    tensors = checkpoints.apple(model, forged + "." if kind in ("prefix", "missing") else "")
    if kind == "left over":
        tensors["trunk." + forged] = torch.ones(1)
    if kind == "missing":
        del tensors[f"{forged}.trunk.post_trunk_norm.weight"]
    if kind == "prefix":
        tensors |= {name.replace("passed", "PASSED"): tensor.clone() for name, tensor in tensors.items()}
    if kind == "none":
        tensors = {forged: torch.ones(1)}
    source = checkpoints.save(tmp_path / "in", tensors)
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(source), str(tmp_path / "out")])
    assert main() == 1
    printed = capsys.readouterr().err
    assert "erdict" in printed and all(line.isprintable() for line in printed.splitlines())
    assert not any(line.startswith("Verdict") for line in printed.splitlines())


def test_files_in_an_index_forge_no_line_either(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a\\nVerdict: passed.bin"}}')
    monkeypatch.setattr("sys.argv", ["convert_weights.py", str(tmp_path), str(tmp_path / "out")])
    assert main() == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "erdict" in printed and "pickle" in printed


def test_a_conversion_is_made_whoever_listens(tmp_path):
    """Whose name the output's encoding lacks, and whose reader has left before the verdict."""
    source, output = (
        checkpoints.save(tmp_path / "in", checkpoints.apple(reference_model(hidden_size=128))),
        tmp_path / "größe",
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(REPO / "convert_weights.py"), str(source), str(output)]
    PIL.Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    verified = ["--overwrite", "--verify", "--images", str(tmp_path / "a.png")]
    for options, listener in (([], writing), (verified, writing), (["--overwrite"], None)):
        result = subprocess.run(
            [*command, *options],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            stdout=subprocess.PIPE if listener is None else listener,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert rb"to " + ascii(str(output))[1:-1].encode() in result.stdout
    assert (output / "model.safetensors").is_file()
