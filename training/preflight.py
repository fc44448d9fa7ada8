"""Reads and checks the records of a run before the model is loaded."""

import random
from collections.abc import Callable
from functools import partial

import torch

from moss_vl.options import options_of
from moss_vl.training.batches import RecordDataset, check_record
from moss_vl.training.option_names import data_files
from moss_vl.training.processes import in_main_process
from moss_vl.training.record_lengths import LengthCheck
from moss_vl.training.records import Record, read_records
from moss_vl.training.streaming import StreamedRecords, stream_records
from moss_vl.training.tuning_options import PROCESSOR_OPTIONS


def make_datasets(args, processor) -> tuple[RecordDataset | StreamedRecords, RecordDataset | None]:
    """The records to train on, and those to evaluate on. The main process reads and checks them for all, but for those
    that are streamed, which are checked as they come."""
    template = uses_template(args, processor)
    options = args.processor_options = processor_options(args, processor)
    check = make_check(args, processor, template, options)
    records, held_out = in_main_process(partial(read_data, args, check))
    pixel_dtype = torch.bfloat16 if args.bf16 else torch.float32
    encoding = {"template": template, "max_length": args.max_length, "pixel_dtype": pixel_dtype, **options}

    def dataset(records):
        return RecordDataset(records, processor, args.skip_bad, **encoding)

    eval_data = dataset(held_out) if held_out else None
    if args.streaming:
        return stream_records(args, data_files(args.data), processor, check=check, **encoding), eval_data
    return dataset(records), eval_data


def make_check(args, processor, template: bool, options: dict) -> Callable[[Record], None] | None:
    """The function that raises ValueError for a record that this run cannot take; None with --skip-checks."""
    if args.skip_checks:
        return None
    check = partial(check_record, processor=processor, template=template, **options)
    if args.max_length is None or args.streaming:  # streamed records are encoded next, which counts their tokens
        return check
    check_length = LengthCheck(processor, template, options, args.max_length)

    def check_both(record: Record) -> None:
        check(record)
        check_length(record)

    return check_both


def read_data(args, check: Callable[[Record], None] | None) -> tuple[list[Record], list[Record]]:
    """The records to train on, none if they are streamed, and those to evaluate on."""
    read = partial(read_records, skip_bad=args.skip_bad, check=check, probes=not args.skip_checks)
    held_out = read(data_files(args.eval_data)) if args.eval_data else []
    records = [] if args.streaming else read(data_files(args.data))
    if args.eval_share is not None:
        records, held_out = split_records(records, args.eval_share, args.seed)
    return records, held_out


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
