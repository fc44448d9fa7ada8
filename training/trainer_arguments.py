"""The `TrainingArguments` of a run, and its options that finetune.py passes through.

Each field of `TrainingArguments` is one of three: an option of finetune.py under this or another name, a field whose
value is fixed (`FIXED`, `REFUSED`), or passed through with its type.
"""

import argparse
import json
import logging
import os
from dataclasses import fields
from inspect import signature
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from moss_vl.checks import nearest_name


logger = logging.getLogger("finetune")

# Fields whose value is fixed: (value, why another one is refused)
FIXED = {
    "do_train": (True, "a run with --data trains"),
    "remove_unused_columns": (False, "the inputs of the model would be removed"),
    "label_names": (["labels"], "the model reads labels under this name"),
    "prediction_loss_only": (True, "the logits of long prompts would fill the memory; --eval-generate writes answers"),
    "label_smoothing_factor": (0.0, "logits before the first learned token are not computed"),
    "use_cache": (False, "training has no cache"),
    "save_safetensors": (True, "adapters and checkpoints are read as safetensors"),
    "push_to_hub": (False, "the output is complete only after the run; upload the folder then"),
    "use_liger_kernel": (False, "Liger has no kernels for this model"),
    "past_index": (-1, "the model returns no such output"),
}
_EVALUATION = "an evaluation measures the loss, and --eval-generate writes answers"
_LENGTHS = "the lengths are known only after all media were decoded"
_HUB = "finetune.py uploads nothing; upload the output folder"
REFUSED = {
    "do_eval": "give --eval-data or --eval-share",
    "do_predict": "give --eval-generate",
    "overwrite_output_dir": "name another --output, or give --resume",
    "resume_from_checkpoint": "give --resume",
    "no_cuda": "give --cpu",
    "use_mps_device": "MPS is used where it is there; --cpu turns it off",
    "per_gpu_train_batch_size": "give --batch-size",
    "per_gpu_eval_batch_size": "give --per-device-eval-batch-size",
    "bf16_full_eval": "the trained weights would be rounded",
    "fp16_full_eval": "the trained weights would be rounded",
    "group_by_length": _LENGTHS,
    "length_column_name": _LENGTHS,
    "parallelism_config": "tensor and context parallelism are not supported",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "jit_mode_eval": "the model cannot be traced",
    "use_legacy_prediction_loop": "one loop is enough",
    "fsdp_min_num_params": "give --fsdp-config",
    "fsdp_transformer_layer_cls_to_wrap": "give --fsdp-config",
    **dict.fromkeys(
        (
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "include_inputs_for_metrics",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            "hub_token",
            "hub_model_id",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
            "push_to_hub_model_id",
            "push_to_hub_organization",
            "push_to_hub_token",
        ),
        _HUB,
    ),
}
# Fields that have an option of finetune.py of this or another name. The command line takes both names.
COVERED = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "activation_checkpointing": "gradient_checkpointing",
    "use_cpu": "cpu",
    "dataloader_num_workers": "workers",
    "logging_steps": "log_steps",
    "save_total_limit": "keep",
    **{
        name: name
        for name in (
            "weight_decay",
            "max_grad_norm",
            "seed",
            "bf16",
            "gradient_checkpointing",
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "save_steps",
            "eval_steps",
            "report_to",
        )
    },
}
_EPOCHS = "there are no epochs; give steps"
STREAMED = {  # fields that cannot act on streamed records -> why
    "data_seed": "give --seed",
    "train_sampling_strategy": "give --shuffle-buffer; 1 keeps the order of the data",
    "ignore_data_skip": "--resume always goes on after the last batch",
    "auto_find_batch_size": "the order of the records depends on --batch-size",
    "dataloader_in_order": "--resume needs the order of the batches",
    **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), _EPOCHS),
}
SHARDED_LAYERS = ("MossVLVisionBlock", "MossVLSelfAttentionLayer", "MossVLCrossAttentionLayer")
FSDP = "full_shard auto_wrap"  # the default of --fsdp; transformers 5 calls it True
NEEDS_EVALUATION = ("eval_strategy", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")
CHECKPOINTING_KWARGS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


def read_trainer_options(parser: argparse.ArgumentParser, words: list[str]) -> dict:
    """The fields of `TrainingArguments` that `words`, unknown to finetune.py, set. Ends the program for others."""
    if not words:
        return {}
    known = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    known.error = parser.error
    for action in known._actions:
        action.default, action.required = argparse.SUPPRESS, False
    found, unknown = known.parse_known_args(words)
    for word in unknown:
        name = word.partition("=")[0]
        names = [option for each in (parser, known) for option in each._option_string_actions]
        near = nearest_name(name, {option.replace("_", "-") for option in names}, cutoff=0.7)
        parser.error(f"unknown option {name}" + (f"; did you mean {near}?" if near else "; --help lists the options"))
    for name, value in vars(found).items():
        check_field(parser, name, value)
    return vars(found)


def check_field(parser: argparse.ArgumentParser, name: str, value) -> None:
    """Ends the program for a value of a field that would break the run, or have no effect."""
    option = f"--{name.replace('_', '-')}"
    if name == "train_sampling_strategy":
        reason = _LENGTHS if value == "group_by_length" else None
    elif name in FIXED:
        expected, reason = FIXED[name]
        reason = None if value == expected else reason
    elif name == "accelerator_config":
        reason = batches_are_split(value)
    else:
        reason = REFUSED.get(name)
    if reason is not None:
        parser.error(f"{option} {value} is not supported: {reason}")


def batches_are_split(config: str) -> str | None:
    """Why a value of --accelerator-config breaks the run, or None."""
    try:
        config = json.loads(config if config.lstrip().startswith("{") else open(config, encoding="utf-8").read())
    except (ValueError, OSError) as error:
        return f"it is no JSON object and no file with one: {error}"
    wrong = [name for name in ("split_batches", "dispatch_batches") if config.get(name)]
    return f"{', '.join(wrong)} would split the packed patches of a batch as if they were samples" if wrong else None


def check_trainer_options(parser, args, evaluates: bool) -> None:
    """Ends the program if fields that are passed through contradict other options."""
    for name in args.trainer:
        option = f"--{name.replace('_', '-')}"
        if name in NEEDS_EVALUATION and not evaluates:
            parser.error(f"{option} needs held-out records; give --eval-data or --eval-share")
        if name in CHECKPOINTING_KWARGS and not args.gradient_checkpointing:
            parser.error(f"{option} needs --gradient-checkpointing")
    for name, value in args.trainer.items() if args.streaming else ():
        if name in STREAMED and (STREAMED[name] != _EPOCHS or str(getattr(value, "value", value)) == "epoch"):
            parser.error(f"--{name.replace('_', '-')} {value} is not for --streaming: {STREAMED[name]}")
    if args.trainer.get("fp16") and args.bf16:
        parser.error("give --fp16 or --bf16, not both")


def training_arguments(args) -> TrainingArguments:
    """The `TrainingArguments` of the options. Sets up torch.distributed if torchrun started this process."""
    arguments = dict(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        bf16=args.bf16,
        deepspeed=None if args.deepspeed is None else str(args.deepspeed),
        ddp_find_unused_parameters=False,  # every parameter gets a gradient, also from a batch of texts
        # without a GPU, several processes would otherwise each train alone
        use_cpu=args.cpu or not torch.accelerator.is_available(),
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=not args.cpu and torch.accelerator.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        logging_steps=args.log_steps,
        save_steps=args.save_steps,
        save_total_limit=args.keep,
        eval_strategy="steps" if args.eval_data or args.eval_share else "no",
        eval_steps=args.eval_steps or args.save_steps,
        report_to=args.report_to or "none",
        **renamed_arguments(args),
    )
    if args.fsdp is not None:
        arguments |= sharding_arguments(args)
    arguments = TrainingArguments(**(arguments | args.trainer))
    if arguments.n_gpu > 1:  # Trainer would split the packed patches among the GPUs as if they were samples
        logger.warning("one of %d GPUs is used; start with torchrun or accelerate launch to use all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def renamed_arguments(args) -> dict:
    """Training arguments that transformers 4 and 5 name differently: warmup and gradient checkpointing."""
    known = signature(TrainingArguments).parameters
    if args.warmup < 1 and "warmup_ratio" in known:
        renamed = {"warmup_ratio": args.warmup}
    else:
        renamed = {"warmup_steps": int(args.warmup) if args.warmup >= 1 else args.warmup}
    if args.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        renamed[name] = True
        if not args.trainer.keys() & set(CHECKPOINTING_KWARGS):
            renamed[f"{name}_kwargs"] = {"use_reentrant": False}
    return renamed


def sharding_arguments(args) -> dict:
    """The arguments of FSDP. Its second version is the default, also in transformers 4, which reads the version from
    the environment, as `accelerate launch` sets it."""
    config = {} if args.fsdp_config is None else read_json(args.fsdp_config)
    if not isinstance(config, dict):
        raise ValueError(f"--fsdp-config {args.fsdp_config} must hold a JSON object, got {config!r:.60}")
    config = {"version": 2, "transformer_layer_cls_to_wrap": list(SHARDED_LAYERS)} | config
    is_new = "activation_checkpointing" in signature(TrainingArguments).parameters  # transformers 5
    if not is_new:
        os.environ["FSDP_VERSION"] = str(config.pop("version"))
    return {"fsdp": True if is_new and args.fsdp == FSDP else args.fsdp, "fsdp_config": config}


def passed_fields() -> list[str]:
    """The fields of the installed `TrainingArguments` that finetune.py passes through."""
    names = [field.name for field in fields(TrainingArguments) if field.init]
    return [name for name in names if name not in (*FIXED, *REFUSED, *COVERED)]


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
