# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""`examples/finetune.py`: what it reaches, going on after a kill, and two processes against one."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("accelerate", reason="needs requirements-scale.txt")

import PIL.Image
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo
from reference import REPO
from safetensors.torch import load_file
from scaling import assert_tensors_close, make_model_repo, run_processes
from transformers import AutoModel, AutoProcessor


SCRIPT = REPO / "examples/finetune.py"
SHORT = ("--steps", 24, "--save-steps", 12)


def start(output: Path, *options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--output", str(output), *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen) -> str:
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed
    return printed


def losses(output: Path) -> list[float]:
    state = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])) / "trainer_state.json"
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """In one process, with the gradients of two batches per step."""
    output = tmp_path_factory.mktemp("one")
    return output, finish(start(output, *SHORT, "--gradient-accumulation-steps", 2))


def test_it_learns(one_process: tuple[Path, str]) -> None:
    output, printed = one_process
    assert losses(output)[-1] < losses(output)[0]
    assert re.search(r"accuracy on 359 images: 0\.\d{3}", printed)


def test_a_finished_run_does_nothing(one_process: tuple[Path, str]) -> None:
    output, _ = one_process
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "has finished its 24 steps" in finish(start(output, *SHORT))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize("kind", ["fixed with a head", "image-text"])
def test_images_of_ones_own_and_a_model_repo_to_load(tmp_path: Path, kind: str) -> None:
    checkpoint, images, output = tmp_path / "checkpoint", tmp_path / "images", tmp_path / "output"
    if kind == "image-text":
        save_image_text_repo(checkpoint, reference_image_text_model(), tokenizer=False)
    else:
        make_model_repo(checkpoint, is_native=False, use_head=True)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text()) | {"image_size": 28}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    for name in ("cat", "dog", "tree"):
        (images / name / "more").mkdir(parents=True)
        for index in range(6):
            image = PIL.Image.effect_noise((30 + 9 * index, 40), 50)
            image.save(images / name / ("more" if index % 2 else ".") / f"{index}.png")
    options = ("--steps", 2, "--images", images, "--checkpoint", checkpoint)
    assert "accuracy on 3 images" in finish(start(output, *options))

    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert list(model.config.id2label.values()) == ["cat", "dog", "tree"] and processor.image_size == 28
    weights, original = load_file(output / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    original = {name.removeprefix("vision_model."): value for name, value in original.items()}
    assert weights["classifier.weight"].shape == (3, model.config.hidden_size)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"vision_model.{name}"])
    scale = original["head.output_proj.weight"].std()
    moved = (weights["vision_model.head.output_proj.weight"] - original["head.output_proj.weight"]).abs().max()
    assert 0 < moved < scale, "it begins with the checkpoint and learns"
    inputs = processor(str(images / "cat" / "0.png"), return_tensors="pt")
    assert model(**inputs).pooler_output.isfinite().all()


def test_killed_run_goes_on_to_the_same_weights(one_process: tuple[Path, str], tmp_path: Path) -> None:
    arguments = (tmp_path, *SHORT, "--gradient-accumulation-steps", 2)
    run, state, end = start(*arguments), tmp_path / "checkpoint-12" / "trainer_state.json", time.monotonic() + 300
    # The last file of a checkpoint is there, and whole.
    while not state.exists() or not state.read_text().endswith("}\n"):
        assert run.poll() is None and time.monotonic() < end, run.communicate(timeout=60)[0]
        time.sleep(0.05)
    run.kill()
    run.communicate()
    # And what a kill leaves while a checkpoint is written, at two moments.
    for step, text in ((18, None), (20, "{")):
        cut = shutil.copytree(state.parent, tmp_path / f"checkpoint-{step}")
        (cut / state.name).unlink()
        if text:
            (cut / state.name).write_text(text)
    finish(start(*arguments))
    expected = load_file(one_process[0] / "model.safetensors")
    assert_tensors_close(load_file(tmp_path / "model.safetensors"), expected, 1e-6)


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_two_processes_take_the_same_steps(one_process: tuple[Path, str], tmp_path: Path, options: tuple) -> None:
    run_processes(SCRIPT, "--output", tmp_path, *SHORT, *options, timeout=300)
    assert losses(tmp_path) == pytest.approx(losses(one_process[0]), rel=1e-3)
    expected = load_file(one_process[0] / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()


def test_a_run_goes_on_with_what_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    finetune = importlib.import_module("finetune")
    start, begun = tmp_path / "initial", {"checkpoint": None, "classes": ["cat", "dog"]}
    finetune.make_start(start, None, {"num_labels": 2}, begun)
    finetune.check_start(start, begun)
    monkeypatch.chdir(tmp_path)
    assert finetune.source_of("./initial") == finetune.source_of(str(start)) == str(start)
    assert finetune.source_of("USER/model") == "USER/model" and finetune.source_of(None) is None
    for changed in ({"checkpoint": "other"}, {"classes": ["cat", "tree"]}, {"classes": ["cat", "dog", "tree"]}):
        with pytest.raises(
            ValueError, match=f"was begun with something else .{next(iter(changed))} is .*another --output"
        ):
            finetune.check_start(start, begun | changed)
