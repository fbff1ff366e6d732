# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether tensors computed in two ways are the same but for rounding."""

import statistics

import torch


# Sums in another order round differently, not by much more.
FACTOR = 4

Tensors = dict[str, torch.Tensor]


def relative_errors(actual: Tensors, exact: Tensors) -> dict[str, float]:
    """
    ‖actual - exact‖ / ‖exact‖ of each tensor, computed in float64.

    Raises:
        ValueError: the names differ.
    """
    if actual.keys() != exact.keys():
        raise ValueError(f"`actual` and `exact` need the same tensors; one alone has {sorted(actual.keys() ^ exact)}.")
    errors = {}
    for name, value in exact.items():
        difference = (actual[name].to(value.device).double() - value.double()).norm()
        # A tensor of zeros has to be one exactly.
        errors[name] = (difference / value.double().norm()).item() if difference != 0 else 0.0
    return errors


def agreement(actual: Tensors, rounded: Tensors, exact: Tensors) -> dict:
    """
    How `actual` compares with the same tensors computed in float64 (`exact`), against how far rounding alone takes
    those of a run in its dtype that is known to be right (`rounded`).

    Returns:
        `dict`: `worst`, the tensor with the largest error over its bound; its `error` and its `bound`, which is four
        times the error of that tensor of `rounded`, or of the median tensor where that is larger; and `wrong`, the
        names of all tensors above theirs.
    """
    errors, of_rounding = relative_errors(actual, exact), relative_errors(rounded, exact)
    # By luck a small tensor may have next to none.
    median = statistics.median(of_rounding.values())
    bounds = {name: FACTOR * max(error, median) for name, error in of_rounding.items()}
    shares = {name: errors[name] / bounds[name] for name in exact}
    wrong = [name for name, share in shares.items() if not share <= 1]  # NaN is wrong
    worst = max(wrong or shares, key=lambda name: (shares[name] != shares[name], shares[name]))
    return {"worst": worst, "error": errors[worst], "bound": bounds[worst], "wrong": wrong}
