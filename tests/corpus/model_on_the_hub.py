# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs with a model on a Hub, in a process of their own: huggingface_hub reads its address once."""

import json
import os
import sys
from pathlib import Path

from hub_server import Hub, stored


hub = Hub()
repo_folder, folder = Path(sys.argv[1]), Path(sys.argv[2])
os.environ |= {
    "HF_ENDPOINT": hub.url,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HOME": str(folder / "home"),
    "HF_HUB_OFFLINE": "0",
}

import pytest  # noqa: E402
from corpora import IMAGES, extract, write_images  # noqa: E402

from corpus.models import model_folder  # noqa: E402


source, output = write_images(folder / "in", {"a.png": IMAGES["0.png"]}), folder / "out"
files = {file.name: file.read_bytes() for file in repo_folder.iterdir()}
repo = hub.add_repo("alice/tiny", files)
first = repo.refs["main"]
extract("alice/tiny", source, output)
assert json.loads((output / ".settings.json").read_text())["begun"]["commit"] == first

changed = {**files, "model.safetensors": files["model.safetensors"][:-4] + b"\0\0\0\0"}
repo.add("main", "other weights", {name: stored(name, data) for name, data in changed.items()})
write_images(source, {"b.png": IMAGES["1.png"]})
with pytest.raises(ValueError, match=f"was begun with alice/tiny at commit {first}, .*weights is"):
    extract("alice/tiny", source, output)
assert extract("alice/tiny", source, output, revision=first).keys() == {"a.png", "b.png"}

with pytest.raises(ValueError, match="alice/none is no local path, and no repo on the Hub that is open to you"):
    model_folder("alice/none", None)
with pytest.raises(ValueError, match="alice/tiny on the Hub has no branch, tag or commit 'gone'"):
    model_folder("alice/tiny", "gone")

# Its weights would be gigabytes.
hub.add_repo("alice/original", {**files, "config.json": b'{"model_type": "aimv2_vision_model"}'})
with pytest.raises(ValueError, match="alice/original is not converted"):
    model_folder("alice/original", None)
assert not list(Path(os.environ["HF_HOME"]).rglob("models--alice--original/**/*.safetensors"))

# What is there already does not need the Hub.
newest = model_folder("alice/tiny", None)
hub.is_down = True
assert model_folder("alice/tiny", None) == newest
with pytest.raises(ValueError, match=r"alice/none was refused by the Hub: .*Service Unavailable.* Try again later"):
    model_folder("alice/none", None)
hub.close()
assert model_folder("alice/tiny", None) == newest
with pytest.raises(ValueError, match=f"Hub at {hub.url} cannot be reached .* Check the connection, or give the path"):
    model_folder("alice/none", None)
