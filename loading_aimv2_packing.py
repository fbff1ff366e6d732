# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` of these models refuses."""

from collections.abc import Sequence
from typing import Any


def refuse_random_weights(
    cls: type, source: str | None, info: dict[str, Any], newly_initialized: Sequence[str]
) -> None:
    """
    Raises:
        ValueError: the checkpoint lacks weights of this model, or has them in another shape, and neither they nor a
            module of theirs is in `newly_initialized`.
    """
    random = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    missing = sorted(
        name for name in random if not any(f"{name}.".startswith(f"{part}.") for part in newly_initialized)
    )
    if not missing:
        return
    advice = (
        "Everything else is there: give `newly_initialized=['head']` to start with random weights in it."
        if all(name.startswith("head.") for name in missing)
        else f"Checkpoints in Apple's format and others are converted by: python convert_weights.py {source} OUTPUT_DIR"
    )
    raise ValueError(
        f"{source or 'The state dict'} is no checkpoint of {cls.__name__} with this configuration: it lacks "
        f"{len(missing)} weights, "
        f"{missing[0]!r} first, and holds {len(info['unexpected_keys'])} others. {advice}"
    )
