# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it works, and what it says at the end."""

import sys
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from conversion.messages import printable, say
from corpus.output import Counts, add_errors


# Of the rate that is shown, between the lines of a log, and the names of a list that are printed.
WINDOW_SECONDS = 60
LINE_SECONDS = 60
FIRST_NAMES = 3


class Progress:
    """
    The images encoded, the errors, the time left and the patches per second of the last minute: on a terminal a line
    that changes, elsewhere a line a minute.

    Args:
        total (`int`, *optional*): Images of the input, where they are counted.
        done (`int`): Of those, what was done before.
        file_of (callable, *optional*): The number of the file that an id comes from, as "archive 3 of 6".
    """

    def __init__(self, total: int | None, done: int, file_of: Callable[[str], str] | None = None):
        self.is_terminal = sys.stderr.isatty()
        # What a narrow terminal cuts off comes last.
        form = (
            "{percentage:3.0f}% {n_fmt}/{total_fmt} images{postfix} |{bar:20}|" if total else "{n_fmt} images{postfix}"
        )
        self.bar = tqdm(
            total=total,
            initial=done,
            bar_format=form,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self.is_terminal,
        )
        self.total, self.done, self.file_of = total, done, file_of
        # What a log does not have yet.
        self.line = ""
        self.begun = self.last_line = time.perf_counter()
        self.samples: deque[tuple[float, int, int]] = deque()
        self.first: tuple[float, int] | None = None
        self.last = self.begun
        self.images = self.patches = self.errors = 0

    def add(self, counts: Counts) -> None:
        now = time.perf_counter()
        self.images += counts.images
        self.patches += counts.patches
        self.errors += counts.failed()
        self.samples.append((now, self.images, self.patches))
        if self.first is None:
            self.first = now, self.patches
        self.last = now
        while len(self.samples) > 2 and self.samples[1][0] < now - WINDOW_SECONDS:
            self.samples.popleft()
        described = self.described(counts.last_id)
        if self.is_terminal:
            self.bar.set_postfix_str(described, refresh=False)
            self.bar.update(counts.images)
        else:
            number = self.done + self.images
            share = f"{number / self.total:4.0%} {number:,}/{self.total:,}" if self.total else f"{number:,}"
            self.line = f"{share} images, {described}"
            if now - self.last_line >= LINE_SECONDS:
                self.last_line = now
                self.print_line()

    def described(self, last_id: str) -> str:
        (start, images, patches), (stop, more_images, more_patches) = self.samples[0], self.samples[-1]
        parts = [f"{self.errors:,} errors"]
        if self.total and more_images > images:
            left = (self.total - self.done - self.images) * (stop - start) / (more_images - images)
            parts.append(f"{tqdm.format_interval(left)} left")
        if self.file_of is not None:
            parts.append(self.file_of(last_id))
        if stop > start:
            parts.append(f"{(more_patches - patches) / (stop - start):,.0f} patches/s")
        return ", ".join(parts)

    def print_line(self) -> None:
        if self.line:
            say(self.line, file=sys.stderr)
        self.line = ""

    def close(self) -> None:
        self.bar.close()
        self.print_line()

    def rate(self) -> str:
        """Patches per second from the first batch, which ends the start-up, to the last."""
        if self.first is None or self.last == self.first[0]:
            return f"{self.last - self.begun:.1f} s, start-up included: too few for a rate."
        startup, first_patches = self.first
        rate = (self.patches - first_patches) / (self.last - startup)
        return (
            f"{rate:,.0f} patches/s from the first batch to the last, "
            f"which leaves out {startup - self.begun:.1f} s of start-up."
        )


class Summary:
    """What became part of the output in this run."""

    def __init__(self) -> None:
        self.images = self.patches = 0
        self.errors: dict[str, tuple[int, list[str]]] = {}

    def add(self, counts: Counts) -> None:
        self.images += counts.images
        self.patches += counts.patches
        add_errors(self.errors, counts.errors)

    def lines(self) -> list[str]:
        if not self.errors:
            return []
        count = sum(count for count, _ in self.errors.values())
        lines = [f"{count:,} could not be read or decoded; --retry-errors tries them again:"]
        for text, (number, ids) in sorted(self.errors.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {number:,}  {text}: {some(ids, number)}")
        return lines


def skipped_lines(skipped: list[tuple[str, str]], file: str) -> list[str]:
    if not skipped:
        return []
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    lines = [f"{len(skipped):,} files of the input were skipped, all listed in {file}:"]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(names):,}  {reason}: {some(names[:FIRST_NAMES], len(names))}")
    return lines


def some(names: list[str], count: int) -> str:
    return ", ".join(map(printable, names)) + (", ..." if count > len(names) else "")
