"""
Where the time of one packed forward goes, by kernel, on a CUDA device.

    python benchmarks/profile_forward.py --geometry large --patches 16384
"""

import argparse

import torch
from throughput import GEOMETRIES, Candidates, fill, make_models, mixes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="large")
    parser.add_argument("--mix", choices=mixes(), default="mixed")
    parser.add_argument("--patches", type=int, default=16384)
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=14)
    args = parser.parse_args()
    args.device, args.layers, args.checkpoint, args.train, args.max_padding = "cuda", 24, None, False, 0
    args.attn = [args.attn]
    with torch.inference_mode():
        models = make_models(args, torch.bfloat16)
        candidates = Candidates(models, fill(mixes()[args.mix], args.patches), args)
        forward = candidates.forwards[f"packed {args.attn[0]}" + (" compiled" if args.compile else "")]
        for _ in range(3):
            next(forward())
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            next(forward())
            torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=args.rows, max_name_column_width=70))


if __name__ == "__main__":
    main()
