"""What a run needs before it starts: packages, files, and a checkpoint folder."""

import importlib.util
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from moss_vl.checks import nearest_name
from moss_vl.training.trainer_arguments import read_json
from moss_vl.training.tuning_options import part_rates


# Package of a reporter, and of optimizers whose name contains a word, if the package has another name.
REPORTER_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
OPTIMIZER_PACKAGES = {  # the first word that is in the name of the optimizer counts
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "8bit": "bitsandbytes",
    "32bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "anyprecision": "torchdistx",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
}


def check_requirements(args) -> None:
    """Raises an error for a missing package or file, and makes the path of the checkpoint absolute."""
    if args.lora_rank:
        require("peft", "--lora-rank")
    if args.deepspeed is not None:
        require("deepspeed", "--deepspeed")
        check_deepspeed(args, read_json(args.deepspeed))
    check_reporters(args)
    check_optimizer(args.trainer.get("optim"))
    if Path(args.checkpoint).exists():
        # An adapter stores the path, and may be loaded from another working directory.
        args.checkpoint = str(Path(args.checkpoint).resolve())
    elif args.checkpoint.count("/") != 1:
        raise FileNotFoundError(f"no such checkpoint folder: {args.checkpoint}")


def check_deepspeed(args, config) -> None:
    """Raises ValueError for a DeepSpeed file that leaves an option of the command without effect."""
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {args.deepspeed} must hold a JSON object, got {config!r:.60}")
    if "optimizer" in config and (rates := part_rates(args)):
        names = ", ".join(f"--lr-{part}" for part in rates)
        raise ValueError(f"--deepspeed {args.deepspeed} has an optimizer of its own; remove it to use {names}")


def check_reporters(args) -> None:
    """Raises an error for a reporter that transformers does not know, or whose package is not installed. Replaces
    "all" by the names of those that are installed."""
    available = get_available_reporting_integrations()
    if args.report_to == ["all"]:
        args.report_to = available
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            near = nearest_name(name, INTEGRATION_TO_CALLBACK)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise ValueError(f"--report-to {name} is unknown; {hint}")
        # transformers 4 leaves flyte out of its list
        if name not in available and not (name == "flyte" and importlib.util.find_spec("flytekit")):
            package = REPORTER_PACKAGES.get(name, name)
            raise ImportError(f"--report-to {name} needs the package {package}: pip install {package}")


def check_optimizer(name: str | None) -> None:
    """Raises ImportError if the package of `--optim` is not installed."""
    package = next((package for word, package in OPTIMIZER_PACKAGES.items() if word in (name or "")), None)
    if package is not None:
        require(package, f"--optim {name}")


def require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        name = {"optimi": "torch-optimi"}.get(package, package.replace("_", "-"))
        raise ImportError(f"{option} needs the package {name}: pip install {name}")
