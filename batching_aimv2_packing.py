# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed batches: filled to a budget of patches on the way in, split into images on the way out."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


# Images that are packed together when shuffling: enough to fill nearly every batch, few enough to stay random.
IMAGES_PER_WINDOW = 1024


def unpack_features(features: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
    """
    Splits packed features into one map per image or video.

    Args:
        features (`torch.Tensor` of shape `(total_patches, ...)`): Such as `last_hidden_state`.
        grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): What the model was called with.

    Returns:
        `list[torch.Tensor]`: Views of `features`, each of shape `(t, h, w, ...)`.

    Raises:
        ValueError: `grid_thw` does not describe as many patches as `features` holds.
    """
    grids = grid_thw.tolist()
    lengths = [t * h * w for t, h, w in grids]
    if sum(lengths) != len(features):
        raise ValueError(f"`grid_thw` describes {sum(lengths)} patches, but `features` holds {len(features)}.")
    return [part.unflatten(0, grid) for part, grid in zip(features.split(lengths), grids, strict=True)]


class PatchBudgetBatchSampler(Sampler[list[int]]):
    """
    Batches of as many images as fit a budget of patches: the `batch_sampler` of a [`~torch.utils.data.DataLoader`].
    Every image is in exactly one batch, but for those that `num_replicas` repeats or drops.

    Args:
        num_patches (sequence of `int`): Patches of each image of the dataset.
        max_patches_per_batch (`int`): The budget.
        shuffle (`bool`, *optional*, defaults to `False`): Whether images come in a random order, which also fills the
            batches best. Otherwise they keep the dataset's order, through and across batches.
        seed (`int`, *optional*, defaults to 0): Of the random order, the same on every replica.
        num_replicas (`int`, *optional*, defaults to 1): Processes that share the dataset. All get the same number of
            batches.
        rank (`int`, *optional*, defaults to 0): This process.
        drop_last (`bool`, *optional*, defaults to `False`): Whether the replicas get an equal number of batches by
            dropping some rather than by repeating some, as in [`~torch.utils.data.DistributedSampler`].

    Raises:
        ValueError: an image exceeds the budget, or a number has an impossible value.
    """

    def __init__(
        self,
        num_patches: Sequence[int],
        max_patches_per_batch: int,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ):
        if not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` must be in [0, `num_replicas`), got {rank} and {num_replicas}.")
        self.num_patches = [int(length) for length in num_patches]
        for index, length in enumerate(self.num_patches):
            if not 1 <= length <= max_patches_per_batch:
                raise ValueError(
                    f"`num_patches` must be from 1 to `max_patches_per_batch`, {max_patches_per_batch}, got {length} "
                    f"for image {index}."
                )
        self.max_patches_per_batch = max_patches_per_batch
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Makes another random order; call it before each epoch, as on a `DistributedSampler`."""
        batches = self._shuffled_batches(self.seed + epoch) if self.shuffle else self._ordered_batches()
        if self.drop_last:
            batches = batches[: len(batches) // self.num_replicas * self.num_replicas]
        elif batches:
            missing = -len(batches) % self.num_replicas
            batches += [batches[index % len(batches)] for index in range(missing)]
        self.batches = batches[self.rank :: self.num_replicas]

    def _ordered_batches(self) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for index, length in enumerate(self.num_patches):
            if not batches or length > room:
                batches.append([])
                room = self.max_patches_per_batch
            batches[-1].append(index)
            room -= length
        return batches

    def _shuffled_batches(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.num_patches), generator=generator).tolist()
        batches: list[list[int]] = []
        carried: list[int] = []
        for first in range(0, len(order), IMAGES_PER_WINDOW):
            window = carried + order[first : first + IMAGES_PER_WINDOW]
            # Best fit decreasing: the largest image first, each into the fullest batch that still has room for it.
            packed: list[list[int]] = []
            rooms: list[tuple[int, int]] = []
            for index in sorted(window, key=self.num_patches.__getitem__, reverse=True):
                length = self.num_patches[index]
                place = bisect_left(rooms, (length, 0))
                if place < len(rooms):
                    room, batch = rooms.pop(place)
                    packed[batch].append(index)
                else:
                    room, batch = self.max_patches_per_batch, len(packed)
                    packed.append([index])
                insort(rooms, (room - length, batch))
            # The emptiest batch is what did not come out even: its images go on into the next window.
            carried = packed.pop(rooms[-1][1])
            batches += packed
        if carried:
            batches.append(carried)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


__all__ = ["PatchBudgetBatchSampler", "unpack_features"]
