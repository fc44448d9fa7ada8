"""Tunes a MOSS-VL checkpoint on your own records: whole parts of the model, or low-rank adapters (LoRA).

`python training/finetune.py --help` lists the options; training/README.md explains them.
"""

import gc
import logging
import os
import sys
from pathlib import Path

from transformers import AutoProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moss_vl.tools.command_line import message_of
from moss_vl.training.batches import BadRecord, Collator
from moss_vl.training.parts import check_model, count_trained, load_model
from moss_vl.training.preflight import make_datasets
from moss_vl.training.processes import FailedElsewhere, is_main
from moss_vl.training.record_trainer import make_token_loss
from moss_vl.training.requirements import check_requirements
from moss_vl.training.saving import SaveProcessor, check_output, merge_adapter, save, write_settings
from moss_vl.training.streaming import continue_streams
from moss_vl.training.trainer import TuningTrainer
from moss_vl.training.trainer_arguments import training_arguments
from moss_vl.training.tuning_options import parse


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads do not survive forked data-loader workers

logger = logging.getLogger("finetune")


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


def merge(args) -> int:
    """The command `--merge ADAPTER_DIR --output DIR`; returns the exit code."""
    try:
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise ValueError(f"--output {args.output} is not empty; name a new folder")
        merge_adapter(args.merge, args.output, args.checkpoint, args.save_dtype)
    except (ValueError, OSError, ImportError) as error:
        return fail(error_text(error), 2)
    return 0


def finetune(args) -> int:
    """A whole run, from the options of `parse` to the output folder; returns the exit code."""
    try:
        trainer, processor, last = prepare(args)
    except FailedElsewhere:
        return 2  # the main process has printed the error
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
    trainer = TuningTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor.tokenizer.pad_token_id, args.vision_chunk),
        callbacks=[SaveProcessor(processor)],
        token_loss=token_loss,
        options=args,
        processor=processor,
    )
    vars(model.config).pop("use_cache", None)  # set by transformers 5's Trainer; it would be saved with the model
    trained = count_trained(model)
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


if __name__ == "__main__":
    sys.exit(main())
