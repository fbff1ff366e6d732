# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed batches: filled to a budget of patches on the way in, split into images on the way out."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler


# Images that are packed together when shuffling: enough to fill nearly every batch, few enough to stay random.
IMAGES_PER_WINDOW = 1024

Item = TypeVar("Item")


def pack_in_order(
    items: Iterable[Item], length: Callable[[Item], int], budget: int, max_items: int | None = None
) -> Iterator[list[Item]]:
    """
    Groups of neighbours whose lengths sum to at most a budget, each as large as fits. Items keep their order, and a
    group is given as soon as it is known to be whole, so that `items` may be an endless stream.

    Args:
        items (iterable): What is packed, such as images, or indices of them.
        length (callable): The length of an item, 0 or more; called once for each.
        budget (`int`): Of a group. A longer item shares its group with items of length 0 alone.
        max_items (`int`, *optional*): The most items of a group.

    Returns:
        Iterator of `list`: The groups, none of them empty.

    Example:
        >>> lengths = [3, 4, 2, 9, 1]
        >>> list(pack_in_order(range(5), lengths.__getitem__, 8))
        [[0, 1], [2], [3], [4]]
    """
    group: list[Item] = []
    filled = 0
    for item in items:
        own = length(item)
        if filled and filled + own > budget:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += own
        if filled >= budget or len(group) == max_items:
            yield group
            group, filled = [], 0
    if group:
        yield group


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
        if self.shuffle:
            batches = self._shuffled_batches(self.seed + epoch)
        else:
            lengths = self.num_patches
            batches = list(pack_in_order(range(len(lengths)), lengths.__getitem__, self.max_patches_per_batch))
        if self.drop_last:
            batches = batches[: len(batches) // self.num_replicas * self.num_replicas]
        elif batches:
            missing = -len(batches) % self.num_replicas
            batches += [batches[index % len(batches)] for index in range(missing)]
        self.batches = batches[self.rank :: self.num_replicas]

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


__all__ = ["PatchBudgetBatchSampler", "pack_in_order", "unpack_features"]
