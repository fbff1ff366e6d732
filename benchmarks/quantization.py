# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What torchao's dynamic int8 quantisation of the encoder costs and gives: cosine to float32, and speed in one process.

    pip install torchao
    python benchmarks/quantization.py
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from candidates import Candidates, step
from throughput import settings
from timing import seconds
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from workloads import GEOMETRIES, make_models, mixes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--checkpoint", help="an Aimv2VisionModel checkpoint instead of random weights")
    parser.add_argument("--mix", choices=mixes(), default="mixed")
    parser.add_argument("--repeats", type=int, default=5)
    args = settings(**vars(parser.parse_args()))
    with torch.inference_mode():
        models = make_models(args, torch.float32)
        plain = Candidates(models, mixes()[args.mix], args)
        expected = next(plain.forwards["packed sdpa"]()).last_hidden_state
        quantized = Candidates(make_models(args, torch.float32), mixes()[args.mix], args)
        quantized.patches = plain.patches
        quantize_(quantized.packed.encoder, Int8DynamicActivationInt8WeightConfig())
        forward = quantized.forwards["packed sdpa"]
        cosine = F.cosine_similarity(next(forward()).last_hidden_state, expected, dim=-1)
        runs = (step(plain.forwards["packed sdpa"], False), step(forward, False))
        times = [[seconds(run, args.device) for run in runs] for _ in range(args.repeats)]
    ratio = statistics.median(ours / theirs for ours, theirs in times)
    print(f"cosine to float32: min {cosine.min():.5f}, mean {cosine.mean():.5f}; {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
