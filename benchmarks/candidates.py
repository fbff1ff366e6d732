# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The ways to encode images that benchmarks/throughput.py compares."""

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from timing import captured
from workloads import Grid, Models, patchify

from conversion.local_code import hub_module


Forward = Callable[[], Iterator]

PEERS = ["looped", "grouped", "padded", "naflex", "timm"]


class Candidates:
    """Forwards over the same images, one per way of running them; each yields its outputs as it makes them."""

    def __init__(self, models: Models, grids: list[Grid], args: argparse.Namespace):
        reference, packed, compiled, older = models
        patch_size = reference.config.patch_size
        self.reference, self.packed = reference, packed
        self.grids = grids
        self.images = [
            torch.randn(3, height * patch_size, width * patch_size, device=args.device, dtype=reference.dtype)
            for height, width in grids
        ]
        self.patches = torch.cat([patchify(image, patch_size) for image in self.images])
        self.grid_thw = torch.tensor([(1, height, width) for height, width in grids])
        by_grid = defaultdict(list)
        for grid, image in zip(grids, self.images, strict=True):
            by_grid[grid].append(image)
        self.groups = [torch.stack(images) for images in by_grid.values()]

        self.forwards: dict[str, Forward] = {}
        for attn in args.attn:
            self.forwards[f"packed {attn}"] = self.packed_forward(packed, attn)
            if args.device.startswith("cuda"):
                self.forwards[f"packed {attn} ahead"] = self.packed_forward(packed, attn, ahead=True)
            if compiled is not None:
                self.forwards[f"packed {attn} compiled"] = self.packed_forward(compiled, attn)
            if args.train:
                self.forwards[f"packed {attn} checkpointed"] = self.packed_forward(packed, attn, checkpointing=True)
            if older is not None:
                self.forwards[f"older {attn}"] = self.packed_forward(older, attn)
        side = reference.config.image_size // patch_size
        # With learned positions the original takes one size.
        self.reference_runs = reference.config.is_native or set(grids) == {(side, side)}
        if self.reference_runs:
            self.forwards["looped"] = lambda: (reference(image[None]) for image in self.images)
            self.forwards["grouped"] = lambda: (reference(images) for images in self.groups)
        tall, wide = max(height for height, _ in grids), max(width for _, width in grids)
        if self.reference_runs and tall * wide * len(grids) <= args.max_padding * len(self.patches):
            self.padded = torch.zeros(
                len(grids), 3, tall * patch_size, wide * patch_size, device=args.device, dtype=reference.dtype
            )
            for index, image in enumerate(self.images):
                self.padded[index, :, : image.shape[1], : image.shape[2]] = image
            self.forwards["padded"] = lambda: (reference(images) for images in (self.padded,))
        if find_spec("timm") and find_spec("torchvision"):
            if len(self.groups) == 1 and grids[0][0] == grids[0][1]:
                self.timm_size = grids[0][0] * patch_size
                self.forwards["timm"] = self.timm_forward(self.timm_size)
            longest = max(height * width for height, width in grids)
            if longest * len(grids) <= args.max_padding * len(self.patches):
                self.forwards["naflex"] = self.naflex_forward(grids)
        self.forwards = {
            name: run for name, run in self.forwards.items() if name.split()[0] in ("packed", "older", *args.peers)
        }
        if args.best:
            self.add_best_peers(args.train)

    def add_best_peers(self, train: bool) -> None:
        """The same with compiled blocks; timm's model of one size, which allows it, forward alone also in a graph."""
        torch._dynamo.reset()
        compiled = copy.deepcopy(self.reference)
        for block in compiled.encoder.layers:
            block.compile()
        if "grouped" in self.forwards:
            self.forwards["grouped compiled"] = lambda: (compiled(images) for images in self.groups)
        if "padded" in self.forwards:
            self.forwards["padded compiled"] = lambda: (compiled(images) for images in (self.padded,))
        if "naflex" in self.forwards:
            self.forwards["naflex compiled"] = self.naflex_forward(self.grids, compiled=True)
        if "timm" in self.forwards and train:
            self.forwards["timm compiled"] = self.timm_forward(self.timm_size, compiled=True)
        elif "timm" in self.forwards:
            self.forwards["timm graph"] = in_graph(self.forwards["timm"])
            self.forwards["timm compiled graph"] = in_graph(self.timm_forward(self.timm_size, compiled=True))

    def packed_forward(self, packed, attn: str, checkpointing: bool = False, ahead: bool = False) -> Forward:
        """With `ahead` the layout lies on the device already, as the peers' images and NaFlex's coordinates do."""
        layout = None
        if ahead:
            layout = hub_module("layout").packed_layout(self.grid_thw, packed.config).to(self.patches.device)

        def run():
            # Where it changes alone: to walk all modules takes the host half as long as a forward of one image.
            if packed.config._attn_implementation != attn:
                packed.config._attn_implementation = attn
            if packed.training != checkpointing:
                packed.train(checkpointing)
                if checkpointing:
                    packed.gradient_checkpointing_enable({"use_reentrant": False})
            yield packed(self.patches, self.grid_thw) if layout is None else packed(self.patches, layout=layout)

        return run

    def timm_forward(self, size: int, compiled: bool = False) -> Forward:
        import timm

        config = self.reference.config
        model = timm.create_model(
            "aimv2_large_patch14_224",
            img_size=size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=0,
        )
        model = model.to(self.patches.device, self.reference.dtype).eval()
        for block in model.blocks if compiled else ():
            block.compile()
        return lambda: (model.forward_features(images) for images in self.groups)

    def naflex_forward(self, grids: list[Grid], compiled: bool = False) -> Forward:
        """timm's NaFlex ViT in AIMv2's geometry: patches of all images in one batch, padded to the most, and masked."""
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        config = self.reference.config
        geometry = NaFlexVitCfg(
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            swiglu_mlp=True,
            qkv_bias=False,
            norm_layer="rmsnorm",
            act_layer="silu",
            pos_embed="factorized",
            global_pool="",
            use_key_only_attn_mask=True,
        )
        model = NaFlexVit(geometry, num_classes=0).to(self.patches.device, self.reference.dtype).eval()
        for block in model.blocks if compiled else ():
            block.compile()
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        patches = self.patches.split([height * width for height, width in grids])
        coordinates = [
            torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(self.patches.device)
            for height, width in grids
        ]
        batch = {
            "patches": pad(patches),
            "patch_coord": pad(coordinates),
        }
        if len({height * width for height, width in grids}) > 1:
            batch["patch_valid"] = pad([torch.ones_like(row[:, 0], dtype=torch.bool) for row in coordinates])
        return lambda: (model.forward_features(**batch)["patches"] for _ in range(1))

    def largest_difference(self) -> dict[str, float]:
        """Per packed candidate, max |difference| to the loop, over all images; where there is one."""
        if not self.reference_runs:
            return {}
        with torch.inference_mode():
            expected = torch.cat([self.reference(image[None]).last_hidden_state[0] for image in self.images])
            return {
                name: (next(forward()).last_hidden_state - expected).abs().max().item()
                for name, forward in self.forwards.items()
                if name.startswith("packed")
            }


def in_graph(forward: Forward) -> Forward:
    """The whole forward as one CUDA graph over this batch, where it lies."""
    outputs: list = []

    def fill_outputs() -> None:
        outputs[:] = forward()

    for _ in range(3):
        fill_outputs()
    graph = captured(fill_outputs)

    # Its model has the weights that the graph reads.
    def run(kept: Forward = forward) -> Iterator:
        graph.replay()
        yield from outputs

    return run


def step(forward: Forward, train: bool) -> Callable[[], None]:
    """Runs all of a forward, and in training the backward pass of each output as soon as it is there."""

    def run() -> None:
        for outputs in forward():
            if train:
                features = outputs if isinstance(outputs, torch.Tensor) else outputs.last_hidden_state
                features.float().square().sum().backward()

    return run
