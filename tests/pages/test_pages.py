# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""README and docs: all code and commands run in the order written, links lead somewhere, tables are whole."""

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import checkpoints
import numpy as np
import pytest
import torch
from hub_server import Hub
from image_text_checkpoints import clip_tokenizer, reference_image_text_model, save_image_text_repo
from page import Page, Step
from PIL import Image
from reference import REPO, hub_module, reference_model
from scaling import make_model_repo
from served import start_server

from conversion.repo_kinds import RepoKind


DOCS = sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *DOCS]
LANGUAGES = {"python", "bash", "text", "bibtex"}

# What stands for what in code and commands, in this order.
SUBSTITUTES = {
    "USER/": "alice/",
    "make demo": "python examples/demo.py",
    "convert_weights.py REPO": "convert_weights.py aimv2-large-packed",
    "--model REPO": "--model aimv2-large-packed",
    "s3://bucket/": "bucket/",
    "PICTURES": "photographs",
    "--output runs/digits": "--output runs/digits --steps 2",
    "python benchmarks/preprocessing.py": "python benchmarks/preprocessing.py --images 1 --rounds 2",
}

# Why a step does not run here.
PACKAGES = "installs packages"
MAKE = "runs the tests or the linters that it would run in"
MINUTES = "measures for minutes"
GPU = "needs a GPU"
# By page, and the command or a line of the block.
NOT_RUN = {
    ("README.md", "source .venv/bin/activate"): "is of the environment that these tests run in",
    ("README.md", "make test"): MAKE,
    ("README.md", "pip install -r requirements.txt"): PACKAGES,
    ("README.md", 'pip install "transformers[kernels]>=5.15,<5.25"'): PACKAGES,
    (
        "README.md",
        "python convert_weights.py apple/aimv2-large-patch14-native aimv2-large-native",
    ): "is converted above",
    ("README.md", "python PATH/convert_weights.py ..."): "is a form, not a command",
    (
        "docs/benchmarks.md",
        "python benchmarks/throughput.py --device cuda --dtype bfloat16 --layers 24 --best --mixes one_224 --peers "
        "timm --growth",
    ): GPU,
    (
        "docs/benchmarks.md",
        "python benchmarks/throughput.py --device cuda --dtype bfloat16 --layers 24 --patches 2048 "
        "--mixes mixed uniform_224 --peers padded naflex timm --growth",
    ): GPU,
    ("docs/benchmarks.md", "make bench"): MINUTES,
    ("docs/benchmarks.md", "python benchmarks/throughput.py --against CHECKOUT"): MINUTES,
    ("docs/kernels.md", "python benchmarks/swiglu.py"): GPU,
    ("docs/kernels.md", "model.capture_cuda_graphs([256] * 8)  # before serving: every mix of 2,048 patches"): GPU,
    (
        "docs/kernels.md",
        "compute-sanitizer --tool memcheck python -m pytest tests/model/test_cuda_engine.py -k small_models",
    ): GPU,
    ("docs/compatibility.md", "make test"): MAKE,
    ("docs/compatibility.md", "make test-matrix"): PACKAGES,
    ("CONTRIBUTING.md", "make test"): MAKE,
    ("CONTRIBUTING.md", "make style"): MAKE,
    ("CONTRIBUTING.md", "make quality"): MAKE,
    ("CONTRIBUTING.md", "make test-matrix"): PACKAGES,
    ("CONTRIBUTING.md", "make test-common"): MAKE,
    ("CONTRIBUTING.md", "make test-torchvision"): PACKAGES,
    ("CONTRIBUTING.md", "make bench"): MINUTES,
    ("docs/corpus.md", "pip install torch -r requirements-scale.txt"): PACKAGES,
    ("docs/corpus.md", "pip install faiss-cpu"): PACKAGES,
    ("docs/corpus.md", "python benchmarks/extract_features.py --images 96"): MINUTES,
    (
        "docs/corpus.md",
        "python benchmarks/extract_features.py --images 310 --layers 2 --width 256 --ray-workers 0 --repetitions 5",
    ): MINUTES,
    ("docs/corpus.md", "python benchmarks/extract_features.py --layers 24"): MINUTES,
    (
        "docs/corpus.md",
        "python extract_features.py --address auto --model REPO --input s3://bucket/parquet "
        "--output s3://bucket/features --dtype bfloat16 --patches-per-batch 65536",
    ): "needs a Ray cluster: tests/corpus runs on Ray",
    ("docs/image_text.md", 'pip install "sentence-transformers>=6.2"'): PACKAGES,
    ("docs/images.md", "pip install av"): PACKAGES,
    ("docs/images.md", "make test-torchvision"): PACKAGES,
    ("docs/serving.md", "pip install -r requirements-serve.txt openai"): PACKAGES,
    (
        "docs/serving.md",
        "python examples/serve.py --checkpoint aimv2-lit-packed",
    ): "is started by `prepare_serving`",
    (
        "docs/serving.md",
        "python benchmarks/serving.py --device cuda --dtype bfloat16 --rates 100 200 400 800 1600",
    ): GPU,
    (
        "docs/serving.md",
        "python benchmarks/serving.py --rates 1000 --seconds 1 --layers 2 --width 256 --kinds packed "
        "--max-requests 1000",
    ): MINUTES,
    ("docs/training.md", "pip install torch -r requirements-scale.txt"): PACKAGES,
    (
        "docs/training.md",
        "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
        "--fsdp_state_dict_type FULL_STATE_DICT train.py",
    ): "needs several GPUs, and a script of the reader's",
    ("docs/training.md", "torchrun --nproc-per-node 2 examples/finetune.py --output runs/digits --fsdp"): (
        "takes several processes: tests/examples/test_finetune.py runs it"
    ),
    ("docs/training.md", "from transformers.distributed import DistributedConfig"): (
        "takes several processes: tests/model/test_distributed_training.py does the same"
    ),
    ("docs/training.md", "from torch.distributed.fsdp import fully_shard"): (
        "takes several processes: tests/model/test_distributed_training.py does the same"
    ),
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub that has a small checkpoint under each of Apple's names that a page holds."""
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def released(hub, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    whole = reference_image_text_model()
    checkpoints.save(folder / "lit", checkpoints.apple_image_text(whole), checkpoints.apple_image_text_config(whole))
    clip_tokenizer().save_pretrained(folder / "lit")
    for kind in ("native", "fixed"):
        model = reference_model(is_native=kind == "native")
        checkpoints.save(folder / kind, checkpoints.apple(model), checkpoints.apple_config(model))
    names = {name for page in PAGES for name in re.findall(r"apple/aimv2-[\w-]+", (REPO / page).read_text())}
    for name in names:
        kind = name.rpartition("-")[2]
        source = folder / (kind if kind in ("native", "lit") else "fixed")
        hub.add_repo(name, {path.name: path.read_bytes() for path in source.iterdir()})


@pytest.fixture(scope="module")
def run_command(hub, released, tmp_path_factory) -> Iterator[Callable[[str, Path], None]]:
    """Runs a command as a user of the Hub, in a folder; fails with all that it printed."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_alice",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    runner = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("command_runner.py"))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    requests, codes, printed = runner.stdin, runner.stdout, home / "printed"
    assert requests and codes

    def run(command: str, folder: Path) -> None:
        script = re.fullmatch(r"python (\S+\.py.*)", command)
        if script:
            arguments = ["bash", "-c", f'printf "%s\\0" {script[1]}']
            words = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True).stdout
            request = {"arguments": words.split("\0")[:-1], "folder": str(folder), "output": str(printed)}
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            code = int(codes.readline())
        else:
            with printed.open("w") as output:
                code = subprocess.run(
                    ["bash", "-c", command], cwd=folder, env=environment, stdout=output, stderr=output, check=False
                ).returncode
        assert code == 0, f"{command}\n{printed.read_text()}"

    yield run
    requests.close()
    runner.wait()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a reader has who follows the pages: a clone, converted checkpoints, and files of their own."""
    folder = tmp_path_factory.mktemp("clone") / "clone"
    ignored = shutil.ignore_patterns(".*", "build", "tests", "__pycache__", "*.json.gz")
    shutil.copytree(REPO, folder, ignore=ignored)
    torch.manual_seed(0)
    make_model_repo(folder / "aimv2-large-packed")
    save_image_text_repo(folder / "aimv2-lit-packed", reference_image_text_model())
    photographs = folder / "photographs"
    shutil.copytree(REPO / "examples" / "photographs", photographs, ignore=shutil.ignore_patterns("*.md"))
    with av.open(folder / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in noise(20, 48, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return folder


def reason(name: str, step: Step) -> tuple[str, str] | None:
    """The entry of `NOT_RUN` that names a step."""
    return next((key for key in NOT_RUN if key[0] == name and key[1] in step.code.splitlines()), None)


def steps_to_run(name: str) -> list[Step]:
    steps = []
    for step in Page(REPO / name).steps:
        code = step.code
        if reason(name, step):
            continue
        for old, new in SUBSTITUTES.items():
            code = code.replace(old, new)
        steps.append(Step(step.language, code))
    return steps


def prepare_images(folder: Path, names: dict) -> None:
    """As a page that continues docs/images.md."""
    names |= {"repo": "aimv2-large-packed"}
    (block,) = [step.code for step in steps_to_run("docs/images.md") if "maps = " in step.code]
    exec(block, names)


def prepare_corpus(folder: Path, names: dict) -> None:
    (folder / "bucket" / "shards").mkdir(parents=True)
    with tarfile.open(folder / "bucket" / "shards" / "0.tar", "w") as archive:
        archive.add(folder / "photographs", arcname="photographs")
    shutil.copytree(folder / "photographs", folder / "bucket" / "parquet")


def prepare_serving(folder: Path, names: dict) -> None:
    """Another process, as the page's command starts it; ended by its check, or with this one."""
    names["server"], port = start_server(folder / "log", "--checkpoint", "aimv2-lit-packed", folder=folder)
    atexit.register(names["server"].kill)
    SUBSTITUTES["localhost:8000"] = f"127.0.0.1:{port}"


def without_conversions(folder: Path, names: dict) -> None:
    """The page makes what others begin with."""
    shutil.rmtree(folder / "aimv2-large-packed")


def without_image_text(folder: Path, names: dict) -> None:
    shutil.rmtree(folder / "aimv2-lit-packed")


def check_converting(folder: Path, names: dict) -> None:
    assert json.loads((folder / "report.json").read_text())["passed"]


def check_corpus(folder: Path, names: dict) -> None:
    assert names["features"].shape == (*names["row"]["grid_thw"], 64)
    assert len(list((folder / "bucket" / "features").glob("*.parquet"))) == 1


def check_image_text(folder: Path, names: dict) -> None:
    assert names["scores"].shape == (2, 2)
    assert (folder / "runs" / "words" / "final" / "sentence_bert_config.json").exists()
    torch.testing.assert_close(names["probabilities"].sum(dim=1), torch.ones(2))
    assert type(names["tower"]).__name__ == "Aimv2PackingModel"
    assert [vector.shape for vector in names["vectors"]] == [(64,)] * 2


def check_serving(folder: Path, names: dict) -> None:
    names["server"].terminate()
    names["server"].wait(timeout=120)
    assert [len(vector) for vector in names["vectors"]] == [40] * 3


def check_images(folder: Path, names: dict) -> None:
    assert [part.shape[0] for part in names["maps"]] == [1, 1] and names["maps"][0].shape[3] == 64
    assert names["inputs"]["grid_thw"][0, 0] == 16
    assert len(names["features"]) == names["batch"]["grid_thw"].prod(1).sum()
    assert torch.isfinite(names["features"]).all()


def check_vision_language(folder: Path, names: dict) -> None:
    inputs, processor = names["inputs"], names["processor"]
    assert names["tokens"].shape == (len(names["features"]) // 4, 4 * 64)
    assert [tuple(part.shape) for part in names["maps"]] == [(*grid, 64) for grid in inputs["grid_thw"].tolist()]
    torch.testing.assert_close(torch.cat([part.flatten(0, 2) for part in names["maps"]]), names["states"])
    read = names["image_processor"](Image.new("RGB", (640, 480)), return_tensors="pt", max_patches=1024)
    assert names["num_image_tokens"] == len(read["hidden_states"]) // 4
    assert (names["prompts"]["input_ids"] == processor.image_token_id).sum() == len(names["tokens"])
    assert len(names["captions"]) == 2
    assert (folder / "runs" / "vlm" / "final" / "modeling_vision_language.py").exists()


PREPARE: dict[str, Callable[[Path, dict], None]] = {
    "docs/compatibility.md": prepare_images,
    "docs/converting.md": without_conversions,
    "docs/corpus.md": prepare_corpus,
    "docs/image_text.md": without_image_text,
    "docs/serving.md": prepare_serving,
    "docs/training.md": prepare_images,
}
CHECK: dict[str, Callable[[Path, dict], None]] = {
    "docs/converting.md": check_converting,
    "docs/corpus.md": check_corpus,
    "docs/image_text.md": check_image_text,
    "docs/images.md": check_images,
    "docs/serving.md": check_serving,
    "docs/vision_language.md": check_vision_language,
}


def run_page(name: str, folder: Path, run_command: Callable[[str, Path], None]) -> None:
    """The Python blocks of a page share their names."""
    names: dict = {}
    if name in PREPARE:
        PREPARE[name](folder, names)
    for step in steps_to_run(name):
        if step.language == "python":
            exec(compile(step.code, name, "exec"), names)
        else:
            run_command(step.code, folder)
    if name in CHECK:
        CHECK[name](folder, names)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs_in_its_order(name, clone, run_command, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(clone, tmp_path / "clone"))
    monkeypatch.chdir(folder)
    run_page(name, folder, run_command)


def test_the_page_on_images_runs_on_a_fixed_resolution_checkpoint(clone, run_command, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(clone, tmp_path / "clone"))
    make_model_repo(folder / "aimv2-large-packed", is_native=False)
    monkeypatch.chdir(folder)
    run_page("docs/images.md", folder, run_command)


def test_what_does_not_run_is_on_a_page():
    named = {reason(name, step) for name in PAGES for step in Page(REPO / name).steps}
    assert [key for key in NOT_RUN if key not in named] == []


@pytest.mark.parametrize("name", PAGES)
def test_code_is_fenced_and_says_its_language(name):
    assert [token.content for token in Page(REPO / name).code_tokens if token.info not in LANGUAGES] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    page = Page(REPO / name)
    for link in page.links:
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), link
        assert not anchor or anchor in Page(path).anchors, link
        ignored = subprocess.run(["git", "check-ignore", "--quiet", str(path)], cwd=REPO, check=False).returncode
        assert ignored != 0, f"git ignores {link}"
    assert [path for path in page.paths if not (REPO / path).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_rows_of_a_table_have_equally_many_cells(name):
    for lines in Page(REPO / name).tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(cells) == 1, lines


def test_the_readme_says_how_much_a_plain_repo_has_to_read():
    said = re.search(r"six Python files, about ([\d,]+) lines", " ".join((REPO / "README.md").read_text().split()))
    files = RepoKind(image_text=False, plain=True).code_files
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert said and len(files) == 6 and abs(int(said[1].replace(",", "")) - lines) < 0.05 * lines


def test_the_page_on_images_names_every_format():
    text = (REPO / "docs" / "images.md").read_text()
    listed = text[text.index("only these formats are opened") :].split(".")[0].upper().replace("JPEG 2000", "JPEG2000")
    formats = hub_module("image_processing").IMAGE_FORMATS
    assert [name for name in formats if name not in listed] == []
