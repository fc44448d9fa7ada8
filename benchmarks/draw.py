"""Draws the pictures of docs/performance.md from the JSON of the other benchmarks, with matplotlib:

python benchmarks/draw.py --parts parts.json --model model.json --into docs/performance
"""

import argparse
import json
from pathlib import Path


COLOURS = (
    "#4c6a92",
    "#6f9bc8",
    "#a3c4e0",
    "#d5e4f1",
    "#8a7fb8",
    "#c9c3e0",
    "#c0703a",
    "#e09a5f",
    "#f0c393",
    "#7a9a6a",
    "#b9b9b9",
)


def draw_parts(path: Path, into: Path, pyplot) -> None:
    """A bar per length, divided into parts, in percent of the prefill."""
    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(result["rows"]) + 2.2), layout="constrained")
    names = [f"{row['frames']} frames, {row['dtype']}" for row in result["rows"]]
    whole = [sum(part["median"] for part in row["seconds"].values()) for row in result["rows"]]
    left = [0.0] * len(names)  # where the next piece of each bar starts
    for part, colour in zip(result["rows"][0]["seconds"], COLOURS, strict=True):
        shares = [
            100 * row["seconds"][part]["median"] / total for row, total in zip(result["rows"], whole, strict=True)
        ]
        axes.barh(names, shares, left=left, color=colour, label=part)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    for name, total in zip(names, whole, strict=True):
        axes.text(100.5, name, f"{total:.1f} s", va="center")
    axes.set(xlim=(0, 108), xlabel="% of the prefill")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(into / "prefill_by_part.png", dpi=110)


def draw_memory(path: Path, into: Path, pyplot) -> None:
    """Peak memory of a prefill over the length, measured and by the formula."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    frames = [row["frames"] for row in rows]
    for name, colour in zip(rows[0]["memory"], COLOURS[::2], strict=False):
        axes.plot(frames, [row["memory"][name] / 1e9 for row in rows], marker="o", color=colour, label=name)
    axes.plot(frames, [row["formula"] / 1e9 for row in rows], "k:", label="formula")
    axes.set(xlabel="frames of 448x448", ylabel="GB beyond weights and pixels", xscale="log", yscale="log")
    axes.set_xticks(frames, frames)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(into / "memory_over_length.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    args.into.mkdir(parents=True, exist_ok=True)
    if args.parts is not None:
        draw_parts(args.parts, args.into, pyplot)
    if args.model is not None:
        draw_memory(args.model, args.into, pyplot)


if __name__ == "__main__":
    main()
