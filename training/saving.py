"""The output folder of a run: whether it may be written or resumed, its settings, its weights; merging adapters."""

import gc
import json
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback

from moss_vl.training.processes import is_main
from moss_vl.training.requirements import require
from moss_vl.training.trainer_arguments import read_json
from moss_vl.training.tuning_options import FIXED_ON_RESUME


logger = logging.getLogger("finetune")

SETTINGS_FILE = "finetune.json"  # in the output folder: the options of the run
ADAPTER_FOLDER = "adapter"  # inside the output folder, if that holds the merged checkpoint


def check_output(args) -> str | None:
    """The checkpoint folder to resume from; None for a new run.

    Raises:
        ValueError: if the output folder holds anything but a run with the same settings.
    """
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; expected a folder")
    if not args.output.exists() or not any(args.output.iterdir()):
        return None
    if is_main():  # other processes may find files that the main process is already writing
        if not args.resume:
            raise ValueError(f"--output {args.output} is not empty; name another folder, or give --resume")
        check_same_settings(args)
    # trainer_state.json is written last: a folder without it is incomplete
    complete = [path.parent for path in args.output.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    return str(newest) if args.resume and newest else None


def check_same_settings(args) -> None:
    """Raises ValueError if the run in the output folder has another value for a setting that must not change."""
    file = args.output / SETTINGS_FILE
    if not file.is_file():
        raise ValueError(
            f"--resume: {args.output} has no {SETTINGS_FILE}, so it is not the output of a run; name the folder of one"
        )
    before, now = json.loads(file.read_text(encoding="utf-8")), settings_of(args)
    for name in FIXED_ON_RESUME:
        if before.get(name) != now[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--resume: the run began with {option} {before.get(name)}, got {now[name]}; it must be the same"
            )


def write_settings(args, folder: Path) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps(settings_of(args), indent=2) + "\n", encoding="utf-8")


def settings_of(args) -> dict:
    """The options, as JSON values."""
    return json.loads(json.dumps(vars(args), default=str))


def merge_adapter(adapter, output, checkpoint=None, dtype=None) -> None:
    """Merges an adapter into its base checkpoint and writes the result to the folder `output`.

    Args:
        adapter: a folder written by a run with `--lora-rank`.
        checkpoint: the base checkpoint; default: the one that the adapter's config names.
        dtype: "float32" or "bfloat16"; default: that of the adapter's run if known, else that of the base.

    Raises:
        ValueError: if `adapter` is not the folder of an adapter.
    """
    require("peft", "--merge")
    from peft import PeftModel

    adapter, output = Path(adapter), Path(output)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"--merge {adapter}: there is no adapter_config.json; expected the folder of an adapter")
    base = checkpoint or read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    if dtype is None:
        settings = adapter / SETTINGS_FILE
        dtype = read_json(settings)["save_dtype"] if settings.is_file() else "auto"
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=dtype)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(output)
    processor.save_pretrained(output)
    logger.info("%s: %s with the adapter %s merged into it", output, base, adapter)


class SaveProcessor(TrainerCallback):
    """Saves the processor into every checkpoint-N folder. Trainer's `processing_class` would also change token ids."""

    def __init__(self, processor):
        self.processor = processor

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.processor.save_pretrained(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))


def save(args, trainer, processor) -> None:
    """Writes the output folder: the whole checkpoint, the adapter, or with --merge both."""
    folder = args.output / ADAPTER_FOLDER if args.merge else args.output
    if not args.lora_rank:
        if trainer.is_sharded:
            trainer.save_dtype = getattr(torch, args.save_dtype)
        else:
            trainer.model.to(getattr(torch, args.save_dtype))
    trainer.save_model(str(folder))
    if not is_main():
        return
    processor.save_pretrained(folder)
    if args.merge:
        write_settings(args, folder)
        trainer.model = trainer.model_wrapped = trainer.optimizer = None
        gc.collect()  # frees the model: `merge_adapter` loads the base again, so that a later --merge writes the same
        merge_adapter(folder, args.output, dtype=args.save_dtype)
    logger.info("done: %s", args.output)


def add_to_adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Adds weights of the base model to the file of an adapter, under the names that they have in a PeftModel. PEFT
    and transformers load them with the adapter, in place of those of the base checkpoint."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Writes the dtype of the saved weights into config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    name = "dtype" if "dtype" in config else "torch_dtype"
    config[name] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
