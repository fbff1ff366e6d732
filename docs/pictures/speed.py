# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Draws docs/pictures/speed.svg from benchmarks/results/h200.json: patches per second, packed and by its peers.

    python docs/pictures/speed.py
"""

import json
from pathlib import Path

import matplotlib


matplotlib.use("svg")
from matplotlib import pyplot


REPO = Path(__file__).resolve().parents[2]
MIXES = {
    "one_224": "1 image\n224 px",
    "2k mixed": "2k patches\nmixed sizes",
    "2k uniform_224": "2k patches\n224 px",
}
CANDIDATES = {
    "packed sdpa": ("packed", "#2563eb"),
    "timm compiled graph": ("timm compiled, in a CUDA graph", "#065f46"),
    "timm": ("timm, one size", "#0d9488"),
    "naflex": ("timm NaFlex", "#d97706"),
    "padded": ("transformers, padded", "#94a3b8"),
}


def rates() -> dict[str, dict[str, float]]:
    """Thousands of patches per second, by mix and candidate."""
    found: dict[str, dict[str, float]] = {}
    for run in json.loads((REPO / "benchmarks" / "results" / "h200.json").read_text())["mixes"]:
        size = next((f"{k}k " for k in (2, 16, 64) if abs(run["patches"] / (k * 1024) - 1) < 0.2), "")
        row = found.setdefault(size + run["mix"], {})
        for name, measured in run["candidates"].items():
            row[name] = run["patches"] / measured["stream_seconds"] / 1000
    return found


def main() -> None:
    measured = rates()
    figure, axes = pyplot.subplots(figsize=(8.4, 3.6))
    width = 0.2
    for name, (label, colour) in CANDIDATES.items():
        bars = []
        for at, mix in enumerate(MIXES):
            present = [candidate for candidate in CANDIDATES if candidate in measured[mix]]
            if name in present:
                bars.append((at + (present.index(name) - (len(present) - 1) / 2) * width, measured[mix][name]))
        centres, heights = zip(*bars, strict=True)
        drawn = axes.bar(centres, heights, width, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7, color="#334155", padding=1)
    axes.set_xticks(range(len(MIXES)), list(MIXES.values()), fontsize=8)
    axes.set_ylabel("thousand patches per second", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(
        "AIMv2-L, bfloat16, one H200: batch after batch, host included. timm's graph serves one size and batch",
        fontsize=9,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
