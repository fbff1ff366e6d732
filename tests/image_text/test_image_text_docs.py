# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The code in docs/image_text.md runs as it stands, on repos of the names that it uses."""

import re

import torch
from image_text_checkpoints import reference_image_text_model, save_image_text_repo, save_vision_repo
from reference import REPO, reference_model


def test_code_of_the_page_runs(tmp_path, monkeypatch):
    save_image_text_repo(tmp_path / "aimv2-lit-packed", reference_image_text_model())
    save_vision_repo(tmp_path / "aimv2-large-packed", reference_model())
    (tmp_path / "examples").symlink_to(REPO / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "image_text.md").read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["scores"].shape == (2, 2)
    torch.testing.assert_close(names["probabilities"].sum(dim=1), torch.ones(2))
    assert type(names["tower"]).__name__ == "Aimv2PackingModel"
    assert [vector.shape for vector in names["vectors"]] == [(64,)] * 2
