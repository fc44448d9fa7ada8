"""Tunes a MOSS-VL checkpoint on your own records: whole parts of the model, or low-rank adapters (LoRA).

`python training/finetune.py --help` lists the options; training/README.md explains them.
"""

import gc
import importlib.util
import json
import logging
import os
import random
import re
import sys
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    TrainerCallback,
    TrainingArguments,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.options import options_of
from moss_vl.tools.command_line import message_of
from moss_vl.training.batches import BadRecord, Collator, RecordDataset, check_record
from moss_vl.training.records import read_records
from moss_vl.training.streaming import StreamedRecords, continue_streams, stream_records
from moss_vl.training.trainer import RecordTrainer, make_token_loss
from moss_vl.training.tuning_options import FIXED_ON_RESUME, PROCESSOR_OPTIONS, parse


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads do not survive forked data-loader workers

logger = logging.getLogger("finetune")

SETTINGS_FILE = "finetune.json"  # in the output folder: the options of the run
ADAPTER_FOLDER = "adapter"  # inside the output folder, if that holds the merged checkpoint


def main(argv=None) -> int:
    """Runs the command; returns the exit code and prints errors on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main() else logging.WARNING)
    args = parse(argv)
    try:
        return merge(args) if args.data is None else finetune(args)
    except KeyboardInterrupt:
        return fail("interrupted; run the same command with --resume to continue from the last checkpoint", 130)
    except BadRecord as error:
        return fail(error_text(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        remedies = "--gradient-checkpointing, --bf16, a smaller --batch-size, fewer --max-pixels or --max-frames"
        return fail(f"out of memory; try {remedies}", 1)


def fail(message: str, code: int) -> int:
    print(f"finetune.py: {message}", file=sys.stderr)
    return code


def error_text(error: Exception) -> str:
    """The message of an exception. In a BadRecord from a data-loader worker, it follows the worker's traceback."""
    if isinstance(error, BadRecord):
        return str(error).rstrip().rsplit("BadRecord: ", 1)[-1]
    return str(error) if isinstance(error, ValueError) and str(error) else message_of(error)


def is_main() -> bool:
    """Whether this is the process that writes files, among those started by torchrun or accelerate."""
    return int(os.environ.get("RANK", "0")) == 0


# the output folder


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


# parts of the model


def part_of(name: str, config) -> str:
    """The part (one of `tuning_options.PARTS`) of the parameter or module with this name."""
    if name.startswith("model.visual.merger.") or name == "model.separator_token":
        return "merger"
    if name.startswith("model.visual."):
        return "vision"
    layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in config.text_config.cross_attention_layers:
        return "cross"
    return "head" if name.startswith("lm_head") else "language"


def train_only(model, parts) -> None:
    """Makes the parameters of these parts trainable and freezes all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, model.config) in parts)


def linear_layers(model, parts) -> list[str]:
    """Names of the linear layers of these parts, which adapters can be added to."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if part_of(name, model.config) in parts]


def lora_targets(model, parts, wanted=None) -> list[str]:
    """The linear layers of these parts whose last name, such as `q_proj`, is in `wanted` (None: all).

    Raises:
        ValueError: for a name that no layer has.
    """
    layers = linear_layers(model, parts)
    known = {name.rsplit(".", 1)[-1] for name in layers}
    for name in wanted or ():
        if name not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"--lora-targets: {name!r} is no linear layer of {', '.join(parts)}; known: {names}")
    return [name for name in layers if wanted is None or name.rsplit(".", 1)[-1] in wanted]


def check_model(args) -> None:
    """Builds the model without weights and raises ValueError if the options do not fit it."""
    folder = Path(args.checkpoint)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--checkpoint {folder} is an adapter; merge it first with --merge {folder} --output DIR")
    config = AutoConfig.from_pretrained(args.checkpoint, trust_remote_code=True)
    if config.model_type != "moss_vl":
        raise ValueError(f"--checkpoint {args.checkpoint} is a {config.model_type}; expected moss_vl")
    if config.tie_word_embeddings and "head" in args.train:
        raise ValueError(
            "--train head: this checkpoint ties its head to the embeddings (tie_word_embeddings); give language"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    if args.lora_rank:
        lora_targets(model, args.train, args.lora_targets)


def load_model(args):
    """The model with its parts trainable or frozen, or with new adapters. Whole parts are trained in float32."""
    options = {} if args.attn is None else {"attn_implementation": args.attn}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=dtype, **options)
    torch.manual_seed(args.seed)
    if args.lora_rank:
        return with_adapters(model, args)
    train_only(model, args.train)
    if args.bf16 and args.deepspeed is None:  # DeepSpeed makes its own float32 copies
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def with_adapters(model, args):
    """The model as a PeftModel: new adapters in the parts to train, all other weights frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, args.train, args.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


# merging


def merge(args) -> int:
    """The command `--merge ADAPTER_DIR --output DIR`; returns the exit code."""
    try:
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise ValueError(f"--output {args.output} is not empty; name a new folder")
        merge_adapter(args.merge, args.output, args.checkpoint, args.save_dtype)
    except (ValueError, OSError, ImportError) as error:
        return fail(error_text(error), 2)
    return 0


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


def require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{option} needs the package {package}: pip install {package}")


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


# records


def make_datasets(args, processor) -> tuple[RecordDataset | StreamedRecords, RecordDataset | None]:
    """The checked records to train on, and those to evaluate on."""
    template = uses_template(args, processor)
    options = processor_options(args, processor)

    check = partial(check_record, processor=processor, template=template, **options)

    def read(files):
        return read_records(files, args.skip_bad, check=check)

    pixel_dtype = torch.bfloat16 if args.bf16 else torch.float32
    options |= {"template": template, "max_length": args.max_length, "pixel_dtype": pixel_dtype}

    def dataset(records):
        return RecordDataset(records, processor, args.skip_bad, **options)

    held_out = read(args.eval_data) if args.eval_data else []
    if args.streaming:
        streams = stream_records(args, processor, check=check, **options)
        return streams, dataset(held_out) if held_out else None
    records = read(args.data)
    if args.eval_share is not None:
        records, held_out = split_records(records, args.eval_share, args.seed)
    return dataset(records), dataset(held_out) if held_out else None


def uses_template(args, processor) -> bool:
    """Whether texts are rendered with the chat template. Raises ValueError if the checkpoint lacks what they need."""
    if args.template and not processor.chat_template:
        raise ValueError(
            "--template: the checkpoint has no chat template; add chat_template.jinja to it, or give --no-template"
        )
    if processor.tokenizer.pad_token is None or processor.tokenizer.eos_token is None:
        raise ValueError(
            "the checkpoint's tokenizer has no pad_token or no eos_token; set them in its tokenizer_config.json"
        )
    return bool(processor.chat_template) if args.template is None else args.template


def processor_options(args, processor) -> dict:
    """The options of the processors that the command line gives. Raises ValueError if they contradict each other."""
    options = {option: getattr(args, name) for name, option in PROCESSOR_OPTIONS.items()}
    options = {option: value for option, value in options.items() if value is not None}
    processor.image_processor.resolve(options_of("image", options))
    processor.video_processor.resolve(options_of("video", options))
    if args.workers:
        options["num_extract_threads"] = 1  # the workers already run in parallel
    return options


def split_records(records: list, share: float, seed: int) -> tuple[list, list]:
    """Records to train on, and a random `share` of all to evaluate on, at least one."""
    count = max(1, round(share * len(records)))
    if count >= len(records):
        raise ValueError(
            f"--eval-share {share} holds out {count} of {len(records)} records; nothing is left to train on"
        )
    chosen = set(random.Random(seed).sample(range(len(records)), count))
    held_out = [record for index, record in enumerate(records) if index in chosen]
    return [record for index, record in enumerate(records) if index not in chosen], held_out


# training


def finetune(args) -> int:
    """A whole run, from the options of `parse` to the output folder; returns the exit code."""
    try:
        trainer, processor, last = prepare(args)
    except (ValueError, OSError, ImportError) as error:
        return fail(error_text(error), 2)
    gc.collect()  # a forked worker that freed a frame of this process would wait for the decoder's threads forever
    trainer.train(resume_from_checkpoint=last)
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    # transformers 5 evaluates after the last step, transformers 4 does not
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_state()
    save(args, trainer, processor)
    return 0


def prepare(args) -> tuple:
    """Checks options and data, then loads the model.

    Returns:
        Trainer, processor, and the checkpoint folder to resume from or None.

    Raises:
        ValueError, OSError, ImportError: for wrong options or data, before the model is loaded.
    """
    check_requirements(args)
    last = check_output(args)
    check_model(args)
    arguments = training_arguments(args)
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    train_data, eval_data = make_datasets(args, processor)
    token_loss = make_token_loss(args, processor, train_data, eval_data)
    if args.streaming:
        continue_streams(train_data, arguments, last)

    model = load_model(args)
    trainer = RecordTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor.tokenizer.pad_token_id, args.vision_chunk),
        callbacks=[SaveProcessor(processor)],
        token_loss=token_loss,
    )
    vars(model.config).pop("use_cache", None)  # set by transformers 5's Trainer; it would be saved with the model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    counts = "streamed" if args.streaming else len(train_data), len(eval_data or ())
    logger.info(
        "%s records, %d for evaluation; %s parameters of %s are trained",
        *counts,
        f"{trained:,}",
        ", ".join(args.train),
    )
    if is_main():
        args.output.mkdir(parents=True, exist_ok=True)
        write_settings(args, args.output)
    return trainer, processor, last


def check_requirements(args) -> None:
    """Raises an error for a missing package or file, and makes the path of the checkpoint absolute."""
    if args.lora_rank:
        require("peft", "--lora-rank")
    if args.deepspeed is not None:
        require("deepspeed", "--deepspeed")
        read_json(args.deepspeed)
    if Path(args.checkpoint).exists():
        # An adapter stores the path, and may be loaded from another working directory.
        args.checkpoint = str(Path(args.checkpoint).resolve())
    elif args.checkpoint.count("/") != 1:
        raise FileNotFoundError(f"no such checkpoint folder: {args.checkpoint}")


def training_arguments(args) -> TrainingArguments:
    arguments = TrainingArguments(
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
        renamed |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return renamed


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
    if not args.lora_rank and args.deepspeed is None:
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


if __name__ == "__main__":
    sys.exit(main())
