# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of benchmarks/throughput.py as lines and as a plot."""

from pathlib import Path

from candidates import PEERS


def print_results(results: dict) -> None:
    for run in results["runs"]:
        print(f"\n{run['dtype']}, matrix rate {run['matrix_rate'] / 1e12:.2f} TFLOP/s")
        for mix in run["mixes"]:
            print(f"  {mix['mix']}: {mix['images']} images, {mix['patches']} patches")
            for name, row in mix["candidates"].items():
                memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
                line = f"    {name:32} {row['seconds'] * 1e3:8.2f} ms{memory}"
                line += f", {row['patches_per_second']:.0f} patches/s"
                line += f", {row['flops_utilisation']:.0%} of the rate"
                if row.get("speedup_over"):
                    line += "; " + ", ".join(f"{peer} x{ratio:.2f}" for peer, ratio in row["speedup_over"].items())
                if "stream_seconds" in row:
                    line += f"; in a stream {row['stream_seconds'] * 1e3:.2f} ms"
                if row.get("stream_speedup_over"):
                    ratios = row["stream_speedup_over"].items()
                    line += ": " + ", ".join(f"{peer} x{ratio:.2f}" for peer, ratio in ratios)
                if "limit_share" in row:
                    line += f"; {row['limit_share']:.3f} of the limit, {row['stream_limit_share']:.3f} in a stream"
                if "matrix_product_share" in row:
                    shares = row["matrix_product_share"].items()
                    line += "; share of " + ", ".join(f"{library} {share:.3f}" for library, share in shares)
                if "max_difference_to_loop" in row:
                    line += f"; max diff {row['max_difference_to_loop']:.1e}"
                print(line)
        for row in run["growth"]:
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 2**20:.0f} MiB"
            line = f"  {row['patches']:6} patches: {row['seconds_per_patch'] * 1e6:.2f} us per patch"
            print(f"{line}, x{row['seconds_per_patch_over_fewest']:.3f} of the fewest{memory}")


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(11, 3.4 * len(runs)), squeeze=False)
    for (bars, growth), run in zip(axes, runs, strict=True):
        names = [mix["mix"] for mix in run["mixes"]]
        packed = next(iter(run["mixes"][0]["candidates"]))
        for index, peer in enumerate(PEERS):
            ratios = [mix["candidates"][packed]["speedup_over"].get(peer, 0) for mix in run["mixes"]]
            if any(ratios):
                bars.bar([position + 0.17 * index for position in range(len(names))], ratios, 0.15, label=peer)
        bars.axhline(1, color="black", linewidth=0.8)
        bars.set_xticks([position + 0.34 for position in range(len(names))], names, rotation=20, fontsize=8)
        bars.set_ylabel("times as fast as")
        bars.set_title(f"{packed}, {run['dtype']}", fontsize=10)
        if bars.get_legend_handles_labels()[0]:
            bars.legend(fontsize=8)
        if run["growth"]:
            patches = [row["patches"] for row in run["growth"]]
            growth.plot(patches, [row["seconds_per_patch"] * 1e6 for row in run["growth"]], "o-")
            growth.set_xscale("log", base=2)
            growth.set_ylim(bottom=0)
            growth.set_xlabel("patches in the batch, images of 256")
            growth.set_ylabel("microseconds per patch")
        else:
            growth.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
