"""Reads and checks the records of a run before the model is loaded."""

import random
from functools import partial

import torch

from moss_vl.options import options_of
from moss_vl.training.batches import RecordDataset, render
from moss_vl.training.option_names import data_files
from moss_vl.training.processes import in_main_process
from moss_vl.training.record_lengths import LengthCheck
from moss_vl.training.records import (
    Record,
    _read_entries,
    _read_record,
    _report_bad,
    check_media_options,
    read_records,
)
from moss_vl.training.tuning_options import PROCESSOR_OPTIONS


def make_datasets(args, processor) -> tuple[RecordDataset, RecordDataset | None]:
    """The records to train on, and those to evaluate on. The main process reads and checks them for all."""
    template = uses_template(args, processor)
    options = processor_options(args, processor)
    records, held_out = in_main_process(partial(read_data, args, processor, template, options))
    pixel_dtype = torch.bfloat16 if args.bf16 else torch.float32
    encoding = {"template": template, "max_length": args.max_length, "pixel_dtype": pixel_dtype, **options}

    def dataset(records):
        return RecordDataset(records, processor, args.skip_bad, **encoding)

    return dataset(records), dataset(held_out) if held_out else None


def read_data(args, processor, template: bool, options: dict) -> tuple[list[Record], list[Record]]:
    """The records to train on, and those to evaluate on, checked unless --skip-checks is given."""
    if args.skip_checks:
        read = partial(read_unchecked, skip_bad=args.skip_bad)
    else:
        check_length = LengthCheck(processor, template, options, args.max_length) if args.max_length else None

        def check(record):
            render(record, processor, template)
            check_media_options(record, processor.image_processor, processor.video_processor, **options)
            if check_length is not None:
                check_length(record)

        read = partial(read_records, skip_bad=args.skip_bad, check=check)
    records, held_out = read(data_files(args.data)), read(data_files(args.eval_data)) if args.eval_data else []
    if args.eval_share is not None:
        records, held_out = split_records(records, args.eval_share, args.seed)
    return records, held_out


class NotProbed(dict):
    """Stands for the durations of probed media: says of each medium that it was probed, with an unknown duration."""

    def __contains__(self, medium) -> bool:
        return True

    def __missing__(self, medium) -> None:
        return None


def read_unchecked(files, skip_bad: bool) -> list[Record]:
    """The records of data files, whose form is checked while their media are not opened.

    Raises:
        FileNotFoundError, ValueError: as `read_records`.
    """
    records, bad = [], []
    for entry in (entry for file in files for entry in _read_entries(file)):
        try:
            records.append(_read_record(entry, NotProbed()))
        except (ValueError, OSError) as error:
            bad.append(f"{entry.where}: {error}")
    if bad:
        _report_bad(bad, len(records) + len(bad), skip_bad)
    if not records:
        raise ValueError(f"{', '.join(map(str, files))}: no record; expected a JSON list of objects, or JSONL")
    return records


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
