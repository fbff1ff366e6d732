# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Image processor of the packed AIMv2 encoder: images of any sizes in, `hidden_states` and `grid_thw` out."""

import base64
import importlib
import ipaddress
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.TiffImagePlugin
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.utils import httpx
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorKwargs,
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.utils import is_torchvision_available, logging

from .batching_aimv2_packing import PackedBatchesMixin, flat_list, is_list


if TYPE_CHECKING:
    # transformers saves a processor with every file that an import names: this one, which `modules.json` names.
    from .sentence_transformers_aimv2_packing import Aimv2PackingTransformer  # noqa: F401


logger = logging.get_logger(__name__)

# A file is opened by its content, whatever its name says, so these alone are tried. Left out are formats that PIL gives
# to another program (EPS, to Ghostscript) or to the system (WMF), formats without a signature, for which any bytes may
# pass (TGA), and rare ones. JPEG includes MPO; HEIF (HEIC) is read where pillow-heif is installed.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")

# Of AVIF and HEIF, whose suffixes PIL knows only where it reads them.
OPTIONAL_SUFFIXES = {".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"}

# More than the largest sensors have, 151 million, and less than PIL refuses by itself.
MAX_IMAGE_PIXELS = 160_000_000

# Of a file from a URL or in base64, which are held in memory whole.
MAX_IMAGE_BYTES = 256 * 2**20

# For one URL: seconds in all, seconds without a byte, redirects.
URL_SECONDS, URL_PAUSE, URL_REDIRECTS = 60, 10, 5

# Of smart_resize; beyond it the shortest edge's enlargement would also exhaust the memory.
MAX_ASPECT_RATIO = 200

# What the fields below replace, and what AIMv2 has not.
UNUSED_KWARGS = {"size", "crop_size", "pad_size", "do_center_crop", "do_pad", "min_pixels", "max_pixels"}

ALLOWED_VALUES = {
    "patch_layout": ("channels_first", "channels_last"),
    "temporal_patch_size": (1,),
    "input_data_format": (None, "channels_first", "channels_last"),
    # Of a result that is patches, there is no other.
    "data_format": (None, "channels_first"),
}

# What its caller decides for a process, and no repo's configuration.
READING_KWARGS = ("allow_urls", "max_image_pixels")

# Gray, RGB and RGBA or CMYK: what both backends resize, and what tells the dimension of channels from the others.
CHANNELS = (1, 3, 4)

# Of PIL, whose arrays hold bits, indices of a palette, or two channels.
MODES_TO_CONVERT = ("1", "P", "PA", "LA")

# What undoes the EXIF orientations 2 to 8: PIL's numbers of mirroring, turning, turning upside down, and so on.
UPRIGHT = dict(enumerate(map(PIL.Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))


def image_formats() -> list[str]:
    """Those of `IMAGE_FORMATS` that this PIL and its plugins read: the argument `formats` of `PIL.Image.open`."""
    register_heif()
    PIL.Image.init()
    return [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]


@cache
def image_suffixes() -> frozenset[str]:
    """Of files in `IMAGE_FORMATS`, read by this PIL or not, such as `".jpg"`, in lower case."""
    # MPO is read as a kind of JPEG.
    formats = {*image_formats(), "MPO"}
    registered = {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats}
    return frozenset(registered | OPTIONAL_SUFFIXES)


@cache
def register_heif() -> None:
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


def open_image(
    source: str | os.PathLike | BinaryIO, allow_urls: bool = True, max_pixels: int = MAX_IMAGE_PIXELS
) -> PIL.Image.Image:
    """
    The decoded image of a path, a URL, base64 or an open file, in its own mode: transformers' `load_image` converts it,
    and would lose transparency and 16-bit values.

    Args:
        source (`str`, `os.PathLike` or binary file): A `file://` URL is a path.
        allow_urls (`bool`, *optional*, defaults to `True`): Whether `http://` and `https://` are fetched.
        max_pixels (`int`, *optional*, defaults to 160,000,000): The most pixels of an image, checked before it is
            decoded. PIL's own limit, twice `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Raises:
        FileNotFoundError: `source` is a path of no file, and neither a URL nor base64.
        ValueError: a data URI is not in base64, a URL is not allowed, or base64 is too long.
        OSError: it holds no image of `IMAGE_FORMATS`, a broken or too large one; it is no regular file; a URL's body
            is too large or too slow, or it redirects to an address that is not public.
        TypeError: `source` is bytes, or else none of these.
        `httpx.HTTPError`: the URL cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        # PIL takes bytes for a path, which may be a stranger's.
        raise TypeError(
            f"`source` must be a path, a URL, base64 or a binary file, got {type(source).__name__}: of bytes, give "
            "`io.BytesIO(data)`."
        )
    described = repr(source)
    if isinstance(source, str) and len(source) > 200:
        described = f"{source[:80]!r}... of {len(source)} characters"
    file, is_guess = file_of(source, described, allow_urls)
    try:
        with PIL.Image.open(file, formats=image_formats()) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {max_pixels} in all.")
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


def file_of(source: Any, described: str, allow_urls: bool) -> tuple[Any, bool]:
    """What PIL opens for `source`, and whether that is base64 by a guess: a wrong path may be base64, too."""
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            if not allow_urls:
                raise ValueError(f"`source` must be no URL where `allow_urls` is False, got {described}.")
            return BytesIO(downloaded(source)), False
        if scheme.startswith("file://"):
            url = urlsplit(source)
            if url.netloc not in ("", "localhost"):
                raise ValueError(f"A file:// URL must name a file of this machine, got {described}.")
            source = url2pathname(url.path)
        elif scheme.startswith("data:") or not os.path.exists(source):
            is_guess = not scheme.startswith("data:")
            payload = source if is_guess else unquote(source.rsplit(",", maxsplit=1)[-1])
            if len(payload) * 3 // 4 > MAX_IMAGE_BYTES:
                raise ValueError(f"An image in base64 must have at most {MAX_IMAGE_BYTES} bytes, got {described}.")
            try:
                return BytesIO(base64.b64decode("".join(payload.split()), validate=True)), is_guess
            except ValueError as error:
                if is_guess:
                    raise FileNotFoundError(f"No such image file: {described}, and it is no URL or base64.") from error
                raise ValueError(f"A data URI of an image must be base64, got {described}.") from error
    if isinstance(source, (str, os.PathLike)) and os.path.exists(source) and not os.path.isfile(source):
        # A pipe would block for ever.
        raise OSError(f"Cannot read an image from {described}: it is no regular file.")
    return source, False


def downloaded(url: str) -> bytes:
    """The body behind a URL."""
    deadline = time.monotonic() + URL_SECONDS
    try:
        target = first = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"`source` must be a URL, a path or base64, got {url!r}: {error}.") from error
    with httpx.Client(timeout=URL_PAUSE) as client:
        for _ in range(1 + URL_REDIRECTS):
            with client.stream("GET", target) as response:
                if response.next_request is None:
                    body = bytearray()
                    for chunk in response.raise_for_status().iter_bytes():
                        body += chunk
                        if len(body) > MAX_IMAGE_BYTES:
                            raise OSError(f"{url!r} holds more than {MAX_IMAGE_BYTES} bytes.")
                        if time.monotonic() > deadline:
                            raise OSError(f"{url!r} took more than {URL_SECONDS} seconds.")
                    return bytes(body)
                target = response.next_request.url
            same_server = (target.scheme, target.host, target.port) == (first.scheme, first.host, first.port)
            if not same_server and not is_public(target.host):
                raise OSError(f"{url!r} redirects to {str(target)!r}, which is no public address.")
    raise OSError(f"{url!r} redirects more than {URL_REDIRECTS} times.")


def is_public(host: str) -> bool:
    """Whether every address of a host is one of the public internet; not so for a host without an address."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address).is_global for address in found)


def orientation_of(image: PIL.Image.Image) -> Any:
    """What EXIF or XMP says, or `None` where they say nothing that can be read."""
    try:
        said = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:
        # PIL raises anything on malformed EXIF: SyntaxError, struct.error, AssertionError, ...
        said = None
    if said is None and isinstance(exif := image.info.get("exif"), bytes):
        # PIL reads no further than the first malformed field.
        exif = exif.removeprefix(b"Exif\0\0")
        order = ">" if exif.startswith(b"MM") else "<"
        with suppress(struct.error):
            (start,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, start)
            for offset in range(start + 2, start + 2 + 12 * count, 12):
                tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, offset)
                said = value if tag == PIL.ExifTags.Base.Orientation else said
    return said


def upright_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    The image turned as its EXIF orientation says, with at most 8 bits per channel.

    Raises:
        ValueError: the mode has no defined range (`"I"`, `"F"`), nor do a TIFF's signed values.
    """
    transposition = UPRIGHT.get(orientation_of(image))
    tags = image.tag_v2 if isinstance(image, PIL.TiffImagePlugin.TiffImageFile) else {}
    # PIL reads 16-bit PGM, and before its version 11.0 such PNG, into this mode.
    is_sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if image.mode in ("I", "F") and not is_sixteen_bit:
        raise ValueError(
            f"An image of mode {image.mode!r} has no defined range of values: convert it to 'L', 'RGB' or 'I;16', or "
            "give an array."
        )
    if 2 in tags.get(PIL.TiffImagePlugin.SAMPLEFORMAT, ()):
        raise ValueError("A TIFF of signed values has no defined range of values: give an array.")
    if is_sixteen_bit:
        # PIL's own conversion cuts every value above 255 off, and PIL ignores what these tags say of 12 and 16 bits.
        brightest = 2 ** tags.get(PIL.TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        values = np.asarray(image).astype(np.uint32)
        values = (values * 255 + brightest // 2) // brightest
        if tags.get(PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = 255 - values
        image = PIL.Image.fromarray(values.astype(np.uint8))
    elif image.mode in ("RGBa", "La"):
        # transformers looks for an "A" to see that there is transparency.
        image = image.convert(image.mode.upper())
    return image if transposition is None else image.transpose(transposition)


def checked_array(
    image: np.ndarray | torch.Tensor,
    input_data_format: str | ChannelDimension | None,
    do_rescale: bool | None,
    do_normalize: bool | None,
) -> torch.Tensor:
    """
    The array as `(channels, height, width)`, uint8 or float32.

    Raises:
        ValueError: not `(height, width)`, `(channels, height, width)` or `(height, width, channels)`; other than 1, 3
            or 4 channels; values that are not finite, or not in the range that they have: with `do_rescale` 0 to 65535
            for uint16, else 0 to 255; with `do_normalize` alone floats from 0 to 1; any with neither.
    """
    if isinstance(image, np.ndarray):
        try:
            native = image.astype(image.dtype.newbyteorder("="), copy=False)
            image = torch.from_numpy(np.require(native, requirements=["C", "W"]))
        except TypeError as error:
            raise ValueError(f"An image must hold integers or floats, got {image.dtype}.") from error
    shape, given_format = tuple(image.shape), input_data_format
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(
            "`images` must be arrays of shape (height, width), (channels, height, width) or (height, width, channels), "
            f"none of them 0, or batches of them, got shape {shape}."
        )
    if input_data_format is None:
        first, last = (image.shape[dimension] in CHANNELS for dimension in (0, 2))
        if first and last:
            raise ValueError(
                f"The shape {shape} of an image does not tell which dimension holds the channels: give "
                "`input_data_format`, 'channels_first' or 'channels_last'."
            )
        input_data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    if input_data_format == ChannelDimension.LAST:
        image = image.permute(2, 0, 1)
    if len(image) not in CHANNELS:
        raise ValueError(
            "An image must have 1, 3 or 4 channels, its first or last dimension is the channel dimension, got shape "
            f"{shape}, `input_data_format` {given_format!r}."
        )

    dtype = image.dtype
    if dtype == torch.bool or image.is_complex():
        raise ValueError(f"An image must hold integers or floats, got {dtype}.")
    if not image.is_floating_point():
        if do_normalize and not do_rescale:
            raise ValueError(unscaled_error(f"{dtype}, whose range is 0 to 255"))
        if dtype == torch.uint8:
            return image
        if do_rescale:
            image = image.to(torch.int64)
            low, high = (int(bound) for bound in image.aminmax())
            if dtype == torch.uint16:
                image = (image + 128) // 257
            elif low < 0 or high > 255:
                raise ValueError(f"An image of integers must hold 0 to 255 (uint16: 0 to 65535), got {low} to {high}.")
            return image.to(torch.uint8)
    image = image.to(torch.float32)
    low, high = (bound.item() for bound in image.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("An image must hold finite values, got NaN or infinity.")
    if do_rescale and (low < 0 or high > 255 or 0 < high <= 2):
        raise ValueError(
            f"An image of floats must hold 0 to 255, got {low:.6g} to {high:.6g}: for floats from 0 to 1 give "
            "`do_rescale=False`."
        )
    if do_normalize and not do_rescale and (low < 0 or high > 1):
        raise ValueError(unscaled_error(f"{low:.6g} to {high:.6g}"))
    return image


def check_channels(images: list, do_normalize: bool | None, **statistics: float | tuple[float, ...]) -> None:
    """
    Raises a ValueError where `(channels, height, width)` images have not one number of channels, or not that of the
    `image_mean` and `image_std` which `do_normalize` needs.
    """
    counts = sorted({len(image) for image in images})
    if len(counts) > 1:
        raise ValueError(f"With `do_convert_rgb=False` all images must have as many channels, got {counts}.")
    for name, values in statistics.items():
        if do_normalize and isinstance(values, tuple) and len(values) != counts[0]:
            raise ValueError(f"`{name}` must hold a number per channel, {counts[0]}, got {len(values)}: {values}.")


def unscaled_error(found: str) -> str:
    return (
        f"With `do_rescale=False` and `do_normalize` an image must hold floats from 0 to 1, got {found}: leave "
        "`do_rescale` on for 0 to 255, or turn `do_normalize` off for values that need neither."
    )


# Sizes


class Aimv2PackingImageProcessorKwargs(Qwen2VLImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    r"""
    image_size (`int`, *optional*):
        Side of the square that each image becomes: its shortest edge is resized to it, then the centre is cropped, as
        [`~transformers.CLIPImageProcessor`] does. `None` is the native mode: the aspect ratio is kept and the sides
        are rounded to multiples of `patch_size * merge_size`.
    min_patches (`int`, *optional*, defaults to 112):
        Native mode only: an image of fewer patches is enlarged to about this many. A smaller `max_patches` that is
        given alone lowers it.
    max_patches (`int`, *optional*, defaults to 4096):
        Native mode only: an image of more patches is reduced to at most this many. Per frame for a video.
    merge_size (`int`, *optional*, defaults to 1):
        Makes rows and columns multiples of it, for [`merge_patches`] after the model. Patches stay row by row: in
        Qwen2-VL's processor the same word also brings those together that are merged.
    patch_layout (`str`, *optional*, defaults to `"channels_first"`):
        Order of the values inside one patch, as in the model's configuration: `"channels_first"` or
        `"channels_last"`.
    allow_urls (`bool`, *optional*, defaults to `True`):
        Whether strings that are `http://` or `https://` URLs are fetched. Not saved.
    max_image_pixels (`int`, *optional*, defaults to 160,000,000):
        Most pixels of an image that is read from a path, a URL or base64, checked before decoding. Not saved.
    """

    image_size: int | None
    min_patches: int
    max_patches: int
    patch_layout: str
    allow_urls: bool
    max_image_pixels: int


class TargetSize(NamedTuple):
    """The arguments of a call that decide the sides of an image, and in what range its floats stay."""

    do_resize: bool
    image_size: int | None
    patch_size: int
    merge_size: int
    min_patches: int
    max_patches: int
    do_rescale: bool
    do_normalize: bool

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """
        What an image of `height` x `width` pixels becomes, in pixels: in native mode Qwen2-VL's `smart_resize`, and
        never more than `max_patches`.

        Raises:
            ValueError: a side is 0 or more than 200 times the other, or, without `do_resize`, no multiple of
                `patch_size * merge_size`.
        """
        if not 0 < max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"The long side of an image must be at most {MAX_ASPECT_RATIO} times the short one, got {height} x "
                f"{width} pixels."
            )
        factor, area = self.patch_size * self.merge_size, self.patch_size**2
        if not self.do_resize:
            if height % factor or width % factor:
                raise ValueError(
                    "With `do_resize=False` the sides of an image must be multiples of `patch_size * merge_size`, "
                    f"{factor}, got {height} x {width}."
                )
            return height, width
        if self.image_size is not None:
            return self.image_size, self.image_size
        sides = smart_resize(height, width, factor, self.min_patches * area, self.max_patches * area)
        rows, columns = (side // factor for side in sides)
        most = self.max_patches // self.merge_size**2
        if rows * columns > most:
            # smart_resize rounds a strip's short side, or a side that it enlarges, up.
            short = min(rows, columns, math.isqrt(most))
            rows, columns = (short, most // short) if rows <= columns else (most // short, short)
        return rows * factor, columns * factor

    def num_patches(self, height: int, width: int) -> int:
        return math.prod(self.sides(height, width)) // self.patch_size**2


def lower_minimum(given: Mapping[str, Any], min_patches: int) -> dict[str, Any]:
    """The arguments `given`, where a `max_patches` without `min_patches` lowers the `min_patches` that would hold."""
    maximum = given.get("max_patches")
    if type(maximum) is int and maximum < min_patches and given.get("min_patches") is None:
        return {**given, "min_patches": maximum}
    return dict(given)


class Aimv2PackingImageProcessorMixin(PackedBatchesMixin, BaseImageProcessor):
    """What both backends share; mixed into a Qwen2-VL image processor."""

    patch_size = 14
    temporal_patch_size = 1
    merge_size = 1
    size = None
    image_size = None
    min_patches = 112
    max_patches = 4096
    patch_layout = "channels_first"
    allow_urls = True
    max_image_pixels = MAX_IMAGE_PIXELS
    valid_kwargs = Aimv2PackingImageProcessorKwargs
    model_input_names = ["hidden_states", "grid_thw"]
    backend_class: Any

    def __init__(self, **kwargs):
        # Past Qwen2-VL's own, which fills in a `size`.
        self.backend_class.__init__(self, **lower_minimum(kwargs, self.min_patches))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        fields = {name: value for name, value in image_processor_dict.items() if name not in READING_KWARGS}
        given = lower_minimum(kwargs, fields.get("min_patches", cls.min_patches))
        try:
            return super().from_dict(fields, **given)
        except Exception as error:
            # `AutoProcessor` swallows it and says only that the repo has no processor.
            logger.error(f"The image processor cannot be made: {error}")
            raise

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        limits = [name for name in ("min_patches", "max_patches") if kwargs.get(name) is not None]
        if limits and (side := kwargs.get("image_size", self.image_size)) is not None:
            logger.warning_once(f"`{limits[0]}` does nothing while `image_size` is {side}: give `image_size=None` too.")
        device = kwargs.get("device", self.device)
        if self.backend == "pil" and str(device or "cpu") != "cpu":
            logger.warning_once(f"`device` {device} is for the torchvision backend: with PIL patches are on the CPU.")
        return super().preprocess(images, *args, **lower_minimum(kwargs, self.min_patches))

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        if unused := sorted(name for name in UNUSED_KWARGS if kwargs.get(name) is not None):
            raise ValueError(
                f"`{unused[0]}` is not used by this image processor, got {kwargs[unused[0]]!r}: give `image_size` "
                "for a fixed resolution, or `min_patches` and `max_patches`."
            )
        for name in ("patch_size", "merge_size", "max_patches", "min_patches", "max_image_pixels"):
            if type(kwargs[name]) is not int or kwargs[name] < 1:
                raise ValueError(f"`{name}` must be a positive int, got {kwargs[name]!r}.")
        image_size, merge_size, max_patches = kwargs["image_size"], kwargs["merge_size"], kwargs["max_patches"]
        factor = kwargs["patch_size"] * merge_size
        if kwargs["min_patches"] > max_patches:
            raise ValueError(
                f"`min_patches` must not exceed `max_patches`, got {kwargs['min_patches']} and {max_patches}."
            )
        if merge_size**2 > max_patches:
            raise ValueError(f"`max_patches` must be at least `merge_size**2`, got {max_patches} and {merge_size}**2.")
        if image_size is not None and (type(image_size) is not int or image_size < 1 or image_size % factor):
            raise ValueError(
                "`image_size` must be None or a positive multiple of `patch_size * merge_size`, got "
                f"{image_size!r} and {factor}."
            )
        for name, values in ALLOWED_VALUES.items():
            if kwargs[name] not in values:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, values))}, got {kwargs[name]!r}.")
        for name, lowest in (("image_mean", -math.inf), ("image_std", 0), ("rescale_factor", 0)):
            numbers = np.ravel([] if kwargs[name] is None else kwargs[name])
            if numbers.dtype.kind not in "iuf" or not ((lowest < numbers) & (numbers < math.inf)).all():
                kind = "finite" if lowest else "positive"
                raise ValueError(f"`{name}` must hold {kind} numbers, got {kwargs[name]!r}.")
        if isinstance(kwargs["resample"], (int, float, str)) and kwargs["resample"] not in list(PIL.Image.Resampling):
            # A name would be taken for bilinear.
            raise ValueError(f"`resample` must be a `PIL.Image.Resampling`, 0 to 5, got {kwargs['resample']!r}.")
        return super()._standardize_kwargs(**kwargs)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        # There is always a size to resize to, though none is called `size`.
        super()._validate_preprocess_kwargs(**{**kwargs, "size": SizeDict()})

    def fetch_images(self, image_url_or_urls, allow_urls=None, max_image_pixels=None):
        """Reads paths, URLs and base64 strings; passes images on."""
        given = image_url_or_urls
        allow_urls = self.allow_urls if allow_urls is None else allow_urls
        max_image_pixels = self.max_image_pixels if max_image_pixels is None else max_image_pixels
        if isinstance(given, (str, os.PathLike)):
            return open_image(given, allow_urls, max_image_pixels)
        # Such as a list, or a column of a dataset.
        if is_list(given):
            return [self.fetch_images(element, allow_urls, max_image_pixels) for element in given]
        if not isinstance(given, (PIL.Image.Image, np.ndarray, torch.Tensor)):
            raise TypeError(
                "`images` must be PIL images, arrays, paths, URLs or base64, or lists of them, got "
                f"{type(given).__name__}: bytes become an image with `open_image(io.BytesIO(data))`."
            )
        return given

    def _prepare_image_like_inputs(self, images, *args, allow_urls=None, max_image_pixels=None, **kwargs):
        images = self.fetch_images(images, allow_urls, max_image_pixels)
        return super()._prepare_image_like_inputs(images, *args, **kwargs)

    def _prepare_images_structure(self, images, expected_ndims=3):
        return flat_list(images)

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, do_rescale=None, do_normalize=None, **kwargs
    ):
        if not isinstance(image, PIL.Image.Image):
            if self.backend == "pil" and isinstance(image, torch.Tensor):
                image = image.detach().cpu()
            image = checked_array(image, input_data_format, do_rescale, do_normalize)
            input_data_format = ChannelDimension.FIRST
            if do_convert_rgb and image.shape[0] == 4:
                if image.dtype != torch.uint8:
                    raise ValueError(f"An image with an alpha channel must hold integers, got {image.dtype}.")
                image = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            elif do_convert_rgb and image.shape[0] == 1:
                image = image.expand(3, -1, -1)
        elif do_normalize and not do_rescale:
            raise ValueError(unscaled_error("a PIL image, whose range is 0 to 255"))
        elif image.mode in MODES_TO_CONVERT and not do_convert_rgb:
            raise ValueError(f"`do_convert_rgb` must be on for a PIL image of mode {image.mode!r}, or convert it.")
        if isinstance(image, PIL.Image.Image):
            image, input_data_format = upright_image(image), None
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, do_rescale=do_rescale, **kwargs
        )

    def resize(self, images, size: TargetSize, resample, **kwargs):
        height, width = images.shape[-2:]
        sides = size.sides(height, width)
        if size.image_size is not None:
            sides = get_resize_output_image_size(
                images, size.image_size, default_to_square=False, input_data_format=ChannelDimension.FIRST
            )
        if images.dtype in (np.uint8, torch.uint8):
            images = self.resize_pixels(images, sides, resample)
        else:
            highest = 255 if size.do_rescale else 1 if size.do_normalize else None
            # Clipped after each pass, as PIL does 8 bits, before version 13 in this order: bicubic filters overshoot.
            for target in ((height, sides[1]), sides):
                images = self.resize_pixels(images, target, resample)
                images = images if highest is None else images.clip(0, highest)
        if size.image_size is None:
            return images
        return self.center_crop(images, SizeDict(height=size.image_size, width=size.image_size))

    def resize_pixels(self, images, sides: tuple[int, int], resample):
        return self.backend_class.resize(
            self, images, size=SizeDict(height=sides[0], width=sides[1]), resample=resample
        )

    def _preprocess(self, images: list, patch_layout: str, return_tensors: str | None, **kwargs) -> BatchFeature:
        if not images:
            raise ValueError("`images` must hold at least one image, got none.")
        target = TargetSize(**{name: kwargs[name] for name in TargetSize._fields})
        check_channels(images, **{name: kwargs[name] for name in ("do_normalize", "image_mean", "image_std")})
        for image in images:
            target.sides(*image.shape[-2:])
        # To Qwen2-VL's processor `merge_size` is an order of patches, too.
        features = super()._preprocess(images, **{**kwargs, "size": target, "merge_size": 1, "return_tensors": None})
        hidden_states = features["pixel_values"]
        if patch_layout == "channels_last":
            side = target.patch_size
            patches = hidden_states.reshape(len(hidden_states), -1, side, side)
            hidden_states = patches.swapaxes(1, 2).swapaxes(2, 3).reshape(hidden_states.shape)
        if isinstance(hidden_states, torch.Tensor):
            hidden_states = hidden_states.to(torch.float32)
        data = {"hidden_states": hidden_states, "grid_thw": features["image_grid_thw"]}
        return BatchFeature(data=data, tensor_type=return_tensors)

    image_suffixes = staticmethod(image_suffixes)
    open_image = staticmethod(open_image)

    def target_size(self, images_kwargs: Mapping[str, Any] | None = None) -> TargetSize:
        """How a call with these arguments resizes; raises what the call would."""
        kwargs: dict[str, Any] = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        # Its own were checked when it was made.
        if images_kwargs:
            given = lower_minimum(images_kwargs, self.min_patches)
            validate_typed_dict(self.valid_kwargs, given)
            kwargs = self._standardize_kwargs(**kwargs | given)
            self._validate_preprocess_kwargs(**kwargs)
        return TargetSize(**{name: kwargs[name] for name in TargetSize._fields})

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, but both backends stay in `auto_map`, not only the one that was saved."""
        fields = {name: value for name, value in super().to_dict().items() if name not in READING_KWARGS}
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

    def resize_pixels(self, images, sides: tuple[int, int], resample):
        if images.dtype == np.uint8:
            return super().resize_pixels(images, sides, resample)
        # PIL has no mode for several channels of floats, and transformers would round them to 8 bits.
        planes = (PIL.Image.fromarray(plane).resize(sides[::-1], resample) for plane in images)
        return np.stack([np.asarray(plane) for plane in planes])


if is_torchvision_available():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    class Aimv2PackingImageProcessor(Aimv2PackingImageProcessorMixin, Qwen2VLImageProcessor):
        """The processor on torchvision: images of one size are resized together, on a GPU with `device="cuda"`."""

        backend_class = TorchvisionBackend

else:
    Aimv2PackingImageProcessor = Aimv2PackingImageProcessorPil  # type: ignore[misc, assignment]


__all__ = ["Aimv2PackingImageProcessor", "Aimv2PackingImageProcessorPil"]
