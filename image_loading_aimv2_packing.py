# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Images as they come (files, PIL images, arrays) made fit for an image processor, or refused."""

import base64
import math
import os
from io import BytesIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.utils import httpx
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format


def open_image(source: str) -> PIL.Image.Image:
    """
    The decoded image at a path, a URL or in base64, in its own mode: unlike transformers' `load_image`, which converts
    it, so that transparency and 16-bit values are still there for the processor.

    Raises:
        ValueError: `source` is none of these.
        OSError: it holds no image, or a broken one.
        `httpx.HTTPError`: the URL cannot be read.
    """
    described = repr(source if len(source) <= 200 else source[:200] + "...")
    file: str | BytesIO
    if source.startswith(("http://", "https://")):
        file = BytesIO(httpx.get(source, follow_redirects=True).raise_for_status().content)
    elif os.path.exists(source):
        file = source
    else:
        try:
            file = BytesIO(base64.b64decode(source.rsplit(",", maxsplit=1)[-1], validate=True))
        except ValueError as error:
            raise ValueError(f"An image must be a path, a URL or base64, got {described}, which is no file.") from error
    try:
        with PIL.Image.open(file) as image:
            # Before the file is closed; thousands of lazy images would exhaust the file handles.
            image.load()
            return image
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


__all__ = ["checked_array", "open_image", "upright_image"]
