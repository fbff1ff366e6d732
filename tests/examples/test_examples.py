# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user runs it, on every kind of checkpoint, and ends in one line where it cannot."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo
from reference import REPO, reference_model
from safetensors.torch import load_file
from scaling import make_model_repo


EXAMPLES = REPO / "examples"
PHOTOGRAPHS = EXAMPLES / "photographs"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder; gives its exit status, or its last message, and all that it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        status: object = 0
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run_example


@pytest.fixture
def example(monkeypatch):
    """The module of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="module", params=["native", "fixed", "fixed with a head", "image-text"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    if request.param == "image-text":
        return save_image_text_repo(folder, reference_image_text_model(), tokenizer=False)
    is_native, use_head = request.param == "native", request.param.endswith("head")
    make_model_repo(folder, is_native=is_native, use_head=use_head)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"max_patches": 200} if is_native else {"image_size": 56}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_first_features(run, checkpoint):
    status, printed, _ = run("feature_extraction", "--checkpoint", checkpoint, PHOTOGRAPHS / "cat.jpg")
    assert status == 0
    config = json.loads((checkpoint / "config.json").read_text())
    has_head = config.get("vision_config", config)["use_head"]
    assert "cat.jpg: map (1, " in printed and ("the head's output: (1, 64)" in printed) == has_head


def test_without_a_checkpoint(run):
    status, printed, said = run("feature_extraction")
    assert said == "No --checkpoint: the weights are random, and what follows says nothing of AIMv2.\n"
    assert status == 0 and "cat.jpg: map (1, 21, 32, 256), mean (256,)" in printed


def test_features_of_a_folder_are_those_of_each_image(run, example, checkpoint, tmp_path):
    shutil.copytree(PHOTOGRAPHS, tmp_path / "images" / "deep" / "er", ignore=shutil.ignore_patterns("*.md"))
    shutil.copy(PHOTOGRAPHS / "cat.jpg", tmp_path / "images" / "cat.JPG")
    processor, model = example("loading").load(str(checkpoint))
    for pooled in (False, True):
        options = ["--pooled"] if pooled else []
        status, printed, _ = run(
            "folder_features", "images", "--output", "f.safetensors", "--checkpoint", checkpoint, *options
        )
        assert status == 0 and "features of 5 images of 5" in printed
        features = load_file(tmp_path / "f.safetensors")
        names = ["cat.JPG", *(f"deep/er/{path.name}" for path in PHOTOGRAPHS.glob("*.jpg"))]
        assert features.keys() == set(names)
        for name in names:
            inputs = processor(str(tmp_path / "images" / name), return_tensors="pt")
            with torch.no_grad():
                outputs = model(**inputs)
            expected = outputs.last_hidden_state.view(*inputs["grid_thw"][0].tolist(), -1)
            if pooled:
                head = outputs.pooler_output
                expected = expected.mean(dim=(0, 1, 2)) if head is None else head[0]
            torch.testing.assert_close(features[name], expected, rtol=0, atol=1e-5)


def test_images_of_a_folder_are_known_by_their_content(example, tmp_path):
    names = {"a.jfif": "JPEG", "b.ppm": "PPM", "c.jp2": "JPEG2000", "d": "PNG", "e.txt": "WEBP", "f.PNG": "TIFF",
             "g.ico": "ICO", "h.qoi": "QOI", "i.tar": "BMP", "j.gif": "GIF", "k.avif": "AVIF"}  # fmt: skip
    PIL.Image.init()
    names = {name: image_format for name, image_format in names.items() if image_format in PIL.Image.SAVE}
    for name, image_format in names.items():
        PIL.Image.fromarray(noise(32, 32, 3)).save(tmp_path / name, image_format)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "README.md").write_text("no image, and not named as one")
    (tmp_path / "postscript").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "folder.png").mkdir()
    expected = sorted([*names, "broken.jpg"])
    assert [Path(path).name for path in example("folder_features").image_files(tmp_path)] == expected


def test_retrieval_reads_subfolders_and_skips_bad_files(run, checkpoint, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(PHOTOGRAPHS, folder / "deep", ignore=shutil.ignore_patterns("*.md"))
    (folder / "no_image.png").write_text("no image")
    (folder / "cut.jpg").write_bytes((PHOTOGRAPHS / "cat.jpg").read_bytes()[:5000])
    PIL.Image.fromarray(noise(32, 32, 3)).save(folder / "postscript.jpg", "EPS")
    PIL.Image.fromarray(noise(1, 300, 3)).save(folder / "strip.png")
    query = str(PHOTOGRAPHS / "rocket.jpg")
    status, printed, errors = run("image_retrieval", "images", "--query", query, "--checkpoint", checkpoint)
    lines = printed.splitlines()
    assert status == 0 and len(lines) == 4 and lines[0] == f"1.0000  {Path('images/deep/rocket.jpg')}"
    similarities = [float(line.split()[0]) for line in lines]
    assert similarities == sorted(similarities, reverse=True)
    skipped = sorted(line.split(":")[0] for line in errors.splitlines() if line.startswith("skipped"))
    names = ["cut.jpg", "no_image.png", "postscript.jpg", "strip.png"]
    assert skipped == [f"skipped {Path('images', name)}" for name in names]
    status, printed, _ = run("image_retrieval", "images/deep", "--checkpoint", checkpoint)
    assert printed.splitlines()[0] == f"1.0000  {Path('images/deep/astronaut.jpg')}"


@pytest.mark.parametrize("patch_layout", ["channels_first", "channels_last"])
def test_the_picture_is_what_the_model_was_given(example, patch_layout):
    processor, _ = example("loading").load(None)
    values = noise(70, 98, 3)
    inputs = processor(values, return_tensors="pt", do_resize=False)
    processor.patch_layout = patch_layout
    inputs = processor(values, return_tensors="pt", do_resize=False)
    (picture,) = example("visualize_features").pictures_of_patches(processor, **inputs)
    assert np.array_equal(picture, values)


def test_the_picture_of_a_fixed_checkpoint_is_the_crop(example):
    processor, _ = example("loading").load(None)
    processor.image_size = 56
    photograph = PIL.Image.open(PHOTOGRAPHS / "rocket.jpg")
    inputs = processor(photograph, return_tensors="pt")
    (picture,) = example("visualize_features").pictures_of_patches(processor, **inputs)
    scale = 56 / photograph.height
    small = photograph.resize((int(photograph.width * scale), 56), PIL.Image.Resampling.BICUBIC)
    left = (small.width - 56) // 2
    expected = np.asarray(small.crop((left, 0, left + 56, 56)))
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_pictures_of_odd_images(run, checkpoint, tmp_path):
    wide = (np.add.outer(np.arange(60), np.arange(80)) * 300).astype(np.uint16)
    PIL.Image.fromarray(wide).save(tmp_path / "sixteen_bit.png")
    PIL.Image.new("RGBA", (80, 60), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    PIL.Image.fromarray(noise(10, 1900, 3)).save(tmp_path / "strip.png")
    PIL.Image.fromarray(noise(14, 14, 3)).save(tmp_path / f"{'long' * 40}.png")
    names = ["sixteen_bit.png", "transparent.png", "strip.png", f"{'long' * 40}.png"]
    status, _, errors = run("visualize_features", "--checkpoint", checkpoint, "--patch", "0.1", "1", *names)
    assert status == 0, errors
    with PIL.Image.open(tmp_path / "features.png") as sheet:
        assert sheet.width < 1100 and sheet.height < 1100
        first = np.asarray(sheet.crop((10, 46, 130, 160)).convert("L"))
        assert first.min() < 60 and first.max() < 200


def test_the_committed_picture():
    assert (EXAMPLES / "features.png").stat().st_size < 400_000
    with PIL.Image.open(EXAMPLES / "features.png") as picture:
        assert picture.format == "PNG"
        # The scale of similarities, above the last line: black to white.
        scale = np.asarray(picture.convert("L"))[-32, -270:-50].astype(int)
        assert scale[0] < 25 and scale[-1] > 230 and (np.diff(scale) >= 0).all()


# Each takes a process of its own: one native, one fixed and with a head.
@pytest.mark.parametrize("checkpoint", ["native", "image-text"], indirect=True)
def test_the_language_model_learns_is_saved_and_captions(checkpoint, tmp_path):
    # By itself, because it registers the tower's classes.
    command = [sys.executable, str(EXAMPLES / "vision_language_model.py"), "--checkpoint", str(checkpoint)]
    result = subprocess.run([*command, "--output", "saved"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, caption in [("astronaut", "an astronaut"), ("coffee", "a cup of coffee"), ("rocket", "a rocket")]:
        assert f"{name}.jpg: {caption}\n" in result.stdout
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    weights = load_file(checkpoint / "model.safetensors")
    if "text_config" in json.loads((checkpoint / "config.json").read_text()):
        prefix = "vision_model."
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    for name, weight in weights.items():
        assert torch.equal(saved[f"vision.{name}"], weight), f"{name} is frozen"


def test_what_the_demo_makes_is_there_afterwards(example, monkeypatch, tmp_path, capfd):
    demo = example("demo")
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(
        demo,
        "SMALL",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    converted = tmp_path / "demo" / "aimv2-packed"
    converted.mkdir(parents=True)
    (converted / "of an earlier run").touch()
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    demo.main()
    printed = capfd.readouterr().out
    assert "Verdict: passed." in printed and printed.rstrip().endswith(f"--checkpoint {converted}")
    assert (converted / "model.safetensors").is_file() and not (converted / "of an earlier run").exists()
    assert (tmp_path / "demo" / "aimv2-small-random" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--source", str(tmp_path / "nosuch")])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code not in (0, None) and "nosuch" in capfd.readouterr().err


def unconverted(folder: Path) -> str:
    reference_model().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "command",
    [
        ["feature_extraction"],
        ["folder_features", "--output", "features.safetensors"],
        ["image_retrieval"],
        ["visualize_features"],
        ["vision_language_model"],
        ["finetune", "--output", "run"],
    ],
    ids=lambda command: command[0],
)
def test_a_wrong_checkpoint_is_one_line(run, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for checkpoint, message in [
        ("nosuch", "nosuch does not exist: give a folder that"),
        ("empty/nosuch", "empty/nosuch is no local path, and the Hub"),
        ("empty", "config.json"),
        ("somebody/model", "somebody/model is no local path, and the Hub"),
        (unconverted(tmp_path / "original"), "convert_weights.py"),
    ]:
        status, printed, _ = run(*command, "--checkpoint", checkpoint)
        assert isinstance(status, str) and message in status and "\n" not in status, (checkpoint, status)
        assert not printed
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "original"}, "nothing may be written"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["feature_extraction", "nosuch.jpg"], "No such image file: 'nosuch.jpg'"),
        (["folder_features", "nosuch", "--output", "f.safetensors"], "No such folder: nosuch"),
        (["folder_features", ".", "--output", "f.safetensors"], "holds no image"),
        (["folder_features", "--output", "f.npz"], "--output must end in .safetensors"),
        (["folder_features", "--output", "nosuch/f.safetensors"], "no such folder: nosuch"),
        (["image_retrieval", "nosuch"], "No such folder: nosuch"),
        (["image_retrieval", "--query", "nosuch.jpg"], "No such image file: 'nosuch.jpg'"),
        (["visualize_features", "--patch", "2", "0"], "--patch must be"),
        (["visualize_features", "--output", "picture.jpg"], "--output must end in .png"),
        (["visualize_features", "--output", "nosuch/picture.png"], "--output must be in a folder"),
        (["visualize_features", "nosuch.jpg"], "No such image file: 'nosuch.jpg'"),
        (["finetune", "--output", "run", "--images", "nosuch"], "nosuch"),
        (["finetune", "--output", "run", "--images", "."], "a subfolder per class"),
        *(
            (["finetune", "--output", "run", option, number], f"argument {option}: must be at least 1, got {number}")
            for option, number in [
                ("--steps", "-1"),
                ("--save-steps", "0"),
                ("--patches-per-batch", "0"),
                ("--gradient-accumulation-steps", "0"),
            ]
        ),
        (["vision_language_model", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["search_features", ".", "--query", "a", "--count", "0"], "argument --count: must be at least 1, got 0"),
        (["search_by_words", "a", "--output", "nosuch/hits.png"], "--output must be in a folder that exists"),
        (["search_by_words", "a", "--top", "0"], "argument --top: must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_one_line(run, tmp_path, command, message):
    status, _, errors = run(*command)
    assert message in (errors.splitlines()[-1] if status == 2 else str(status))
    assert not list(tmp_path.iterdir()), "nothing may be written"


@pytest.mark.parametrize("place", ["", "deep/er"])
def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(run, tmp_path, place):
    (tmp_path / "taken").write_text("mine")
    status, printed, _ = run("vision_language_model", "--output", Path("taken", place))
    assert status == f"error: --output must be a folder that can be written to, got {Path('taken', place)}."
    assert not printed and [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_scikit_learn_names_the_line_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, _, _ = run("finetune", "--output", "run")
    assert "pip install scikit-learn" in str(status) and "\n" not in str(status)


COMMANDS = sorted(
    path for path in [*EXAMPLES.glob("*.py"), REPO / "convert_weights.py"] if "run(main)" in path.read_text()
)


@pytest.mark.parametrize(
    ("command", "package"),
    [*((command, "torch") for command in COMMANDS), (EXAMPLES / "search_features.py", "pyarrow")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_a_missing_package_is_one_line_that_installs_it(tmp_path, command, package):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = [sys.executable, str(command), "x"]
    result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith(f"error: No module named {package}. ")
    assert result.stderr.count("\n") == 1 and f"pip install -r {REPO}/requirements" in result.stderr


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["folder_features", "--output"], "f.safetensors"),
        (["visualize_features", "--output"], "picture.png"),
        (["search_by_words", "a cat", "--output"], "hits.png"),
        (["vision_language_model", "--steps", "1", "--output"], "model"),
        (["finetune", "--steps", "1", "--output"], "run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_disk_that_is_full_is_one_line(tmp_path, command, output):
    name, *arguments = command
    if Path(output).suffix:
        (tmp_path / output).write_text("of an earlier run")
    # The limit stands for a disk: the same calls fail, with another reason.
    code = f"""
        import errno, os, resource, runpy, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.path.insert(0, {str(EXAMPLES)!r})
        import loading
        loading.NEXT_STEPS[errno.EFBIG] = loading.NEXT_STEPS[errno.ENOSPC]
        sys.argv = [{name!r}, *{arguments!r}, {str(tmp_path / output)!r}]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        runpy.run_path({str(EXAMPLES / f"{name}.py")!r}, run_name="__main__")
    """
    started = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert result.stderr.endswith("- free some space, or choose another disk.\n"), result.stderr
    if Path(output).suffix:
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(output, "of an earlier run")]


def test_the_drawing_is_what_its_script_draws():
    script = REPO / "docs" / "pictures" / "packing.py"
    assert script.with_suffix(".svg").read_text() == runpy.run_path(str(script))["draw"]()
