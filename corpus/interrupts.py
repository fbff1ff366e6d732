# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and termination, let through only where nothing can be left half done."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """
    SIGINT and SIGTERM as `KeyboardInterrupt`: inside `allowed()` at once, elsewhere at the next `allowed()`, and the
    second one anywhere.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.open = False
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        # A forked worker has this handler too, and gets Ctrl-C from the terminal too.
        if os.getpid() != self.process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        again = self.received is not None
        self.received = number
        if self.open or again:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        if self.received is not None:
            raise KeyboardInterrupt
        self.open = True
        try:
            yield
        finally:
            self.open = False
