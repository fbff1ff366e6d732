# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The code of docs/images.md runs in the order written, and says the formats that are read."""

import re
import sys

import av
import pytest
import torch
from PIL import Image
from reference import REPO
from scaling import make_model_repo
from test_image_processing import load, noise


PAGE = (REPO / "docs" / "images.md").read_text()


@pytest.mark.parametrize("is_native", [True, False])
def test_the_code_of_the_page_runs(tmp_path, monkeypatch, is_native):
    monkeypatch.chdir(tmp_path)
    make_model_repo(tmp_path / "aimv2-large-packed", is_native=is_native)
    Image.fromarray(noise(100, 240, 3)).save("wide.jpg")
    Image.fromarray(noise(200, 70, 3)).save("tall.png")
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in noise(20, 48, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "docs/images.md", "exec"), names)
    assert [part.shape[0] for part in names["maps"]] == [1, 1] and names["maps"][0].shape[3] == 64
    assert names["inputs"]["grid_thw"][0, 0] == 16
    assert len(names["features"]) == names["batch"]["grid_thw"].prod(1).sum()
    assert torch.isfinite(names["features"]).all()


def test_the_page_names_every_format():
    listed = PAGE[PAGE.index("only these formats are opened") :].split(".")[0].upper().replace("JPEG 2000", "JPEG2000")
    formats = sys.modules[type(load("pil")).__module__].IMAGE_FORMATS
    assert [name for name in formats if name not in listed] == []
