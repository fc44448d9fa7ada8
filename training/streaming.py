"""Records that are read while a model trains: data sets that are larger than memory, or that come from elsewhere.

Every process and every data-loader worker reads the same endless order of entries, and encodes only those that are its
own. So the batches do not depend on the number of workers, and a run can be resumed at any step:

    order     0 1 2 3 4 5 6 7 8 9 ...       passes over the sources, each in an order of its own
    process   0 0 1 1 0 0 1 1 0 0 ...       two processes, batches of two
    worker    0 0 0 0 1 1 1 1 0 0 ...       of each process, with two workers
"""

import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, get_worker_info

from moss_vl.training.batches import BadRecord, encode, report_bad
from moss_vl.training.data_files import Entry, read_entries
from moss_vl.training.records import read_record


SHUFFLE_BUFFER = 1000


def shuffled(entries: Iterator, buffer: int, rng: random.Random) -> Iterator:
    """The entries in random order, as far as a buffer allows: each is drawn among `buffer` that wait."""
    waiting = []
    for entry in entries:
        if len(waiting) < buffer:
            waiting.append(entry)
            continue
        index = rng.randrange(buffer)
        drawn, waiting[index] = waiting[index], entry
        yield drawn
    rng.shuffle(waiting)
    yield from waiting


class StreamedRecords(torch.utils.data.IterableDataset):
    """The samples of one process, without an end.

    Args:
        sources: data files and folders, or iterables of dicts, which are iterated once in every pass:
            `datasets.IterableDataset`, with its images not decoded.
        processor: see `encode`.
        batch_size: records per batch and process.
        buffer: entries among which the next one is drawn; 1 keeps the order of the sources.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        batches_done: batches of each process that a run had before it is resumed.
        skip_bad: replace a bad record by the next good one of the process, with a warning; else it is a BadRecord.
        check: see `read_record`.
        probes: whether media are opened before they are decoded.
        **options: those of `encode`.

    Raises:
        ValueError, FileNotFoundError, ImportError: for sources that cannot be read, or have no record.
    """

    def __init__(
        self,
        sources: list,
        processor,
        batch_size: int,
        buffer: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_done: int = 0,
        skip_bad: bool = False,
        check: Callable | None = None,
        probes: bool = True,
        **options,
    ):
        self.sources, self.processor, self.batch_size = sources, processor, batch_size
        self.buffer, self.seed, self.rank, self.world_size = buffer, seed, rank, world_size
        self.batches_done, self.skip_bad, self.check, self.probes = batches_done, skip_bad, check, probes
        self.options = options
        self.bad = set()  # (source, place) of records that failed in this process
        empty = [source for source in sources if next(iter(read_entries(source)), None) is None]
        if empty or not sources:
            raise ValueError(f"{empty[0] if empty else 'the list of sources'} has no record; expected at least one")

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        entries, following = self._own_entries(), deque()
        while True:
            step, drawn = following.popleft() if following else next(entries)
            if (step - self.batches_done) % count != number:  # a data loader takes batches from its workers in turn
                continue
            sample = self._encode(drawn)
            for ahead in itertools.count():  # a bad record is replaced by the next good one of the process
                if sample is not None:
                    break
                if ahead == len(following):
                    following.append(next(entries))
                candidate = following[ahead][1]
                if candidate.passes > drawn.passes + 1:
                    raise BadRecord(f"none of the records of a whole pass can be used. One is {drawn.entry.where}")
                sample = self._encode(candidate)
            yield sample

    def _order(self) -> Iterator["Drawn"]:
        """The endless order of all entries, which all processes share."""
        for passes in itertools.count():
            entries = (
                Drawn(passes, number, entry)
                for number, source in enumerate(self.sources)
                for entry in read_entries(source)
            )
            drawn = None
            try:
                for drawn in shuffled(entries, self.buffer, random.Random(f"{self.seed}, pass {passes}")):
                    yield drawn
            except (ValueError, OSError) as error:
                raise BadRecord(f"the data cannot be read further: {error}") from error
            if drawn is None:
                raise BadRecord("the data set has no record in a second pass; expected what can be iterated again")

    def _own_entries(self) -> Iterator[tuple[int, "Drawn"]]:
        """(batch, entry) of those that belong to this process, after the batches that are done."""
        for index, drawn in enumerate(self._order()):
            step, process = divmod(index // self.batch_size, self.world_size)
            if process == self.rank and step >= self.batches_done:
                yield step, drawn

    def _encode(self, drawn: "Drawn") -> dict | None:
        """The sample of an entry; None for a bad one that is skipped. Each is warned of once per worker."""
        entry, key = drawn.entry, (drawn.source, drawn.entry.where)
        if key in self.bad:
            return None
        try:
            record = read_record(entry, {} if self.probes else None, self.check)
            return encode(record, self.processor, **self.options)
        except (ValueError, OSError) as error:
            report_bad(f"{entry.where}: {error}", self.skip_bad, error)
            self.bad.add(key)
            return None


@dataclass(frozen=True)
class Drawn:
    """An entry in the endless order: its pass and its source."""

    passes: int
    source: int
    entry: Entry


def streaming_loader(dataset: StreamedRecords, collate: Callable, workers: int, **options) -> DataLoader:
    """The data loader of a process. accelerate must not prepare it: the data set already divides itself.

    Args:
        options: `pin_memory`, `prefetch_factor` and `multiprocessing_context` of a DataLoader.
    """
    return DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=collate,
        num_workers=workers,
        **options,
        generator=torch.Generator(),  # the global one keeps its state, so that a resumed run draws the same numbers
    )


def stream_records(args, files: list[Path], processor, **options) -> StreamedRecords:
    """The records of data files, by the options of finetune.py; `options` are those of `StreamedRecords`."""
    return StreamedRecords(
        files,
        processor,
        args.batch_size,
        buffer=SHUFFLE_BUFFER if args.shuffle_buffer is None else args.shuffle_buffer,
        seed=args.seed,
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        skip_bad=args.skip_bad,
        probes=not args.skip_checks,
        **options,
    )


def continue_streams(dataset: StreamedRecords, arguments, checkpoint: str | None) -> None:
    """Lets a run go on after the batches that it had before `checkpoint`, a folder checkpoint-N, was written.

    The Trainer would skip these batches after decoding them.
    """
    arguments.ignore_data_skip = True
    if checkpoint is not None:
        steps = int(Path(checkpoint).name.split("-")[1])
        dataset.batches_done = steps * arguments.gradient_accumulation_steps
