"""Draws the pictures of docs/performance.md from the JSON of the other benchmarks, with matplotlib:

python benchmarks/draw.py --parts parts.json --model model.json --memory memory.json --into docs/performance
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


def draw_memory(model: Path, memory: Path, into: Path, pyplot) -> None:
    """Peak memory of prefill over the length, measured and by the formula."""
    rows = [row for row in json.loads(model.read_text(encoding="utf-8"))["rows"] if row["dtype"] == "float32"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    colours = {"ours": COLOURS[6], "plain": COLOURS[0], "qwen3vl": COLOURS[9]}
    for name in rows[0]["memory"]:
        axes.plot(
            [row["frames"] for row in rows],
            [row["memory"][name] / 1e6 for row in rows],
            marker="o",
            color=colours[name],
            label=name,
        )
    formula = [row for row in json.loads(memory.read_text(encoding="utf-8"))["rows"] if row["dtype"] == "float32"]
    axes.plot(
        [row["frames"] for row in formula], [row["formula"]["peak"] / 1e6 for row in formula], "k:", label="formula"
    )
    axes.set(xlabel="frames of 448x448", ylabel="MB beyond weights and pixels", xscale="log", yscale="log")
    axes.set_xticks([row["frames"] for row in rows], [row["frames"] for row in rows])
    axes.minorticks_off()
    axes.set_yticks([50, 100, 200, 500, 1000, 2000, 5000], [50, 100, 200, 500, 1000, 2000, 5000])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(into / "memory_over_length.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("parts", "model", "memory", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    args.into.mkdir(parents=True, exist_ok=True)
    draw_parts(args.parts, args.into, pyplot)
    draw_memory(args.model, args.memory, args.into, pyplot)


if __name__ == "__main__":
    main()
