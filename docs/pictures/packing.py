# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Draws docs/pictures/packing.svg: the patches of three images of different shapes, end to end in one tensor.

    python docs/pictures/packing.py
"""

from itertools import accumulate
from pathlib import Path


# Rows, columns, colour, and a scene of ten units a patch.
IMAGES = [
    (
        3,
        5,
        "#2563eb",
        '<rect width="50" height="30" fill="#cfe8fb"/><circle cx="38" cy="8" r="4.5" fill="#fbbf24"/>'
        '<path d="M-2 30 14 7 30 30Z" fill="#5b7fb5"/>'
        '<path d="M14 7 9.8 13 12.5 12 14.5 14.5 16.5 12 18.2 13Z" fill="#fff"/>'
        '<path d="M20 30 33 14 46 30Z" fill="#7c9bc9"/><path d="M-1 24Q12 19 25 24T51 23V31H-1Z" fill="#65a30d"/>'
        '<path d="M-1 27Q14 24 28 27.5T51 27V31H-1Z" fill="#4d7c0f"/>',
    ),
    (
        3,
        3,
        "#d97706",
        '<rect width="30" height="30" fill="#fdecd2"/><path d="M-1 25Q8 21 16 25T31 24V31H-1Z" fill="#f3cf9b"/>'
        '<path d="M7 12A8 8 0 0 1 23 12C23 16 18 19 17 21H13C12 19 7 16 7 12Z" fill="#dc4f3e"/>'
        '<path d="M12 5C9 10 11 17 13.5 21H16.5C19 17 21 10 18 5A8 8 0 0 0 12 5Z" fill="#f9a03f"/>'
        '<path d="M13.3 21 13.6 23.5M16.7 21 16.4 23.5" stroke="#7c3f1d" stroke-width=".5"/>'
        '<rect x="13" y="23.3" width="4" height="3" rx=".8" fill="#8a4b23"/>',
    ),
    (
        4,
        2,
        "#059669",
        '<rect width="20" height="40" fill="#ddf3ea"/><circle cx="15.5" cy="5" r="2.6" fill="#fff"/>'
        '<rect x="8.8" y="30" width="2.4" height="6" fill="#7c5a3c"/><path d="M10 5 15 16H5Z" fill="#2a9d6a"/>'
        '<path d="M10 11 16.5 24H3.5Z" fill="#1f8558"/><path d="M10 18 18 32H2Z" fill="#166b46"/>'
        '<path d="M-1 36Q6 33.5 11 35.5T21 35V41H-1Z" fill="#fff"/>',
    ),
]
WIDTH, HEIGHT = 960, 424
TILE, GAP, LEFT = 25, 2, 48
IMAGES_BOTTOM, STRIP_TOP = 160, 232
SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def tile(image: int, row: int, column: int, x: float, y: float) -> str:
    box = f"{column * 10} {row * 10} 10 10"
    return f'<svg x="{x:g}" y="{y:g}" width="{TILE}" height="{TILE}" viewBox="{box}"><use href="#image{image}"/></svg>'


def text(x: float, y: float, content: object, style: str = "label") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{content}</text>'


def draw() -> str:
    step = TILE + GAP
    lengths = [rows * columns for rows, columns, _, _ in IMAGES]
    cu_seqlens = [0, *accumulate(lengths)]
    grid_thw = [[1, rows, columns] for rows, columns, _, _ in IMAGES]
    scenes = "".join(f'<g id="image{index}">{scene}</g>' for index, (*_, scene) in enumerate(IMAGES))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">The patches of three images of different shapes lie end to end in one tensor '
        f"of {sum(lengths)} patches; cu_seqlens {cu_seqlens} marks where each image begins and ends.</title>",
        f"<style>text{{font-family:{SANS};font-size:15px;fill:#334155;text-anchor:middle}}"
        f".code,.left,.tick{{font-family:{MONO}}}.left{{text-anchor:start}}.tick{{font-weight:700;fill:#0f172a}}"
        ".note{font-size:13px;fill:#64748b}.right{text-anchor:end;font-size:14px;fill:#64748b}</style>",
        f"<defs>{scenes}</defs>",
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14" fill="#fff" stroke="#cbd5e1"/>',
    ]
    for index, (rows, columns, colour, _) in enumerate(IMAGES):
        first, last = cu_seqlens[index : index + 2]
        strip_left, strip_right = LEFT + first * step, LEFT + last * step - GAP
        centre = (strip_left + strip_right) / 2
        left, top = centre - (columns * step - GAP) / 2, IMAGES_BOTTOM - (rows * step - GAP)
        right, height = left + columns * step - GAP, IMAGES_BOTTOM - top
        bend = (IMAGES_BOTTOM + STRIP_TOP) / 2
        parts.append(
            f'<path d="M{left - 5:g} {IMAGES_BOTTOM + 5}'
            f"C{left - 5:g} {bend:g} {strip_left - 1:g} {bend:g} {strip_left - 1:g} {STRIP_TOP - 5}H{strip_right + 1:g}"
            f"C{strip_right + 1:g} {bend:g} {right + 5:g} {bend:g} {right + 5:g} {IMAGES_BOTTOM + 5}Z"
            f'" fill="{colour}" fill-opacity=".13"/>'
        )
        parts.append(
            f'<rect x="{left - 5:g}" y="{top - 5:g}" width="{right - left + 10:g}" height="{height + 10:g}" rx="5" '
            f'fill="{colour}" fill-opacity=".13" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts.append(text(centre, top - 16, f"{rows} x {columns} patches"))
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            parts.append(tile(index, row, column, left + column * step, top + row * step))
            parts.append(tile(index, row, column, LEFT + (first + place) * step, STRIP_TOP))
        parts.append(
            f'<rect x="{strip_left - 1:g}" y="{STRIP_TOP - 5}" width="{strip_right - strip_left + 2:g}" '
            f'height="{TILE + 10}" fill="none" stroke="{colour}" stroke-width="1.5" rx="3"/>'
        )
        bracket = STRIP_TOP + TILE + 22
        parts.append(
            f'<path d="M{strip_left + 2:g} {bracket - 6}V{bracket}H{strip_right - 2:g}V{bracket - 6}" fill="none" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(text(centre, bracket + 22, "attention within the image", "note"))
    ticks = STRIP_TOP + TILE + 44
    for place in cu_seqlens:
        x = LEFT + place * step - GAP / 2
        parts.append(f'<path d="M{x:g} {STRIP_TOP - 10}V{ticks - 15}" stroke="#0f172a" stroke-width="1.5"/>')
        parts.append(text(x, ticks, str(place), "tick"))
    bottom = ticks + 42
    for line, (name, value, meaning) in enumerate(
        [
            ("hidden_states", f"({sum(lengths)}, 588)", "the patches of all images, in one tensor"),
            ("cu_seqlens", cu_seqlens, "where each image begins and ends"),
            ("grid_thw", grid_thw, "frames, rows and columns of each image"),
        ]
    ):
        y = bottom + 26 * line
        parts += [
            text(LEFT, y, name, "left"),
            text(LEFT + 150, y, value, "left"),
            text(WIDTH - LEFT, y, meaning, "right"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
