"""Other names of the options of training/finetune.py: those of transformers' TrainingArguments and of the scripts that
tune Qwen-VL and LLaVA models. training/README.md lists where they differ.
"""

import argparse
from pathlib import Path

from moss_vl.training.data_files import PARQUET, is_data_set


GIVEN = "given_names"  # attribute of a namespace: option -> {name on the command line: value}
DATA_SUFFIXES = (".json", ".jsonl", *PARQUET)


def switch(text: str) -> bool:
    """An argparse type: True or False, as transformers' parser reads them."""
    if text.lower() in ("true", "yes", "1", "t", "y"):
        return True
    if text.lower() in ("false", "no", "0", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def steps(text: str) -> int | None:
    """An argparse type: a number of steps; None for transformers' -1, no limit."""
    number = int(text)
    if number < -1 or number == 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, or -1 for no limit, got {text}")
    return None if number == -1 else number


def warmup_ratio(text: str) -> float:
    """An argparse type: a share of all steps."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return number


steps.__name__, warmup_ratio.__name__ = "whole number", "number"

# option -> its other names, with the arguments of `add_argument` that differ
ALIASES = {
    "--checkpoint": {"--model-name-or-path": {}},
    "--data": {"--data-path": {}, "--data-dir": {}},
    "--eval-data": {"--eval-data-path": {}, "--eval-path": {}},
    "--output": {"--output-dir": {}},
    "--max-length": {"--model-max-length": {}},
    "--workers": {"--dataloader-num-workers": {}},
    "--fps": {"--video-fps": {}},
    "--min-frames": {"--video-min-frames": {}},
    "--max-frames": {"--video-max-frames": {}},
    "--lora-rank": {"--lora-r": {}},
    "--lr": {"--learning-rate": {}},
    "--lr-vision": {"--vision-tower-lr": {}, "--vision-lr": {}},
    "--lr-merger": {"--mm-projector-lr": {}, "--merger-lr": {}},
    "--epochs": {"--num-train-epochs": {}},
    "--steps": {"--max-steps": {"type": steps}},
    "--batch-size": {"--per-device-train-batch-size": {}},
    "--accumulation": {"--gradient-accumulation-steps": {}},
    "--schedule": {"--lr-scheduler-type": {}},
    "--warmup": {"--warmup-steps": {}, "--warmup-ratio": {"type": warmup_ratio}},
    "--gradient-checkpointing": {"--activation-checkpointing": {}},
    "--attn": {"--attn-implementation": {}},
    "--cpu": {"--use-cpu": {}},
    "--log-steps": {"--logging-steps": {}},
    "--keep": {"--save-total-limit": {}},
}
_SWITCH = {"type": switch, "nargs": "?", "const": True, "default": None}
# Options of other programs without an option of the same meaning
OTHER_OPTIONS = {
    "--lora-enable": _SWITCH,
    "--tune-mm-vision": _SWITCH,
    "--tune-mm-mlp": _SWITCH,
    "--tune-mm-llm": _SWITCH,
}
TUNED_PARTS = {
    "tune_mm_vision": ("vision",),
    "tune_mm_mlp": ("merger",),
    "tune_mm_llm": ("cross", "language", "head"),
}


class Named(argparse.Action):
    """Stores the value of an option together with the name under which it was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        value = self.const if self.nargs == 0 else values
        setattr(namespace, self.dest, value)
        if not hasattr(namespace, GIVEN):
            setattr(namespace, GIVEN, {})
        getattr(namespace, GIVEN).setdefault(self.dest, {})[option_string] = value


def with_dashes(argv) -> list[str]:
    """The words of a command line, with dashes for underscores in the names of options."""
    words = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        words.append(word)
    return words


def check_names(parser, args) -> None:
    """Ends the program if two names of one option have different values."""
    for values in getattr(args, GIVEN, {}).values():
        (first, value), *others = values.items()
        for other, found in others:
            if found != value:
                parser.error(f"{first} and {other} name the same option, and disagree; give one of them")


def apply_other_options(parser, args, parts) -> None:
    """Turns `OTHER_OPTIONS` into options of finetune.py. Ends the program if they contradict others."""
    given = vars(args).pop(GIVEN, {})
    tuned = {name: vars(args).pop(name) for name in TUNED_PARTS}
    tuned = {name: value for name, value in tuned.items() if value is not None}
    if tuned:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in tuned)
        chosen = {part for name, value in tuned.items() if value for part in TUNED_PARTS[name]}
        if not chosen:
            parser.error(f"{names}: all are False, so nothing would be trained")
        if "train" in given and set(args.train) != chosen:
            parser.error(f"{names} train {' '.join(part for part in parts if part in chosen)}, and --train says "
                         f"{' '.join(args.train)}; give one of them")  # fmt: skip
        args.train = [part for part in parts if part in chosen]
    enable = vars(args).pop("lora_enable")
    if enable is not None and enable != (args.lora_rank > 0):
        parser.error(f"--lora-enable {enable}, and --lora-rank is {args.lora_rank}; give a rank above 0 for adapters, "
                     "and none without")  # fmt: skip


def data_files(paths: list[Path]) -> list[Path]:
    """The data files that `paths` name. A folder stands for its data files, in the order of their names, unless
    `datasets.save_to_disk` wrote it.

    Raises:
        FileNotFoundError: for a folder without such a file.
    """
    files = []
    for path in paths:
        found = [path]
        if path.is_dir() and not is_data_set(path):
            found = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no data file in the folder {path}; expected {', '.join(DATA_SUFFIXES)}")
        files += found
    return files
