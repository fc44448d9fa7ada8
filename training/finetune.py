"""Tunes a MOSS-VL checkpoint on your own records: whole parts of it, or low-rank adapters (LoRA) beside them."""

import argparse
import gc
import importlib.util
import json
import logging
import os
import random
import re
import sys
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.tools.command_line import above_0, at_least, message_of, share
from moss_vl.training.batches import BadRecord, Collator, RecordDataset, render
from moss_vl.training.records import check_options, read_records


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not go with forked data-loader workers

logger = logging.getLogger("finetune")

PARTS = ("vision", "merger", "cross", "language", "head")
SETTINGS_FILE = "finetune.json"  # in the output folder: the options of the run
ADAPTER_FOLDER = "adapter"  # inside the output folder, where that holds the merged checkpoint
KNOBS = {  # options that go to the processor with every call
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "multi_image_max_pixels": "multi_image_max_pixels",
    "video_max_pixels": "video_max_pixels",
    "fps": "video_fps",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
}
# What a resumed run has in common with the one it goes on with: the rest (steps, paths of logs, workers) may change.
KEPT_SETTINGS = (
    "checkpoint",
    "data",
    "eval_data",
    "eval_share",
    "template",
    "max_length",
    "skip_bad",
    *KNOBS,
    "train",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "batch_size",
    "accumulation",
    "seed",
    "bf16",
)
EPILOG = """\
data: a JSON list, or JSONL with an object a line, of
  {"prompt": "What is this?", "response": "a star", "images": ["a.png"], "videos": ["b.mp4"], "system_prompt": "..."}
  {"messages": [{"role": "user", "content": "<|image|>What is this?"}, {"role": "assistant", "content": "a star"}],
   "images": ["a.png"]}
Paths are relative to the file. In the first form the images, then the videos, stand before the prompt; a video may also be
{"video_path": "b.mp4", "segments": [[0.5, 3.0], [4.2]]} (seconds). training/records.py has the rest. What the assistant says is
learned, each turn with its end, and nothing else. All records are checked before anything is trained; what only decoding shows
(a file damaged inside, --max-length) stops the run where it is met, or with --skip-bad the next record takes its place.

parts: vision   the encoder, without its merger         language  embeddings, self-attention layers, last norm
       merger   merger and separator                    head      the language model's head
       cross    the cross-attention layers, gates too
With --lora-rank 0 the parts that --train names are trained as they are; all others stay as they are, bit for bit. With a higher
rank all weights stay, and the linear layers of these parts get adapters: separator, gates, norms and embeddings have none.

the output folder loads as any checkpoint (an adapter needs peft, and its base checkpoint where it was). It also holds
checkpoint-N folders to resume from, trainer_state.json with the losses, and finetune.json with these options.

examples:
  python training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned --lora-rank 16 --merge
  python training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned --train cross merger --epochs 2 --lr 1e-5
  python training/finetune.py --merge tuned/adapter --output merged
  torchrun --nproc_per_node 8 training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned --deepspeed zero3.json

exit codes: 0 done, 1 out of memory, 2 wrong usage or input, 130 interrupted
"""


def main(argv=None) -> int:
    """Runs the command; returns the exit code, with what went wrong on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main() else logging.WARNING)
    args = parse(argv)
    try:
        return merge(args) if args.data is None else finetune(args)
    except KeyboardInterrupt:
        return fail("interrupted; the same command with --resume goes on from the last checkpoint", 130)
    except BadRecord as error:
        return fail(words_of(error), 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        tries = "--gradient-checkpointing, --bf16, a smaller --batch-size, fewer --max-pixels or --max-frames"
        return fail(f"out of memory; try {tries}", 1)


def fail(message: str, code: int) -> int:
    print(f"finetune.py: {message}", file=sys.stderr)
    return code


def words_of(error: Exception) -> str:
    """The words of an exception; of one that came out of a data-loader worker those at the end, behind its traceback."""
    if isinstance(error, BadRecord):
        return str(error).rstrip().rsplit("BadRecord: ", 1)[-1]
    return str(error) if isinstance(error, ValueError) and str(error) else message_of(error)


def is_main() -> bool:
    """Whether this is the process that writes files, of those that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0")) == 0


# the command line


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="finetune.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, positive = at_least(int, 0), at_least(int, 1)
    parser.add_argument("--checkpoint", metavar="PATH", help="folder or hub name of the checkpoint to start from")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder to write; new or empty, unless --resume"
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", type=Path, nargs="+", help="records to learn, JSON or JSONL")
    data.add_argument(
        "--eval-data", metavar="FILE", type=Path, nargs="+", help="records on which the loss is measured"
    )
    data.add_argument(
        "--eval-share", metavar="SHARE", type=share, help="or the share of --data that is set aside for that"
    )
    data.add_argument(
        "--skip-bad", action="store_true", help="leave bad records out, with a warning, where else they are an error"
    )
    data.add_argument(
        "--template",
        action=argparse.BooleanOptionalAction,
        help="render the chat template, or not, for base checkpoints (default: if there is one)",
    )
    data.add_argument(
        "--max-length", metavar="TOKENS", type=positive, help="longest record; a longer one is bad (default: any)"
    )
    data.add_argument(
        "--workers",
        metavar="N",
        type=count,
        default=2,
        help="processes that decode and preprocess; each has two batches ready (default: 2)",
    )
    data.add_argument(
        "--min-pixels", metavar="N", type=positive, help="least pixels of an image or frame after its resize"
    )
    data.add_argument(
        "--max-pixels", metavar="N", type=positive, help="most pixels of an image or frame after its resize"
    )
    data.add_argument(
        "--multi-image-max-pixels", metavar="N", type=positive, help="most pixels of all images of a record"
    )
    data.add_argument("--video-max-pixels", metavar="N", type=positive, help="most pixels of all frames of a record")
    data.add_argument(
        "--fps",
        metavar="RATE",
        type=above_0,
        help="frames a second of a video (of this and all limits: default the checkpoint's)",
    )
    data.add_argument("--min-frames", metavar="N", type=positive, help="least frames of a video")
    data.add_argument("--max-frames", metavar="N", type=positive, help="most frames of the videos of a record")

    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--train",
        metavar="PART",
        nargs="+",
        choices=PARTS,
        default=["merger", "cross", "language"],
        help=f"parts: {', '.join(PARTS)} (default: merger cross language)",
    )
    what.add_argument(
        "--lora-rank",
        metavar="R",
        type=count,
        default=0,
        help="rank of adapters; 0: train the parts whole (default: 0)",
    )
    what.add_argument("--lora-alpha", metavar="A", type=above_0, help="adapters count A / R (default: twice the rank)")
    what.add_argument(
        "--lora-dropout",
        metavar="P",
        type=at_least(float, 0),
        default=0.0,
        help="dropout before adapters (default: 0)",
    )
    what.add_argument(
        "--lora-targets",
        metavar="NAME",
        nargs="+",
        help="linear layers that get adapters, such as q_proj v_proj (default: all of the parts)",
    )
    what.add_argument(
        "--merge",
        metavar="ADAPTER_DIR",
        nargs="?",
        const=True,
        help="write the merged checkpoint, the adapter in a folder inside it; "
        "with ADAPTER_DIR: merge that, train nothing",
    )

    how = parser.add_argument_group("how it is trained")
    how.add_argument(
        "--epochs", metavar="N", type=above_0, default=1.0, help="times that all records are learned (default: 1)"
    )
    how.add_argument("--steps", metavar="N", type=positive, help="optimizer steps, in place of --epochs")
    how.add_argument(
        "--batch-size", metavar="N", type=positive, default=1, help="records a batch and process (default: 1)"
    )
    how.add_argument("--accumulation", metavar="N", type=positive, default=1, help="batches a step (default: 1)")
    how.add_argument(
        "--lr", metavar="RATE", type=above_0, help="highest learning rate (default: 1e-5; 1e-4 for adapters)"
    )
    how.add_argument(
        "--schedule",
        default="cosine",
        help="how it falls: linear, cosine, constant_with_warmup, ... (default: cosine)",
    )
    how.add_argument(
        "--warmup",
        metavar="N",
        type=at_least(float, 0),
        default=0.03,
        help="steps in which it rises at first; below 1: share of all steps (default: 0.03)",
    )
    how.add_argument("--weight-decay", metavar="W", type=at_least(float, 0), default=0.0, help="default: 0")
    how.add_argument(
        "--max-grad-norm",
        metavar="N",
        type=at_least(float, 0),
        default=1.0,
        help="gradients are cut to this (default: 1)",
    )
    how.add_argument(
        "--seed", metavar="N", type=count, default=0, help="of order, dropout and new adapters (default: 0)"
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16; of the weights, only what is trained is kept in float32 "
        "(default: on a GPU that can)",
    )
    running.add_argument(
        "--save-dtype",
        choices=("float32", "bfloat16"),
        help="of the output (default: bfloat16 with --bf16, else float32)",
    )
    running.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    running.add_argument(
        "--vision-chunk",
        metavar="FRAMES",
        type=positive,
        help="frames that the encoder takes at once (default: all; not for DeepSpeed's stage 3)",
    )
    running.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2"), help="attention (default: sdpa)")
    running.add_argument("--deepspeed", metavar="CONFIG", type=Path, help="DeepSpeed's JSON file, passed through")
    running.add_argument("--cpu", action="store_true", help="use no GPU")
    running.add_argument(
        "--log-steps", metavar="N", type=positive, default=10, help="steps between losses (default: 10)"
    )
    running.add_argument(
        "--save-steps", metavar="N", type=positive, default=500, help="steps between checkpoints (default: 500)"
    )
    running.add_argument(
        "--eval-steps", metavar="N", type=positive, help="steps between evaluations (default: --save-steps)"
    )
    running.add_argument(
        "--keep", metavar="N", type=positive, default=2, help="newest checkpoints to keep (default: 2)"
    )
    running.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --output, if there is one"
    )
    running.add_argument(
        "--report-to", metavar="NAME", nargs="+", default=[], help="tensorboard, wandb, ... (default: nothing)"
    )

    args = parser.parse_args(argv)
    if args.data is None and not isinstance(args.merge, str):
        parser.error("nothing to do: give --data, or --merge with the folder of an adapter")
    if args.data is not None and isinstance(args.merge, str):
        parser.error("--merge with a folder trains nothing; leave out --data, or the folder")
    if args.data is not None and args.checkpoint is None:
        parser.error("--data needs --checkpoint")
    if args.eval_data is not None and args.eval_share is not None:
        parser.error("give --eval-data or --eval-share, not both")
    if args.data is not None and args.lora_rank == 0:
        for name in ("merge", "lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is for adapters; give a --lora-rank above 0")
    if args.lora_dropout >= 1:
        parser.error(f"--lora-dropout must be below 1, got {args.lora_dropout}")
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    if args.lr is None:
        args.lr = 1e-4 if args.lora_rank else 1e-5
    if args.bf16 is None:
        args.bf16 = not args.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if args.save_dtype is None and args.data is not None:
        args.save_dtype = "bfloat16" if args.bf16 else "float32"
    args.train = [part for part in PARTS if part in args.train]
    return args


def check_output(args) -> str | None:
    """The checkpoint folder that the run goes on from, None for a new run. Raises ValueError where the folder is another's, or its
    run was another one."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; expected a folder")
    if not args.output.exists() or not any(args.output.iterdir()):
        return None
    if is_main() and not args.resume:  # the other processes may see what this one has begun to write
        raise ValueError(f"--output {args.output} is not empty; name another folder, or go on with --resume")
    if is_main():
        settings = args.output / SETTINGS_FILE
        if not settings.is_file():
            raise ValueError(
                f"--resume: {args.output} has no {SETTINGS_FILE}, so it is no run's output; name the folder of one"
            )
        before, now = json.loads(settings.read_text(encoding="utf-8")), settings_of(args)
        for name in KEPT_SETTINGS:
            if before.get(name) != now[name]:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"--resume: the run began with {option} {before.get(name)}, got {now[name]}; it must be the same"
                )
    whole = [
        path.parent for path in args.output.glob("checkpoint-*/trainer_state.json")
    ]  # the file that is written last
    newest = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    return str(newest) if args.resume and newest else None


def write_settings(args, folder: Path) -> None:
    (folder / SETTINGS_FILE).write_text(json.dumps(settings_of(args), indent=2) + "\n", encoding="utf-8")


def settings_of(args) -> dict:
    """The options as JSON has them."""
    return json.loads(json.dumps(vars(args), default=str))


# parts of the model


def part_of(name: str, config) -> str:
    """Which of `PARTS` a parameter or module of MossVLForConditionalGeneration belongs to, by its name. `config`: the model's."""
    if name.startswith("model.visual.merger.") or name == "model.separator_token":
        return "merger"
    if name.startswith("model.visual."):
        return "vision"
    layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) in config.text_config.cross_attention_layers:
        return "cross"
    return "head" if name.startswith("lm_head") else "language"


def train_only(model, parts) -> None:
    """Makes the parameters of these parts trainable, and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, model.config) in parts)


def linear_layers(model, parts) -> list[str]:
    """Names of the linear layers of these parts: those that adapters are for."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if part_of(name, model.config) in parts]


def lora_targets(model, parts, wanted=None) -> list[str]:
    """The linear layers of these parts whose last name is among `wanted` (None: all). Raises ValueError where there are none."""
    layers = linear_layers(model, parts)
    known = {name.rsplit(".", 1)[-1] for name in layers}
    for name in wanted or ():
        if name not in known:
            there = ", ".join(sorted(known))
            raise ValueError(f"--lora-targets: {name!r} is no linear layer of {', '.join(parts)}; there are {there}")
    return [name for name in layers if wanted is None or name.rsplit(".", 1)[-1] in wanted]


def check_model(args) -> None:
    """Builds the model without weights to see that the options fit it. Raises ValueError."""
    folder = Path(args.checkpoint)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--checkpoint {folder} is an adapter; merge it first with --merge {folder} --output DIR")
    config = AutoConfig.from_pretrained(args.checkpoint, trust_remote_code=True)
    if config.model_type != "moss_vl":
        raise ValueError(f"--checkpoint {args.checkpoint} is a {config.model_type}; expected moss_vl")
    if config.tie_word_embeddings and "head" in args.train:
        raise ValueError(
            "--train head: the head of this checkpoint is its embeddings (tie_word_embeddings); choose language"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    if args.lora_rank:
        lora_targets(model, args.train, args.lora_targets)


def with_adapters(model, args):
    """The model as a PeftModel: new adapters in the parts to train, everything else frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, args.train, args.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge(args) -> int:
    """The command `--merge ADAPTER_DIR --output DIR`; returns the exit code."""
    try:
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise ValueError(f"--output {args.output} is not empty; name a new folder")
        merge_adapter(args.merge, args.output, args.checkpoint, args.save_dtype)
    except (ValueError, OSError, ImportError) as error:
        return fail(words_of(error), 2)
    return 0


def merge_adapter(adapter, output, checkpoint=None, dtype=None) -> None:
    """Writes the checkpoint that an adapter and its base make together into the folder `output`.

    Args:
        adapter: a folder that a run with `--lora-rank` wrote.
        checkpoint: its base; default the one that the adapter names.
        dtype: "float32" or "bfloat16"; default that of the adapter's run where it is known, or else the base's.

    Raises ValueError if `adapter` is none.
    """
    require("peft", "--merge")
    from peft import PeftModel

    adapter, output = Path(adapter), Path(output)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"--merge {adapter}: there is no adapter_config.json; expected the folder of an adapter")
    base = (
        checkpoint
        or json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    )
    if dtype is None:
        settings = adapter / SETTINGS_FILE
        dtype = json.loads(settings.read_text(encoding="utf-8"))["save_dtype"] if settings.is_file() else "auto"
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=dtype)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(output)
    processor.save_pretrained(output)
    logger.info("%s: %s with the adapter %s merged into it", output, base, adapter)


# training


def finetune(args) -> int:
    """A whole run, from the options of `parse` to the output folder; returns the exit code."""
    try:
        trainer, processor, last = prepare(args)
    except (ValueError, OSError, ImportError) as error:
        return fail(words_of(error), 2)
    gc.collect()  # a frame that this process decoded and left behind would hang the forked worker that collects it
    trainer.train(resume_from_checkpoint=last)
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    if (
        trainer.eval_dataset is not None and trainer.state.global_step not in evaluated
    ):  # transformers 5 does it by itself
        trainer.evaluate()
    trainer.save_state()
    save(args, trainer, processor)
    return 0


def prepare(args) -> tuple:
    """Trainer, processor, and the checkpoint folder that the run goes on from or None.

    Raises ValueError, OSError or ImportError for what is wrong with the options or the data, before the model is loaded.
    """
    for option, package in (
        ("--lora-rank", args.lora_rank and "peft"),
        ("--deepspeed", args.deepspeed and "deepspeed"),
    ):
        if package:
            require(package, option)
    if args.deepspeed is not None:
        read_json(args.deepspeed)
    if Path(args.checkpoint).exists():
        args.checkpoint = str(Path(args.checkpoint).resolve())  # an adapter names it, wherever it is loaded from
    elif args.checkpoint.count("/") != 1:
        raise FileNotFoundError(f"no such checkpoint folder: {args.checkpoint}")
    last = check_output(args)
    check_model(args)
    arguments = training_arguments(args)
    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    train_data, eval_data = make_datasets(args, processor)

    model = load_model(args)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor.tokenizer.pad_token_id, args.vision_chunk),
        callbacks=[SaveBeside(processor)],
    )
    vars(model.config).pop("use_cache", None)  # Trainer of transformers 5 writes it there, to be saved with the model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%d records, %d for evaluation; %s parameters of %s are trained",
        len(train_data),
        len(eval_data or ()),
        f"{trained:,}",
        ", ".join(args.train),
    )
    if is_main():
        args.output.mkdir(parents=True, exist_ok=True)
        write_settings(args, args.output)
    return trainer, processor, last


def require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{option} needs the package {package}: pip install {package}")


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def make_datasets(args, processor) -> tuple[RecordDataset, RecordDataset | None]:
    """The records to learn, and those to evaluate on, checked."""
    if args.template and not processor.chat_template:
        raise ValueError(
            "--template: the checkpoint has no chat template; add chat_template.jinja to it, or give --no-template"
        )
    template = bool(processor.chat_template) if args.template is None else args.template
    if processor.tokenizer.pad_token is None or processor.tokenizer.eos_token is None:
        raise ValueError(
            "the checkpoint's tokenizer has no pad_token or no eos_token; set them in its tokenizer_config.json"
        )
    knobs = {knob: getattr(args, name) for name, knob in KNOBS.items() if getattr(args, name) is not None}
    processor.image_processor.resolve(
        {name: value for name, value in knobs.items() if name in processor.image_processor.option_names}
    )
    processor.video_processor.resolve(
        {name: value for name, value in knobs.items() if name in processor.video_processor.option_names}
    )
    if args.workers:
        knobs["num_extract_threads"] = 1  # the workers are side by side already
    options = {
        "template": template,
        "max_length": args.max_length,
        "pixel_dtype": torch.bfloat16 if args.bf16 else torch.float32,
    }

    def check(record):
        render(record, processor, template)
        check_options(record, processor.image_processor, processor.video_processor, **knobs)

    def read(files):
        return read_records(files, args.skip_bad, check=check)

    records, held_out = read(args.data), read(args.eval_data) if args.eval_data else []
    if args.eval_share is not None:
        count = max(1, round(args.eval_share * len(records)))
        if count >= len(records):
            of = f"{count} of {len(records)} records"
            raise ValueError(f"--eval-share {args.eval_share} sets {of} aside; nothing is left to learn")
        chosen = set(random.Random(args.seed).sample(range(len(records)), count))
        held_out = [record for index, record in enumerate(records) if index in chosen]
        records = [record for index, record in enumerate(records) if index not in chosen]
    datasets = [RecordDataset(own, processor, args.skip_bad, **options, **knobs) for own in (records, held_out)]
    return datasets[0], datasets[1] if held_out else None


def training_arguments(args) -> TrainingArguments:
    """What `Trainer` is told. transformers 4 and 5 have other names for two things."""
    known = signature(TrainingArguments).parameters
    named = {"warmup_steps": int(args.warmup) if args.warmup >= 1 else args.warmup}
    if args.warmup < 1 and "warmup_ratio" in known:
        named = {"warmup_ratio": args.warmup}
    if args.gradient_checkpointing:
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        named |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.lr,
        lr_scheduler_type=args.schedule,
        **named,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        bf16=args.bf16,
        deepspeed=None if args.deepspeed is None else str(args.deepspeed),
        ddp_find_unused_parameters=False,  # every parameter gets a gradient, of a batch of texts too
        use_cpu=args.cpu
        or not torch.accelerator.is_available(),  # else several processes without a GPU would each train by itself
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=not args.cpu and torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        logging_steps=args.log_steps,
        save_steps=args.save_steps,
        save_total_limit=args.keep,
        eval_strategy="steps" if args.eval_data or args.eval_share else "no",
        eval_steps=args.eval_steps or args.save_steps,
        report_to=args.report_to or "none",
    )
    if arguments.n_gpu > 1:  # Trainer would split the packed patches among them, as if they were samples
        logger.warning(
            "one of the %d GPUs is used; for all of them start with torchrun or accelerate launch", arguments.n_gpu
        )
        arguments._n_gpu = 1
    return arguments


def load_model(args):
    """The model, its parts frozen or trainable, or with new adapters. With bf16, what is trained is in float32."""
    options = {} if args.attn is None else {"attn_implementation": args.attn}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=dtype, **options)
    torch.manual_seed(args.seed)
    if args.lora_rank:
        return with_adapters(model, args)
    train_only(model, args.train)
    if args.bf16 and args.deepspeed is None:  # DeepSpeed keeps such copies itself
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


class SaveBeside(TrainerCallback):
    """Saves the processor into every checkpoint-N folder. (Trainer would, too, but then changes the config's token ids.)"""

    def __init__(self, processor):
        self.processor = processor

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.processor.save_pretrained(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))


def save(args, trainer, processor) -> None:
    """The output folder: the whole checkpoint, the adapter, or with --merge both."""
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
        gc.collect()  # the merge loads the base again, and writes the same as --merge ADAPTER_DIR
        merge_adapter(folder, args.output, dtype=args.save_dtype)
    logger.info("done: %s", args.output)


if __name__ == "__main__":
    sys.exit(main())
