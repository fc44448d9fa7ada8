"""The options of training/finetune.py: their table, their checks, and defaults that depend on other options."""

import argparse
import sys
from pathlib import Path

import torch

from moss_vl.tools.command_line import above_0, at_least, share, weight
from moss_vl.training.option_names import (
    ALIASES,
    OTHER_OPTIONS,
    Named,
    apply_other_options,
    check_names,
    switch,
    with_dashes,
)
from moss_vl.training.trainer_arguments import check_trainer_options, read_trainer_options


PARTS = ("vision", "merger", "cross", "language", "head")
EXTRAS = ("gates", "separator", "norms", "embeddings")  # weights without a linear layer, trained beside adapters
PROCESSOR_OPTIONS = {  # command-line option -> option of the processors, as options.py names it
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "multi_image_max_pixels": "multi_image_max_pixels",
    "video_max_pixels": "video_max_pixels",
    "fps": "video_fps",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
}
# Options that must not change when a run is resumed. The others (steps, workers, logging) may.
FIXED_ON_RESUME = (
    "checkpoint",
    "data",
    "eval_data",
    "eval_share",
    "template",
    "max_length",
    "skip_bad",
    "streaming",
    "shuffle_buffer",
    "silence_weight",
    "response_weight",
    "balance_decisions",
    "focal_gamma",
    *PROCESSOR_OPTIONS,
    "train",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "lora_also",
    "lr",
    *(f"lr_{part}" for part in PARTS),
    "weight_decay",
    "batch_size",
    "accumulation",
    "seed",
    "bf16",
)
DESCRIPTION = "Tunes a MOSS-VL checkpoint on your own records: whole parts of the model, or low-rank adapters (LoRA)."
EPILOG = """\
data: a JSON list, or JSONL with one object per line, of
  {"prompt": "What is this?", "response": "a star", "images": ["a.png"], "videos": ["b.mp4"], "system_prompt": "..."}
  {"messages": [{"role": "user", "content": "<|image|>What is this?"}, {"role": "assistant", "content": "a star"}],
   "images": ["a.png"]}
or parquet files and folders of save_to_disk with such rows. Paths are relative to the data file. In the first form,
images and then videos come before the prompt. A video may also be {"video_path": "b.mp4", "segments": [[0.5, 3.0],
[4.2]]} (seconds). training/README.md describes all forms: tools, weights, realtime streams, those of other software.
The loss covers the assistant's turns, each with the token that ends it, and nothing else. All records are checked
before training starts, or with --streaming when they come. Errors that only decoding can find (a damaged file,
--max-length) stop the run when they occur; with --skip-bad the next record is used instead.

parts: vision   the encoder without its merger       language  embeddings, self-attention layers, last norm
       merger   merger and separator                 head      the language model's head
       cross    cross-attention layers with their gates
With --lora-rank 0, the parts of --train are trained and the others are saved unchanged, bit for bit. With a higher
rank, all weights are frozen and the linear layers of these parts get adapters; separator, gates, norms and embeddings
have none, but --lora-also trains them as a whole.

All other options of the installed transformers' TrainingArguments are taken, too: --optim adafactor --adam-beta2 0.95.
Names may have underscores for dashes, and training/README.md lists the names of other programs for these options.

The output folder loads like any checkpoint (an adapter needs peft, and its base checkpoint at the same path). It also
holds checkpoint-N folders to resume from, trainer_state.json with the losses, and finetune.json with these options.

examples:
  python training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned --lora-rank 16 --merge
  python training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned --train cross merger --lr 1e-5
  python training/finetune.py --merge tuned/adapter --output merged
  torchrun --nproc_per_node 8 training/finetune.py --checkpoint CHECKPOINT --data data.json --output tuned

exit codes: 0 done, 1 out of memory, 2 wrong usage or input, 130 interrupted
"""

NATURAL, POSITIVE, NOT_NEGATIVE = at_least(int, 0), at_least(int, 1), at_least(float, 0)
FILES = {"metavar": "FILE", "type": Path, "nargs": "+"}
COUNT = {"metavar": "N", "type": POSITIVE}
FLAG = {"metavar": "BOOL", "type": switch, "nargs": "?", "const": True, "default": False}
YES_NO = {**FLAG, "default": None}  # with --no-NAME

# group -> option -> arguments of `add_argument`
OPTIONS = {
    "paths": {
        "--checkpoint": dict(metavar="PATH", help="folder or hub name of the checkpoint to start from"),
        "--output": dict(metavar="DIR", type=Path, help="folder to write; new or empty, unless --resume"),
    },
    "data": {
        "--data": dict(**FILES, help="records to train on: JSON, JSONL, parquet, or a folder of save_to_disk"),
        "--eval-data": dict(**FILES, help="records on which the loss is measured"),
        "--eval-share": dict(metavar="SHARE", type=share, help="or the share of --data that is held out for that"),
        "--skip-bad": dict(**FLAG, help="skip bad records with a warning instead of an error"),
        "--streaming": dict(**FLAG, help="check records as they come, of data larger than memory; needs --steps"),
        "--shuffle-buffer": dict(
            **COUNT, help="streamed records among which the next is drawn; 1: in order (default: 1000)"
        ),
        "--skip-checks": dict(
            **FLAG, help="read the records without opening their media, and leave their errors to the training"
        ),
        "--eval-generate": dict(**COUNT, help="at each evaluation, also write answers to N of its records"),
        "--eval-tokens": dict(metavar="N", type=POSITIVE, default=256, help="longest such answer (default: 256)"),
        "--template": dict(
            **YES_NO, help="render the chat template, or not, for base checkpoints (default: if there is one)"
        ),
        "--max-length": dict(
            metavar="TOKENS", type=POSITIVE, help="longest record; longer ones are bad (default: no limit)"
        ),
        "--workers": dict(
            metavar="N",
            type=NATURAL,
            default=2,
            help="processes that decode and preprocess; each prefetches two batches (default: 2)",
        ),
        "--min-pixels": dict(**COUNT, help="fewest pixels of an image or frame after the resize"),
        "--max-pixels": dict(**COUNT, help="most pixels of an image or frame after the resize"),
        "--multi-image-max-pixels": dict(**COUNT, help="most pixels of all images of a record"),
        "--video-max-pixels": dict(**COUNT, help="most pixels of all frames of a record"),
        "--fps": dict(
            metavar="RATE",
            type=above_0,
            help="sampled frames per second of video (default of this and of all limits: the checkpoint's)",
        ),
        "--min-frames": dict(**COUNT, help="fewest frames of a video"),
        "--max-frames": dict(**COUNT, help="most frames of the videos of a record"),
    },
    "what is trained": {
        "--train": dict(
            metavar="PART",
            nargs="+",
            choices=PARTS,
            default=["merger", "cross", "language"],
            help=f"parts: {', '.join(PARTS)} (default: merger cross language)",
        ),
        "--lora-rank": dict(
            metavar="R", type=NATURAL, default=0, help="rank of adapters; 0: train the parts themselves (default: 0)"
        ),
        "--lora-alpha": dict(metavar="A", type=above_0, help="adapters are scaled by A / R (default: twice the rank)"),
        "--lora-dropout": dict(
            metavar="P", type=NOT_NEGATIVE, default=0.0, help="dropout before adapters (default: 0)"
        ),
        "--lora-targets": dict(
            metavar="NAME",
            nargs="+",
            help="linear layers that get adapters, such as q_proj v_proj (default: all of the parts)",
        ),
        "--lora-also": dict(
            metavar="WHAT",
            nargs="+",
            choices=EXTRAS,
            default=[],
            help=f"weights trained beside adapters, as a whole: {', '.join(EXTRAS)}; norms: those of the parts "
            "(default: none)",
        ),
        "--merge": dict(
            metavar="ADAPTER_DIR",
            nargs="?",
            const=True,
            help="write the merged checkpoint, with the adapter in a folder inside it; "
            "with ADAPTER_DIR: merge that adapter and train nothing",
        ),
    },
    "how it is trained": {
        "--epochs": dict(metavar="N", type=above_0, default=1.0, help="passes over all records (default: 1)"),
        "--steps": dict(**COUNT, help="optimizer steps, instead of --epochs"),
        "--batch-size": dict(**COUNT, default=1, help="records per batch and process (default: 1)"),
        "--accumulation": dict(**COUNT, default=1, help="batches per step (default: 1)"),
        "--lr": dict(metavar="RATE", type=above_0, help="peak learning rate (default: 1e-5; 1e-4 for adapters)"),
        **{
            f"--lr-{part}": dict(metavar="RATE", type=above_0, help=f"peak learning rate of {part} (default: --lr)")
            for part in PARTS
        },
        "--schedule": dict(
            default="cosine",
            help="decay of the learning rate: linear, cosine, constant_with_warmup, ... (default: cosine)",
        ),
        "--warmup": dict(
            metavar="N",
            type=NOT_NEGATIVE,
            default=0.03,
            help="warmup steps; below 1: their share of all steps (default: 0.03)",
        ),
        "--weight-decay": dict(metavar="W", type=NOT_NEGATIVE, default=0.0, help="default: 0"),
        "--max-grad-norm": dict(
            metavar="N", type=NOT_NEGATIVE, default=1.0, help="gradients are clipped to this norm (default: 1)"
        ),
        "--silence-weight": dict(
            metavar="W", type=weight, default=1.0, help="of <|silence|> in realtime streams (default: 1)"
        ),
        "--response-weight": dict(
            metavar="W", type=weight, default=1.0, help="of <|response|> in realtime streams (default: 1)"
        ),
        "--balance-decisions": dict(
            metavar="A",
            type=NOT_NEGATIVE,
            default=0.0,
            help="or both by their share of the decisions: weight (1 / (2 share)) ** A (default: 0)",
        ),
        "--focal-gamma": dict(
            metavar="G",
            type=NOT_NEGATIVE,
            default=0.0,
            help="scales the loss of these decisions by (1 - p) ** G (default: 0)",
        ),
        "--seed": dict(
            metavar="N", type=NATURAL, default=0, help="of data order, dropout and new adapters (default: 0)"
        ),
    },
    "running": {
        "--bf16": dict(
            **YES_NO,
            help="compute in bfloat16, with trained weights in float32 (default: if the GPU supports it)",
        ),
        "--save-dtype": dict(
            choices=("float32", "bfloat16"), help="of the output (default: bfloat16 with --bf16, else float32)"
        ),
        "--gradient-checkpointing": dict(**FLAG, help="less memory for a third more time"),
        "--vision-chunk": dict(
            metavar="FRAMES",
            type=POSITIVE,
            help="frames that the encoder takes at once (default: all; not for DeepSpeed's stage 3)",
        ),
        "--attn": dict(choices=("eager", "sdpa", "flash_attention_2"), help="attention (default: sdpa)"),
        "--deepspeed": dict(metavar="CONFIG", type=Path, help="DeepSpeed's JSON file, passed through"),
        "--fsdp": dict(
            metavar="OPTIONS",
            nargs="?",
            const="full_shard auto_wrap",
            help="shard the model with FSDP (default OPTIONS: full_shard auto_wrap)",
        ),
        "--fsdp-config": dict(metavar="CONFIG", type=Path, help="JSON file with its settings"),
        "--cpu": dict(**FLAG, help="use no GPU"),
        "--log-steps": dict(**COUNT, default=10, help="steps between logged losses (default: 10)"),
        "--save-steps": dict(**COUNT, default=500, help="steps between checkpoints (default: 500)"),
        "--eval-steps": dict(**COUNT, help="steps between evaluations (default: --save-steps)"),
        "--keep": dict(**COUNT, default=2, help="newest checkpoints to keep (default: 2)"),
        "--resume": dict(**FLAG, help="continue from the newest checkpoint in --output, if there is one"),
        "--report-to": dict(metavar="NAME", nargs="+", default=[], help="tensorboard, wandb, ... (default: nothing)"),
    },
}


def parse(argv) -> argparse.Namespace:
    """The options with their defaults filled in. Wrong usage ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, arguments in options.items():
            add_option(group, name, arguments)
    for name, arguments in OTHER_OPTIONS.items():
        parser.add_argument(name, action=Named, help=argparse.SUPPRESS, **arguments)
    args, others = parser.parse_known_args(with_dashes(sys.argv[1:] if argv is None else argv))
    check_names(parser, args)
    apply_other_options(parser, args, PARTS)
    args.trainer = read_trainer_options(parser, others)
    check_combination(parser, args)
    fill_in_defaults(args)
    return args


def add_option(group, name: str, arguments: dict) -> None:
    """Adds an option under its name, and not shown in --help, under its aliases and its negation."""
    group.add_argument(name, action=Named, **arguments)
    hidden = {key: value for key, value in arguments.items() if key not in ("help", "required", "default")}
    hidden |= dict(dest=name[2:].replace("-", "_"), help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    for alias, changes in ALIASES.get(name, {}).items():
        group.add_argument(alias, action=Named, **(hidden | changes))
    if arguments.items() >= YES_NO.items():
        no = dict(dest=hidden["dest"], help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        group.add_argument(f"--no-{name[2:]}", action=Named, nargs=0, const=False, **no)


def part_rates(args) -> dict[str, float]:
    """The learning rates of the parts that have one of their own."""
    rates = {part: getattr(args, f"lr_{part}") for part in PARTS}
    return {part: rate for part, rate in rates.items() if rate is not None}


def check_combination(parser, args) -> None:
    """Ends the program if options contradict each other or one is missing."""
    training, merge_only = args.data is not None, isinstance(args.merge, str)
    if not training and not merge_only:
        parser.error("nothing to do: give --data, or --merge with the folder of an adapter")
    if training and merge_only:
        parser.error("--merge with a folder trains nothing; leave out --data, or the folder")
    if args.output is None:
        parser.error("the following arguments are required: --output")
    if training and args.checkpoint is None:
        parser.error("--data needs --checkpoint")
    if args.eval_data is not None and args.eval_share is not None:
        parser.error("give --eval-data or --eval-share, not both")
    if training and args.lora_rank == 0:
        for name in ("merge", "lora_alpha", "lora_dropout", "lora_targets", "lora_also"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is for adapters; give a --lora-rank above 0")
    if args.streaming:
        check_streaming(parser, args)
    elif args.shuffle_buffer is not None:
        parser.error("--shuffle-buffer is for --streaming; without it, all records are shuffled")
    if args.balance_decisions and (args.silence_weight, args.response_weight) != (1, 1):
        parser.error("give --balance-decisions, or --silence-weight and --response-weight, not both")
    if args.lora_dropout >= 1:
        parser.error(f"--lora-dropout must be below 1, got {args.lora_dropout}")
    for part in part_rates(args):
        if part not in trained_parts(args):
            parser.error(f"--lr-{part} has no effect: --train {' '.join(args.train)} leaves {part} frozen")
    evaluates = args.eval_data is not None or args.eval_share is not None
    if args.eval_generate is not None and not evaluates:
        parser.error("--eval-generate needs held-out records; give --eval-data or --eval-share")
    if args.deepspeed is not None and args.fsdp is not None:
        parser.error("give --deepspeed or --fsdp, not both")
    if args.fsdp_config is not None and args.fsdp is None:
        parser.error("--fsdp-config needs --fsdp")
    check_trainer_options(parser, args, evaluates)


def trained_parts(args) -> set[str]:
    """The parts that have trained weights, those of --lora-also among them."""
    owners = {"gates": "cross", "separator": "merger", "embeddings": "language"}
    return {*args.train, *(owners[name] for name in args.lora_also if name in owners)}


def check_streaming(parser, args) -> None:
    """Ends the program if options need all records at once."""
    if args.steps is None:
        parser.error("--streaming needs --steps: the number of records is not known")
    if args.eval_share is not None:
        parser.error("--streaming cannot hold out a share; give --eval-data in place of --eval-share")
    if args.balance_decisions:
        parser.error("--streaming cannot count decisions; give --silence-weight and --response-weight")


def computes_in_bfloat16() -> bool:
    """Whether this machine has an accelerator that computes in bfloat16."""
    if not torch.accelerator.is_available():
        return False
    supported = getattr(torch.get_device_module(), "is_bf16_supported", None)  # MPS does not say
    return supported is not None and supported()


def fill_in_defaults(args) -> None:
    """Sets the defaults that depend on other options, and puts the parts into the order of `PARTS`."""
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    if args.lr is None:
        args.lr = 1e-4 if args.lora_rank else 1e-5
    if args.bf16 is None:
        args.bf16 = not args.cpu and not args.trainer.get("fp16") and computes_in_bfloat16()
    if args.save_dtype is None and args.data is not None:
        args.save_dtype = "bfloat16" if args.bf16 else "float32"
    args.report_to = [] if args.report_to == ["none"] else args.report_to
    args.train = [part for part in PARTS if part in args.train]
