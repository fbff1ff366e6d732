# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Image processor of the packed AIMv2 encoder: images of any sizes in, `hidden_states` and `grid_thw` out."""

import base64
import math
import os
from collections.abc import Iterable, Mapping
from functools import cache
from io import BytesIO
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.utils import httpx
from torch.utils.data import default_collate
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorKwargs,
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.utils import is_torchvision_available

from .batching_aimv2_packing import PatchBudgetBatchSampler, unpack_features


# A file is opened by its content, whatever its name says, so these alone are tried. Left out are formats that PIL gives
# to another program (EPS, to Ghostscript) or to the system (WMF), formats without a signature, for which any bytes may
# pass (TGA), and rare ones. JPEG includes MPO; HEIF needs the plugin pillow-heif.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")

# Of smart_resize; beyond it the shortest edge's enlargement would also exhaust the memory.
MAX_ASPECT_RATIO = 200

# What the fields below replace, and what AIMv2 has not.
UNUSED_KWARGS = {"size", "crop_size", "pad_size", "do_center_crop", "do_pad", "min_pixels", "max_pixels"}


class Aimv2PackingImageProcessorKwargs(Qwen2VLImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    r"""
    image_size (`int`, *optional*):
        Side of the square that each image becomes: its shortest edge is resized to it, then the centre is cropped, as
        [`~transformers.CLIPImageProcessor`] does. `None` is the native mode: the aspect ratio is kept and the sides
        are rounded to multiples of `patch_size`.
    min_patches (`int`, *optional*, defaults to 112):
        Native mode only: an image of fewer patches is enlarged to about this many. A smaller `max_patches` that is
        given alone lowers it.
    max_patches (`int`, *optional*, defaults to 4096):
        Native mode only: an image of more patches is reduced to at most this many. Per frame for a video.
    patch_layout (`str`, *optional*, defaults to `"channels_first"`):
        Order of the values inside one patch, as in the model's configuration: `"channels_first"` or
        `"channels_last"`.
    """

    image_size: int | None
    min_patches: int
    max_patches: int
    patch_layout: str


def image_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that this PIL and its plugins read: the argument `formats` of `PIL.Image.open`."""
    PIL.Image.init()
    return [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]


@cache
def image_suffixes() -> frozenset[str]:
    """Of the files that PIL writes in these formats, such as `".jpg"`, in lower case."""
    # MPO is read as a kind of JPEG.
    formats = {*image_formats(), "MPO"}
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats)


def open_image(source: str | os.PathLike | BinaryIO) -> PIL.Image.Image:
    """
    The decoded image of a path, a URL, base64 or an open file, in its own mode: transformers' `load_image` converts it,
    and would lose transparency and 16-bit values.

    Raises:
        FileNotFoundError: `source` is a path of no file, and neither a URL nor base64.
        ValueError: a data URI is not in base64.
        OSError: it holds no image of `IMAGE_FORMATS`, or a broken one.
        `httpx.HTTPError`: the URL cannot be read.
    """
    described = repr(source)
    if len(described) > 200:
        described = described[:200] + "..."
    file: Any = source
    is_guess = False
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        file = BytesIO(httpx.get(source, follow_redirects=True).raise_for_status().content)
    elif isinstance(source, str) and not os.path.exists(source):
        # A wrong path of letters and slashes alone is base64 too.
        is_guess = not source.startswith("data:")
        try:
            file = BytesIO(base64.b64decode(source.rsplit(",", maxsplit=1)[-1], validate=True))
        except ValueError as error:
            if is_guess:
                raise FileNotFoundError(f"No such image file: {described}, and it is no URL or base64.") from error
            raise ValueError(f"A data URI of an image must be base64, got {described}.") from error
    try:
        with PIL.Image.open(file, formats=image_formats()) as image:
            # Before the file is closed; thousands of lazy images would exhaust the file handles.
            image.load()
            return image
    except FileNotFoundError:
        raise
    except PIL.UnidentifiedImageError as error:
        if is_guess:
            raise FileNotFoundError(f"No such image file: {described}, and as base64 it holds no image.") from error
        raise OSError(f"{described} holds no image of the formats {', '.join(image_formats())}.") from error
    except Exception as error:
        # Decoders raise anything on a broken file: SyntaxError, struct.error, EOFError, ...
        raise OSError(f"Cannot read an image from {described}: {error}") from error


def upright_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    The image turned as its EXIF orientation says, with at most 8 bits per channel.

    Raises:
        ValueError: the mode has no defined range (`"I"`, `"F"`).
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} has no defined range of values: convert it to 'L', 'RGB' or 'I;16', or "
            "give an array."
        )
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # PIL's own conversion cuts every value above 255 off.
        values = np.asarray(image).astype(np.uint32)
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image


def checked_array(
    image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None, do_rescale: bool
) -> torch.Tensor:
    """
    The array as `(channels, height, width)`: uint8, or floating-point as it was.

    Raises:
        ValueError: not `(height, width)`, `(channels, height, width)` or `(height, width, channels)`; values that are
            not finite, or not in the range of their dtype (0 to 65535 for uint16, else 0 to 255).
    """
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(
            "An image must be an array of shape (height, width), (channels, height, width) or (height, width, "
            f"channels), none of them 0, got shape {tuple(image.shape)}."
        )
    if input_data_format is None:
        channels = (1, 3, 4)
        if image.shape[0] in channels and image.shape[2] in channels:
            raise ValueError(
                f"The shape {tuple(image.shape)} of an image does not tell which dimension holds the channels: give "
                "`input_data_format`, 'channels_first' or 'channels_last'."
            )
        input_data_format = infer_channel_dimension_format(image, num_channels=channels)
    if input_data_format == ChannelDimension.LAST:
        image = image.permute(2, 0, 1)

    if image.is_floating_point():
        low, high = (bound.item() for bound in image.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("An image must hold finite values, got NaN or infinity.")
        if do_rescale and low >= 0 and 0 < high <= 1:
            raise ValueError(
                f"An image holds floats from {low:.4g} to {high:.4g}, which `do_rescale` would divide by "
                "255 once more: give `do_rescale=False`."
            )
        return image
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool or image.is_complex():
        raise ValueError(f"An image must hold integers or floats, got {image.dtype}.")
    sixteen_bit = image.dtype == torch.uint16
    image = image.to(torch.int64)
    low, high = (int(bound) for bound in image.aminmax())
    if sixteen_bit:
        image = (image + 128) // 257
    elif low < 0 or high > 255:
        raise ValueError(f"An image of integers must hold 0 to 255 (uint16: 0 to 65535), got {low} to {high}.")
    return image.to(torch.uint8)


def native_grid(height: int, width: int, patch_size: int, min_patches: int, max_patches: int) -> tuple[int, int]:
    """
    Rows and columns of patches of an image of `height` x `width` pixels in native mode: Qwen2-VL's `smart_resize`,
    and never more than `max_patches`.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    area = patch_size**2
    sides = smart_resize(height, width, patch_size, min_patches * area, max_patches * area)
    rows, columns = (side // patch_size for side in sides)
    if rows * columns > max_patches:
        # smart_resize rounds a strip's short side, or a side that it enlarges, up.
        short = min(rows, columns, math.isqrt(max_patches))
        rows, columns = (short, max_patches // short) if rows <= columns else (max_patches // short, short)
    return rows, columns


def lower_minimum(given: Mapping[str, Any], min_patches: int) -> dict[str, Any]:
    """The arguments `given`, where a `max_patches` without `min_patches` lowers the `min_patches` that would hold."""
    maximum = given.get("max_patches")
    if type(maximum) is int and maximum < min_patches and given.get("min_patches") is None:
        return {**given, "min_patches": maximum}
    return dict(given)


def is_video(value: Any) -> bool:
    """Whether this element of a list is a video rather than a frame."""
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4)


class Aimv2PackingImageProcessorMixin(BaseImageProcessor):
    """What both backends share; mixed into a Qwen2-VL image processor."""

    patch_size = 14
    temporal_patch_size = 1
    merge_size = 1
    size = None
    image_size = None
    min_patches = 112
    max_patches = 4096
    patch_layout = "channels_first"
    valid_kwargs = Aimv2PackingImageProcessorKwargs
    model_input_names = ["hidden_states", "grid_thw"]
    backend_class: Any

    def __init__(self, **kwargs):
        # Past Qwen2-VL's own, which fills in a `size`.
        self.backend_class.__init__(self, **lower_minimum(kwargs, self.min_patches))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        saved = image_processor_dict.get("min_patches", cls.min_patches)
        return super().from_dict(image_processor_dict, **lower_minimum(kwargs, saved))

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        return super().preprocess(images, *args, **lower_minimum(kwargs, self.min_patches))

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        if unused := sorted(name for name in UNUSED_KWARGS if kwargs.get(name) is not None):
            raise ValueError(
                f"`{unused[0]}` is not used by this image processor, got {kwargs[unused[0]]!r}: give `image_size` "
                "for a fixed resolution, or `min_patches` and `max_patches`."
            )
        for name in ("temporal_patch_size", "merge_size"):
            if kwargs[name] != 1:
                raise ValueError(f"`{name}` must be 1 for AIMv2, got {kwargs[name]!r}.")
        for name in ("patch_size", "max_patches", "min_patches"):
            if type(kwargs[name]) is not int or kwargs[name] < 1:
                raise ValueError(f"`{name}` must be a positive int, got {kwargs[name]!r}.")
        if kwargs["min_patches"] > kwargs["max_patches"]:
            raise ValueError(
                f"`min_patches` must not exceed `max_patches`, got {kwargs['min_patches']} and {kwargs['max_patches']}."
            )
        image_size, patch_size = kwargs["image_size"], kwargs["patch_size"]
        if image_size is not None and (type(image_size) is not int or image_size < 1 or image_size % patch_size):
            raise ValueError(
                f"`image_size` must be None or a positive multiple of `patch_size`, got {image_size!r} and "
                f"{patch_size}."
            )
        if kwargs["patch_layout"] not in ("channels_first", "channels_last"):
            raise ValueError(
                f"`patch_layout` must be 'channels_first' or 'channels_last', got {kwargs['patch_layout']!r}."
            )
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        # There is always a size to resize to, though none is called `size`.
        super()._validate_preprocess_kwargs(**{**kwargs, "size": SizeDict()})

    def fetch_images(self, image_url_or_urls):
        """Reads paths, URLs and base64 strings; passes images on, with a channel dimension where they have none."""
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return open_image(image_url_or_urls)
        images = super().fetch_images(image_url_or_urls)
        return images[None] if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 2 else images

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, do_rescale=None, **kwargs):
        if not isinstance(image, PIL.Image.Image):
            image = checked_array(image, input_data_format, do_rescale)
            input_data_format = ChannelDimension.FIRST
            if do_convert_rgb and image.shape[0] == 4:
                if image.dtype != torch.uint8:
                    raise ValueError(f"An image with an alpha channel must hold integers, got {image.dtype}.")
                image = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            elif do_convert_rgb and image.shape[0] == 1:
                image = image.expand(3, -1, -1)
        if isinstance(image, PIL.Image.Image):
            image, input_data_format = upright_image(image), None
        image = super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, do_rescale=do_rescale, **kwargs
        )
        height, width = image.shape[-2:]
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"The long side of an image must be at most {MAX_ASPECT_RATIO} times the short one, got {height} x "
                f"{width} pixels."
            )
        return image

    def resize(self, images, size: SizeDict, resample, factor: int, **kwargs):
        height, width = images.shape[-2:]
        if size.longest_edge is None:
            square = SizeDict(height=size.shortest_edge, width=size.shortest_edge)
            return self.center_crop(self.backend_class.resize(self, images, size=size, resample=resample), square)
        bounds = (pixels // factor**2 for pixels in (size.shortest_edge, size.longest_edge))
        rows, columns = native_grid(height, width, factor, *bounds)
        target = SizeDict(height=rows * factor, width=columns * factor)
        return self.backend_class.resize(self, images, size=target, resample=resample)

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        size: None,
        patch_size: int,
        image_size: int | None,
        min_patches: int,
        max_patches: int,
        patch_layout: str,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("`images` must hold at least one image, got none.")
        if image_size is None:
            target = SizeDict(shortest_edge=min_patches * patch_size**2, longest_edge=max_patches * patch_size**2)
        else:
            target = SizeDict(shortest_edge=image_size)
        for image in images:
            height, width = image.shape[-2:]
            if not do_resize and (height % patch_size or width % patch_size):
                raise ValueError(
                    f"With `do_resize=False` the sides of an image must be multiples of `patch_size`, {patch_size}, "
                    f"got {height} x {width}."
                )
        features = super()._preprocess(
            images, do_resize=do_resize, size=target, patch_size=patch_size, return_tensors=None, **kwargs
        )
        hidden_states = features["pixel_values"]
        if patch_layout == "channels_last":
            patches = hidden_states.reshape(len(hidden_states), -1, patch_size, patch_size)
            hidden_states = patches.swapaxes(1, 2).swapaxes(2, 3).reshape(hidden_states.shape)
        if isinstance(hidden_states, torch.Tensor):
            hidden_states = hidden_states.to(torch.float32)
        data = {"hidden_states": hidden_states, "grid_thw": features["image_grid_thw"]}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def preprocess_videos(self, videos, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """
        Turns videos into packed patches, one row of `grid_thw` per video. A frame is treated exactly as an image is.

        Args:
            videos: One video or a list of them. A video is a list of frames, each whatever this processor takes for an
                image, or an array of shape `(t, channels, height, width)` or `(t, height, width, channels)`, such as
                [`~transformers.video_utils.load_video`] decodes from a file (`pip install av`).
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
        if isinstance(videos, (np.ndarray, torch.Tensor)):
            videos = videos if videos.ndim == 5 else [videos]
        elif not any(is_video(video) for video in videos):
            videos = [videos]
        elif not all(is_video(video) for video in videos):
            raise ValueError("`videos` must be frames or videos, got a list of both.")
        lengths = [len(video) for video in videos]
        for index, length in enumerate(lengths):
            if not length:
                raise ValueError(f"A video must have at least one frame, got none for video {index}.")
        inputs = self.preprocess([frame for video in videos for frame in video], **kwargs)
        grids = np.asarray(inputs["grid_thw"])
        first = np.cumsum([0, *lengths])
        for index, (start, stop) in enumerate(pairwise(first)):
            if (grids[start:stop] != grids[start]).any():
                sizes = sorted({(h, w) for _, h, w in grids[start:stop].tolist()})
                raise ValueError(f"The frames of a video must have one size, got grids {sizes} for video {index}.")
        grid_thw = np.column_stack([lengths, grids[first[:-1], 1:]])
        data = {"hidden_states": inputs["hidden_states"], "grid_thw": grid_thw}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def collate(self, examples: list, image_column: str = "image", **kwargs) -> dict[str, Any]:
        """
        Makes one packed batch of a dataset's examples: the `collate_fn` of a [`~torch.utils.data.DataLoader`].

        Args:
            examples (`list`): Images, or dictionaries that hold one, as those of the library datasets.
            image_column (`str`, *optional*, defaults to `"image"`): The key of the image.
            kwargs: As for images.

        Returns:
            `dict`: `hidden_states`, `grid_thw`, and every other column as
            [`~torch.utils.data.default_collate`] makes it.

        Raises:
            ValueError: an example has no `image_column`, or a column called as one of the outputs.
        """
        columns: dict[str, Any] = {}
        if all(isinstance(example, Mapping) for example in examples):
            names = set(examples[0]) if examples else set()
            if image_column not in names or not names.isdisjoint(self.model_input_names):
                raise ValueError(
                    f"Examples must have the column `image_column`, {image_column!r}, and none of "
                    f"{self.model_input_names}, got {sorted(names)}."
                )
            columns = default_collate([{k: v for k, v in row.items() if k != image_column} for row in examples])
            examples = [example[image_column] for example in examples]
        return {**columns, **self.preprocess(examples, return_tensors="pt", **kwargs)}

    def batch_sampler(
        self,
        image_sizes: Iterable[tuple[int, int]],
        max_patches_per_batch: int,
        images_kwargs: dict | None = None,
        **kwargs,
    ) -> PatchBudgetBatchSampler:
        """
        Batches of about the same number of patches: the `batch_sampler` of a [`~torch.utils.data.DataLoader`].

        Args:
            image_sizes (iterable of `(height, width)`): Of each image of the dataset, in pixels.
            max_patches_per_batch (`int`): The budget.
            images_kwargs (`dict`, *optional*): Arguments for images that `collate` is called with too.
            kwargs: `shuffle`, `seed`, `num_replicas`, `rank` and `drop_last` of [`PatchBudgetBatchSampler`].

        Raises:
            ValueError: an image exceeds the budget, or has a side more than 200 times the other.
        """
        num_patches = [self.get_number_of_image_patches(*size, images_kwargs) for size in image_sizes]
        return PatchBudgetBatchSampler(num_patches, max_patches_per_batch, **kwargs)

    image_suffixes = staticmethod(image_suffixes)
    open_image = staticmethod(open_image)
    unpack_features = staticmethod(unpack_features)

    @property
    def padding_value(self):
        # Pipelines read this only to batch, by rules that would cut packed patches up wrongly without a word.
        raise ValueError(
            "A pipeline cannot batch packed patches: leave `batch_size` at 1, or call the processor on a list of "
            "images and the model on the result."
        )

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """
        Patches of an image of `height` x `width` pixels, without the image: what a batch sampler needs to know.

        Args:
            height (`int`), width (`int`): Size of the image in pixels.
            images_kwargs (`dict`, *optional*): Arguments of the call that differ from this processor's own.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        fields = ("image_size", "patch_size", "min_patches", "max_patches")
        given = {name: getattr(self, name) for name in fields} | lower_minimum(images_kwargs or {}, self.min_patches)
        if given["image_size"] is not None:
            return (given["image_size"] // given["patch_size"]) ** 2
        return math.prod(native_grid(height, width, *(given[name] for name in fields[1:])))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but both backends stay in `auto_map`, not only the one that was saved."""
        fields = super().to_dict()
        if "auto_map" in fields:
            module = __name__.rpartition(".")[2]
            fields["auto_map"] = {
                **fields["auto_map"],
                "AutoImageProcessor": [
                    f"{module}.{name}" for name in ("Aimv2PackingImageProcessorPil", "Aimv2PackingImageProcessor")
                ],
            }
        return fields


class Aimv2PackingImageProcessorPil(Aimv2PackingImageProcessorMixin, Qwen2VLImageProcessorPil):
    """The processor on PIL and NumPy, for where torchvision is not installed or `backend="pil"` is asked for."""

    backend_class = PilBackend


if is_torchvision_available():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    class Aimv2PackingImageProcessor(Aimv2PackingImageProcessorMixin, Qwen2VLImageProcessor):
        """The processor on torchvision: images of one size are resized together, on a GPU with `device="cuda"`."""

        backend_class = TorchvisionBackend

else:
    Aimv2PackingImageProcessor = Aimv2PackingImageProcessorPil  # type: ignore[misc, assignment]


__all__ = ["Aimv2PackingImageProcessor", "Aimv2PackingImageProcessorPil"]
