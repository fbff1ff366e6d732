# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for the GPUs it is for, by the Triton that is here and without any of them."""

import os
from typing import Any

import pytest
from reference import hub_module


kernels = hub_module("triton_kernels")

pytestmark = pytest.mark.skipif(
    kernels.triton is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton, and not its interpreter"
)

CAPABILITIES = [80, 90, 100]
SIZE, HIDDEN = 2816, 1024


def descriptor(rows: int, columns: int, dtype: str = "bf16") -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>"


def product_of(tile, dtype: str = "bf16", has_bias: bool = False) -> dict:
    return {
        "hidden_states": descriptor(tile.rows, tile.hidden, dtype),
        "weight": descriptor(tile.columns, tile.hidden, dtype),
        "bias": f"*{dtype}",
        "output": descriptor(tile.rows, tile.columns, dtype),
        "patches": "i32",
        "hidden_size": HIDDEN,
        "size": SIZE,
        **block_of(tile),
        "has_bias": has_bias,
        "options": {"num_warps": tile.warps, "num_stages": tile.stages},
    }


def swiglu_of(tile) -> dict:
    return {
        "hidden_states": descriptor(tile.rows, tile.hidden),
        "gate_up_weight": f"tensordesc<bf16[2, {tile.columns}, {tile.hidden}]>",
        "output": descriptor(tile.rows, tile.columns),
        "patches": "i32",
        "hidden_size": HIDDEN,
        "size": SIZE,
        **block_of(tile),
        "options": {"num_warps": tile.warps, "num_stages": tile.stages},
    }


def block_of(tile) -> dict:
    return {
        "block_rows": tile.rows,
        "block_columns": tile.columns,
        "block_hidden": tile.hidden,
        "group": tile.group,
    }


def norm_of(dtype: str, add: bool) -> dict:
    pointers = dict.fromkeys(("residual", "delta", "weight", "output"), f"*{dtype}")
    return {**pointers, "eps": "fp32", "size": HIDDEN, "block": 1024, "add": add}


def attention_of(head_dim: int) -> dict:
    return {
        "qkv": descriptor(kernels.BLOCK_KEYS, head_dim),
        **{"query": "*bf16", "output": "*bf16", "located": "*i32", "scale": "fp32", "patches": "i32", "size": HIDDEN},
        **{"head_dim": head_dim, "block_rows": kernels.BLOCK_ROWS, "block_keys": kernels.BLOCK_KEYS},
        "options": {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES},
    }


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Types of arguments and values of constants, by name, of each way in which the engine calls a kernel."""
    if kernels.triton is None:
        return {}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "silu_mul": ("silu_mul_kernel", {"gate_up": "*bf16", "output": "*bf16", "size": SIZE, "block": 1024}),
        "native_positions": (
            "native_positions_kernel",
            {
                **{"rows": "*i32", "columns": "*i32", "stride": "i32", "frequencies": "*fp64", "output": "*bf16"},
                **{"count": 256, "block": 256},
            },
        ),
        "given_native_positions": (
            "native_positions_kernel",
            {
                **{"rows": "*i64", "columns": "*i64", "stride": "i32", "frequencies": "*fp64", "output": "*fp16"},
                **{"count": 256, "block": 256},
            },
        ),
    }
    for has_frames in (False, True):
        arguments: dict[str, object] = {
            "segments": "*i32",
            "located": "*i32",
            "patches": "i32",
            "has_frames": has_frames,
            "block": 128,
        }
        found[f"locate_patches_{has_frames}"] = ("locate_patches_kernel", arguments)
        arguments = {
            **{"located": "*i32", "indices": "*i64", "weights": "*fp32", "table": "*bf16", "output": "*bf16"},
            **{"patches": "i32", "side": 16, "size": HIDDEN, "block": 1024, "has_frames": has_frames},
        }
        found[f"learned_positions_{has_frames}"] = ("learned_positions_kernel", arguments)
    for dtype in ("fp32", "fp16", "bf16"):
        for add in (False, True):
            found[f"add_rms_norm_{dtype}_{add}"] = ("add_rms_norm_kernel", norm_of(dtype, add))
    for head_dim in (16, 32, 64, 128):
        found[f"attention_{head_dim}"] = ("segment_attention_kernel", attention_of(head_dim))
    for index, tile in enumerate(kernels.PRODUCT_TILES):
        found[f"product_{index}"] = ("product_kernel", product_of(tile))
    tile = next(iter(kernels.PRODUCT_TILES))
    found["product_bias"] = ("product_kernel", product_of(tile, "fp16", has_bias=True))
    for index, tile in enumerate(kernels.SWIGLU_TILES):
        found[f"swiglu_{index}"] = ("swiglu_kernel", swiglu_of(tile))
    return found


CASES = cases()


def test_no_kernel_is_left_out():
    defined = {name for name in vars(kernels) if name.endswith("_kernel")}
    assert {name for name, _ in CASES.values()} == defined


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_it_compiles(case, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, arguments = CASES[case]
    arguments = dict(arguments)
    options = {"enable_fp_fusion": True, **arguments.pop("options", {"num_warps": 4})}
    constants = {argument: value for argument, value in arguments.items() if not isinstance(value, str)}
    signature = {argument: "constexpr" if argument in constants else kind for argument, kind in arguments.items()}
    source = ASTSource(getattr(kernels, name), signature, constants)
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
