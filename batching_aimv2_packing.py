# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed batches: filled to a budget of patches on the way in, split or merged on the way out."""

import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler, default_collate, get_worker_info

from .layout_aimv2_packing import kind_of, unpack_features


# Images that are packed together when shuffling: enough to fill nearly every batch, few enough to stay random.
IMAGES_PER_WINDOW = 1024

# Of a stream, so that a batch ends where no example has an image.
EXAMPLES_PER_BATCH = 1024

# What `collate` adds where the examples hold lists of images, or none.
COUNTS = "num_images_per_sample"

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


def merge_patches(features: torch.Tensor, grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """
    Brings squares of neighbouring patches together, as the connectors of Qwen2-VL, InternVL and Ovis take them.

    Args:
        features (`torch.Tensor` of shape `(total_patches, hidden_size)`): Such as `last_hidden_state`, row by row.
        grid_thw (`torch.Tensor` of integers of shape `(num_images, 3)`): Of an image processor with this `merge_size`.
        merge_size (`int`): Side of a square in patches.

    Returns:
        `torch.Tensor` of shape `(total_patches / merge_size**2, merge_size**2 * hidden_size)`: Squares row by row, and
        in each its patches row by row: those of Qwen2-VL's own order, viewed so.

    Raises:
        ValueError: `grid_thw` does not describe `features`, or has sides that are no multiples of `merge_size`.

    Example:
        >>> merge_patches(torch.arange(8.0).view(8, 1), torch.tensor([[1, 2, 4]]), 2)
        tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]])
    """
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ValueError(f"`features` must be a tensor of shape (total_patches, hidden_size), got {kind_of(features)}.")
    images = unpack_features(features, grid_thw)
    if merge_size < 1 or any(side % merge_size for image in images for side in image.shape[1:3]):
        raise ValueError(
            f"Rows and columns of `grid_thw` must be multiples of `merge_size`, {merge_size}, got {grid_thw.tolist()}: "
            "give the image processor the same `merge_size`."
        )
    squares = [
        image.unflatten(2, (-1, merge_size)).unflatten(1, (-1, merge_size)).transpose(2, 3).flatten(0, 2)
        for image in images
    ]
    return torch.cat([features[:0].view(0, merge_size, merge_size, features.shape[1]), *squares]).flatten(1)


class PatchBudgetBatchSampler(Sampler[list[int]]):
    """
    Batches of as many images as fit a budget of patches: the `batch_sampler` of a [`~torch.utils.data.DataLoader`].
    Every image is in exactly one batch, but for those that `num_replicas` repeats or drops.

    Args:
        num_patches (sequence of `int`): Patches of each image of the dataset; 0 for an example without one.
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
            if not 0 <= length <= max_patches_per_batch:
                raise ValueError(
                    f"`num_patches` must be from 0 to `max_patches_per_batch`, {max_patches_per_batch}, got {length} "
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
            empty = [index for index in window if not self.num_patches[index]]
            window = [index for index in window if self.num_patches[index]]
            # Best fit decreasing: the largest image first, each into the fullest batch that it still fits.
            packed: list[list[int]] = []
            unfilled: list[tuple[int, int]] = []
            for index in sorted(window, key=self.num_patches.__getitem__, reverse=True):
                length = self.num_patches[index]
                fullest = bisect_left(unfilled, (length, 0))
                if fullest < len(unfilled):
                    left, batch = unfilled.pop(fullest)
                    packed[batch].append(index)
                else:
                    left, batch = self.max_patches_per_batch, len(packed)
                    packed.append([index])
                insort(unfilled, (left - length, batch))
            # The emptiest batch is what did not come out even: its images go on into the next window.
            carried = packed.pop(unfilled[-1][1]) if packed else []
            # They would all fit the fullest batch.
            for position, index in enumerate(empty):
                if packed:
                    packed[position % len(packed)].append(index)
                else:
                    carried.append(index)
            batches += packed
        if carried:
            batches.append(carried)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class PackedStream(IterableDataset):
    """
    Packed batches of a stream of examples of unknown sizes, in its order, each as full as a budget of patches allows:
    for a [`~torch.utils.data.DataLoader`] with `batch_size=None`. Workers share the examples: an `IterableDataset`
    divides itself among them, as torch asks of it; of anything else each takes every n-th example.

    Args:
        examples (iterable): What `collate` takes, one by one.
        encode (callable): Makes `hidden_states` and `grid_thw` of the images of one example.
        join (callable): Makes a batch of examples and what `encode` made of each.
        max_patches_per_batch (`int`): The budget. A batch has at most 1,024 examples as well.

    Raises:
        ValueError: when it is read: an example alone exceeds the budget, or what `collate` refuses.
    """

    def __init__(self, examples: Iterable, encode: Callable, join: Callable, max_patches_per_batch: int):
        self.examples = examples
        self.encode = encode
        self.join = join
        self.max_patches_per_batch = max_patches_per_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pairs = ((example, self.encode(example)) for example in self._own_examples())
        for batch in pack_in_order(pairs, self._length, self.max_patches_per_batch, EXAMPLES_PER_BATCH):
            yield self.join([example for example, _ in batch], [inputs for _, inputs in batch])

    def _own_examples(self) -> Iterable:
        worker = get_worker_info()
        if worker is None or isinstance(self.examples, IterableDataset):
            return self.examples
        return islice(self.examples, worker.id, None, worker.num_workers)

    def _length(self, pair: tuple) -> int:
        length = len(pair[1]["hidden_states"])
        if length > self.max_patches_per_batch:
            raise ValueError(
                f"An example must have at most `max_patches_per_batch`, {self.max_patches_per_batch}, patches, got "
                f"{length}."
            )
        return length


def sizes_of(entry: Any, index: int) -> list[list[int]]:
    """
    Height and width of each image of an example, given as one such pair or a list of them.

    Raises:
        ValueError: it is neither.
    """
    try:
        sizes = np.asarray(entry)
    except ValueError:  # pairs and others
        sizes = np.empty(1)
    if sizes.size and (sizes.dtype.kind not in "iu" or sizes.ndim not in (1, 2) or sizes.shape[-1] != 2):
        raise ValueError(
            "`image_sizes` must hold a pair of integers, (height, width) in pixels, or a list of such pairs per "
            f"example, got {entry!r} for example {index}."
        )
    return sizes.reshape(-1, 2).tolist()


def images_of(example: Any, image_column: str) -> list:
    """The images of an example: of a list or a 4-dimensional array all, of `None` none."""
    value = example[image_column] if isinstance(example, Mapping) else example
    return [] if value is None else flat_list(value)


def flat_list(images: Any) -> list:
    """The images of nested lists and of 4-dimensional arrays, one by one."""
    if is_list(images):
        return [image for element in images for image in flat_list(element)]
    return list(images) if is_video(images) else [images]


def is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        # As the library datasets gives images of different sizes with its NumPy format.
        return value.dtype == object
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def is_video(value: Any) -> bool:
    """Whether this element of a list is a video rather than a frame."""
    return is_list(value) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4)


def frames_alone(video: Any) -> Any:
    """The frames of the pair of frames and metadata that `load_video` returns, or of a decoder; else what is given."""
    if isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], Mapping):
        return frames_alone(video[0])
    is_decoder = hasattr(type(video), "__getitem__") and hasattr(type(video), "__len__")
    if not is_decoder or isinstance(video, (np.ndarray, torch.Tensor, Sequence, Mapping)):
        return video
    return [video[index] for index in range(len(video))]


def collated(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """
    Columns of texts as the tokenizer pads them, `labels` with -100, and all others as `default_collate` makes them.

    Raises:
        ValueError: the rows have different columns, or the values of one are of different lengths.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    padded = ("labels", *tokenizer.model_input_names) if tokenizer is not None else ()
    texts = [name for name in padded if name in columns and np.ndim(columns[name][0]) == 1]
    batch = {}
    for name in columns.keys() - texts:
        try:
            batch[name] = default_collate(columns[name])
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(
                f"The values of the column {name!r} must be numbers, texts or arrays, of one kind and one shape: of "
                f"tokens, give `tokenizer`, which pads {('labels', 'input_ids', '...')}. {error}"
            ) from error
    if texts:
        # Not at the top: a loader that packs needs torch alone.
        from transformers.data.data_collator import DataCollatorForSeq2Seq

        values = [{name: torch.as_tensor(row[name]).tolist() for name in texts} for row in rows]
        padded_texts = DataCollatorForSeq2Seq(tokenizer)(values)
        # Where no text is a label, it gives `labels` as `None`.
        batch.update({name: value for name, value in padded_texts.items() if value is not None})
    return {name: batch[name] for name in [*columns, *batch]}


class PackedBatchesMixin:
    """What an image processor does for batches and videos, with its `preprocess` and `target_size`."""

    preprocess: Callable[..., Any]
    target_size: Callable[..., Any]
    model_input_names: list[str]
    patch_size: int

    unpack_features = staticmethod(unpack_features)
    merge_patches = staticmethod(merge_patches)

    @property
    def padding_value(self):
        # Pipelines read this only to batch, by rules that would cut packed patches up wrongly without a word.
        raise ValueError(
            "A pipeline cannot batch packed patches: leave `batch_size` at 1, or call the processor on a list of "
            "images and the model on the result."
        )

    def collate(
        self,
        examples: list,
        image_column: str = "image",
        tokenizer: Any = None,
        max_patches_per_batch: int | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """
        Makes one packed batch of a dataset's examples: the `collate_fn` of a [`~torch.utils.data.DataLoader`].

        Args:
            examples (`list`): An image, a list of images or `None` each, or dictionaries that hold one, as those of
                the library datasets.
            image_column (`str`, *optional*, defaults to `"image"`): The key of the images.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Pads `input_ids` and what else it calls
                its inputs, and `labels` with -100.
            max_patches_per_batch (`int`, *optional*): The most patches that the batch may have.
            kwargs: As for images.

        Returns:
            `dict`: `hidden_states`, `grid_thw`, every other column as [`~torch.utils.data.default_collate`] makes it,
            and, where not every example holds one image, `num_images_per_sample`, int64 of shape `(len(examples),)`.

        Raises:
            ValueError: an example has no `image_column`, a column called as one of the outputs, or not the columns of
                the others; or there are more patches than `max_patches_per_batch`.
        """
        self._check_columns(examples, image_column)
        images = [image for example in examples for image in images_of(example, image_column)]
        inputs = self._encode(images, **kwargs)
        if max_patches_per_batch is not None and len(inputs["hidden_states"]) > max_patches_per_batch:
            raise ValueError(
                f"A batch must have at most `max_patches_per_batch`, {max_patches_per_batch}, patches, got "
                f"{len(inputs['hidden_states'])}: the sampler was given other sizes or arguments."
            )
        return self._join(examples, [inputs], image_column, tokenizer)

    def batch_sampler(
        self,
        image_sizes: Iterable,
        max_patches_per_batch: int,
        images_kwargs: dict | None = None,
        **kwargs,
    ) -> PatchBudgetBatchSampler:
        """
        Batches of about the same number of patches: the `batch_sampler` of a [`~torch.utils.data.DataLoader`].

        Args:
            image_sizes (iterable of `(height, width)`): Of each image of the dataset, in pixels; a list of such pairs
                for an example of several images, or none.
            max_patches_per_batch (`int`): The budget.
            images_kwargs (`dict`, *optional*): Arguments for images that `collate` is called with too.
            kwargs: `shuffle`, `seed`, `num_replicas`, `rank` and `drop_last` of [`PatchBudgetBatchSampler`].

        Raises:
            ValueError: an example exceeds the budget, or has a size that is none or that the call would refuse.
        """
        count = self.target_size(images_kwargs).num_patches
        num_patches = [sum(count(*size) for size in sizes_of(entry, index)) for index, entry in enumerate(image_sizes)]
        return PatchBudgetBatchSampler(num_patches, max_patches_per_batch, **kwargs)

    def packing(
        self,
        image_sizes: Iterable,
        max_patches_per_batch: int,
        images_kwargs: dict | None = None,
        image_column: str = "image",
        tokenizer: Any = None,
        **kwargs,
    ) -> tuple[PatchBudgetBatchSampler, Callable[[list], dict[str, Any]]]:
        """
        `batch_sampler` and `collate_fn` of a [`~torch.utils.data.DataLoader`], with the same arguments and budget.

        Args: as of `batch_sampler` and `collate`.

        Example:
                sampler, collate_fn = processor.packing(sizes, 16384, {"max_patches": 1024}, shuffle=True)
                loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn)
        """
        sampler = self.batch_sampler(image_sizes, max_patches_per_batch, images_kwargs, **kwargs)
        fixed = {"image_column": image_column, "tokenizer": tokenizer, "max_patches_per_batch": max_patches_per_batch}
        return sampler, partial(self.collate, **fixed, **(images_kwargs or {}))

    def packed_stream(
        self,
        examples: Iterable,
        max_patches_per_batch: int,
        images_kwargs: dict | None = None,
        image_column: str = "image",
        tokenizer: Any = None,
    ) -> PackedStream:
        """
        The batches of `collate`, filled to a budget from a stream of examples of unknown sizes: a [`PackedStream`].

        Args: as of `batch_sampler` and `collate`.

        Example:
                loader = DataLoader(processor.packed_stream(examples, 16384), batch_size=None, num_workers=4)
        """
        self.target_size(images_kwargs)
        encode = partial(self._encode_example, image_column=image_column, images_kwargs=images_kwargs or {})
        join = partial(self._join, image_column=image_column, tokenizer=tokenizer)
        return PackedStream(examples, encode, join, max_patches_per_batch)

    def _check_columns(self, examples: list, image_column: str) -> None:
        mappings = [example for example in examples if isinstance(example, Mapping)]
        reserved = {*self.model_input_names, COUNTS}
        for example in mappings:
            if image_column not in example or not reserved.isdisjoint(example):
                raise ValueError(
                    f"Examples must have the column `image_column`, {image_column!r}, and none of {sorted(reserved)}, "
                    f"got {sorted(example)}."
                )
            if example.keys() != mappings[0].keys():
                raise ValueError(
                    f"Examples must have the same columns, got {sorted(mappings[0])} and {sorted(example)}."
                )
        if mappings and len(mappings) < len(examples):
            raise ValueError("Examples must all be images or all be dictionaries, got both.")

    def _encode_example(self, example: Any, image_column: str, images_kwargs: dict) -> Any:
        self._check_columns([example], image_column)
        return self._encode(images_of(example, image_column), **images_kwargs)

    def _encode(self, images: list, **kwargs) -> Any:
        if images:
            return self.preprocess(images, return_tensors="pt", **kwargs)
        patch_dim = 3 * self.target_size(kwargs).patch_size ** 2
        return {"hidden_states": torch.empty(0, patch_dim), "grid_thw": torch.empty(0, 3, dtype=torch.int64)}

    def _join(self, examples: list, inputs: list, image_column: str, tokenizer: Any) -> dict[str, Any]:
        self._check_columns(examples, image_column)
        batch, values = {}, examples
        if examples and isinstance(examples[0], Mapping):
            batch = collated([{k: v for k, v in row.items() if k != image_column} for row in examples], tokenizer)
            values = [row[image_column] for row in examples]
        if any(value is None or is_list(value) or is_video(value) for value in values):
            batch[COUNTS] = torch.tensor([len(images_of(value, image_column)) for value in values])
        return {**batch, **{name: torch.cat([one[name] for one in inputs]) for name in self.model_input_names}}

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """
        Patches of an image of `height` x `width` pixels, without the image: what a batch sampler needs to know. After
        [`merge_patches`] there are `merge_size**2` times fewer.

        Args:
            height (`int`), width (`int`): Size of the image in pixels.
            images_kwargs (`dict`, *optional*): Arguments of the call that differ from this processor's own.

        Raises:
            ValueError: a size, or an argument, that the call would refuse.
        """
        return self.target_size(images_kwargs).num_patches(height, width)

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """As `get_number_of_image_patches`, of a video of `num_frames` frames that `preprocess_videos` takes."""
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        return num_frames * self.target_size(videos_kwargs).num_patches(height, width)

    def preprocess_videos(self, videos, return_tensors: str | None = None, **kwargs) -> Any:
        """
        Turns videos into packed patches, one row of `grid_thw` per video. A frame is treated exactly as an image is.

        Args:
            videos: One video or a list of them. A video is a list of frames, each whatever this processor takes for an
                image, or an array of shape `(t, channels, height, width)` or `(t, height, width, channels)`, or the
                pair of frames and metadata that [`~transformers.video_utils.load_video`] decodes from a file
                (`pip install av`), or a decoder with `len(video)` and `video[index]`, as torchcodec's.
            return_tensors (`str`, *optional*): As for images.
            kwargs: As for images; `max_patches` holds for a frame.

        Returns:
            [`~transformers.BatchFeature`]: `hidden_states` of shape `(total_patches, channels * patch_size**2)`, frame
            by frame, and `grid_thw` of shape `(num_videos, 3)`.

        Raises:
            ValueError: a video has no frames, or frames of different sizes; or as for images.
        """
        if isinstance(videos, (str, os.PathLike)):
            raise ValueError(
                f"`videos` must be decoded frames, got {os.fspath(videos)!r}. To decode a file: `pip install av`, then "
                "`frames, _ = transformers.video_utils.load_video(path, num_frames=16, backend='pyav')`."
            )
        videos = frames_alone(videos)
        videos = [frames_alone(video) for video in videos] if is_list(videos) else videos
        if isinstance(videos, (np.ndarray, torch.Tensor)):
            if videos.ndim not in (4, 5):
                raise ValueError(
                    "`videos` must be an array of shape (t, channels, height, width) or (t, height, width, channels), "
                    f"or a batch of such, got shape {tuple(videos.shape)}."
                )
            videos = videos if videos.ndim == 5 else [videos]
        elif not is_list(videos):
            raise ValueError(f"`videos` must be a list of frames or videos, or an array, got {type(videos).__name__}.")
        elif not any(is_video(video) for video in videos):
            videos = [videos]
        elif not all(is_video(video) for video in videos):
            raise ValueError("`videos` must be frames or videos, got a list of both.")
        videos = [flat_list(video) for video in videos]
        lengths = [len(video) for video in videos]
        for index, length in enumerate(lengths):
            if not length:
                raise ValueError(f"A video must have at least one frame, got none for video {index}.")
        inputs = self.preprocess(flat_list(videos), **kwargs)
        grids = np.asarray(inputs["grid_thw"])
        first = np.cumsum([0, *lengths])
        for index, (start, stop) in enumerate(pairwise(first)):
            if (grids[start:stop] != grids[start]).any():
                sizes = sorted({(h, w) for _, h, w in grids[start:stop].tolist()})
                raise ValueError(f"The frames of a video must have one size, got grids {sizes} for video {index}.")
        grid_thw = np.column_stack([lengths, grids[first[:-1], 1:]])
        data = {"hidden_states": inputs["hidden_states"], "grid_thw": grid_thw}
        return type(inputs)(data=data, tensor_type=return_tensors)


__all__ = [
    "PackedBatchesMixin",
    "PackedStream",
    "PatchBudgetBatchSampler",
    "merge_patches",
    "pack_in_order",
    "unpack_features",
]
