"""Plots the log of a run of train_nano.py: python training/nano/curves.py runs/nano/log.jsonl curves.png"""

import argparse
import json
from pathlib import Path


def columns(log: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (steps, values) of all logged values."""
    out: dict = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "progress", "time", "kinds", "seconds"):
                steps, values = out.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return out


def smooth(values: list[float], share: float = 0.8) -> list[float]:
    """An exponential moving average with decay `share`, corrected for its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + 1 - share
        out.append(total / weight)
    return out


def main():
    parser = argparse.ArgumentParser(description="Plot the log of a run of train_nano.py.")
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = columns(args.log)
    groups = {
        "facts of vision tokens, share right": [name for name in logged if name.startswith("names ")],
        "facts of pictures and frames, share right; attention on its targets": [
            name for name in logged if name.startswith(("knows ", "attends "))
        ],
        "loss of answers": [name for name in logged if name.startswith("loss ")],
        "answers, share with all tokens right": [
            name
            for name in logged
            if not name.startswith(("names ", "knows ", "attends ", "loss ", "naming", "inking"))
        ],
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 11), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, groups.items(), strict=True):
        for number, name in enumerate(names):
            steps, values = logged[name]
            label, style = (
                name.removeprefix("names ").removeprefix("knows ").removeprefix("loss "),
                ("-", "--", ":")[number // 10 % 3],
            )
            axis.plot(steps, smooth(values), label=label, linestyle=style)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[1, 0].set_yscale("log")
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
