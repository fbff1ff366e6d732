# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The image-text model with the vision tower that inference engines run."""

from .accelerated_aimv2_packing import Aimv2PackingAcceleratedModel
from .image_text_aimv2_packing import Aimv2PackingImageTextModel


class Aimv2PackingAcceleratedImageTextModel(Aimv2PackingImageTextModel):
    """
    [`Aimv2PackingImageTextModel`], its tower an [`Aimv2PackingAcceleratedModel`]: `model.vision_model.last_engine` says
    which engine ran the last forward.
    """

    tower_class = Aimv2PackingAcceleratedModel


__all__ = ["Aimv2PackingAcceleratedImageTextModel"]
