# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Dynamic batching, for serve.py: what arrives within a few milliseconds shares a packed forward."""

import asyncio
import copy
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

import PIL.Image
import torch
from loading import require_converted
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
PATCHES_OF_GRAPHS = 4096  # about ten images; batches of more patches have their graphs from the second time on
Sample = str | dict[str, Any]  # a text, or the patches of an image


class Encoder:
    """The model by Sentence Transformers: an image to patches, in any thread, and samples to vectors, in one."""

    def __init__(self, checkpoint: str, device: str | None = None, dtype: str = "auto"):
        require_converted(checkpoint)
        options = {"dtype": dtype}
        self.model = SentenceTransformer(checkpoint, device=device, trust_remote_code=True, model_kwargs=options).eval()
        self.tokens = (self.model[0].max_seq_length or 0) if "text" in self.model[0].modalities else 0
        # Of its own: to pad and to count at once, one would disturb the other.
        self.tokenizer = copy.deepcopy(self.model.tokenizer)
        capture_cuda_graphs(self.model)

    def count_tokens(self, texts: list[str]) -> int:
        return sum(len(ids) for ids in self.tokenizer(texts, truncation=True)["input_ids"])

    def prepare(self, data: bytes, max_pixels: int) -> tuple[dict[str, Any], int]:
        """
        Tensors of an image, and the number of its patches.

        Raises:
            PIL.Image.DecompressionBombError: it has more pixels, which is known before it is decoded.
            ValueError: the bytes hold no image, or one that is too narrow.
        """
        try:
            image = PIL.Image.open(BytesIO(data), formats=FORMATS)
            pixels = image.width * image.height
            if pixels <= max_pixels:
                image.load()
        except PIL.Image.DecompressionBombError as error:
            raise type(error)(f"An image may have {max_pixels} pixels. {error}") from error
        except Exception as error:  # decoders raise anything on a broken file
            raise ValueError(f"This is no image that can be read, of {', '.join(FORMATS)}.") from error
        if pixels > max_pixels:
            raise PIL.Image.DecompressionBombError(f"An image may have {max_pixels} pixels, got {pixels}.")
        features = self.model.preprocess([{"image": image}])
        return features, int(features["image_grid_thw"].prod())

    @torch.inference_mode()
    def __call__(self, samples: list[Sample]) -> list[torch.Tensor]:
        """A float32 vector of each, on the CPU."""
        vectors: dict[int, torch.Tensor] = {}
        for kind, together in ((str, self.model.preprocess), (dict, packed)):
            if which := [index for index, sample in enumerate(samples) if isinstance(sample, kind)]:
                chosen: list[Any] = [{"text": samples[i]} if kind is str else samples[i] for i in which]
                features = batch_to_device(together(chosen), self.model.device)
                embedding = self.model(features)["sentence_embedding"]
                vectors.update(zip(which, embedding.float().cpu(), strict=True))
        return [vectors[index] for index in range(len(samples))]


def capture_cuda_graphs(model: torch.nn.Module) -> None:
    """Before the first request: later each new size of a batch would keep others waiting, for tens of milliseconds."""
    for tower in model.modules():
        if hasattr(tower, "capture_cuda_graphs") and tower.device.type == "cuda":
            with suppress(ValueError, RuntimeError):  # no engine runs it, or none can be captured
                for patches in range(64, PATCHES_OF_GRAPHS + 1, 64):
                    tower.capture_cuda_graphs([patches])


def packed(images: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.cat([image[name] for image in images]) if isinstance(value, torch.Tensor) else value
        for name, value in images[0].items()
    }


class Item(NamedTuple):
    sample: Sample
    patches: int
    arrived: float
    vector: asyncio.Future


class Batcher:
    """
    Encodes what waits, as much at once as fits the budget, in a thread of its own. Images are to be decoded only while
    `has_space` is set, as long as less waits than fills two forwards: else decoded images pile up.
    """

    def __init__(self, encode: Callable[[list[Sample]], list[torch.Tensor]], budget: int, wait_seconds: float):
        self.encode, self.budget, self.wait_seconds = encode, budget, wait_seconds
        self.waiting, self.has_arrived = deque[Item](), asyncio.Event()
        self.patches, self.has_space = 0, asyncio.Event()
        self.has_space.set()

    def vector(self, sample: Sample, patches: int) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        item = Item(sample, patches, loop.time(), loop.create_future())
        self.waiting.append(item)
        self.count(patches)
        self.has_arrived.set()
        return item.vector

    def count(self, patches: int) -> None:
        self.patches += patches
        (self.has_space.set if self.patches < 2 * self.budget else self.has_space.clear)()

    def next_batch(self) -> list[Item]:
        batch: list[Item] = []
        patches = 0
        while self.waiting:
            item = self.waiting[0]
            if not item.vector.done():  # else its client has left
                patches += item.patches
                if batch and patches > self.budget:
                    break
                batch.append(item)
            self.waiting.popleft()
            self.count(-item.patches)
        return batch

    def outcomes(self, samples: list[Sample]) -> list:
        """A vector or an error of each; after an error of several, those of its halves: others must not share it."""
        try:
            return self.encode(samples)
        except Exception as error:
            half = len(samples) // 2
            return self.outcomes(samples[:half]) + self.outcomes(samples[half:]) if half else [error]

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while await self.has_arrived.wait():
                await asyncio.sleep(self.waiting[0].arrived + self.wait_seconds - loop.time())
                if batch := self.next_batch():
                    samples = [item.sample for item in batch]
                    outcomes = await loop.run_in_executor(thread, self.outcomes, samples)
                    for item, outcome in zip(batch, outcomes, strict=True):
                        if not item.vector.done():
                            failed = isinstance(outcome, Exception)
                            (item.vector.set_exception if failed else item.vector.set_result)(outcome)
                if not self.waiting:
                    self.has_arrived.clear()
