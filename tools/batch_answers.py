"""Answers the queries of `infer.py --batch`, on this machine; `ray_batches.py` does it on many."""

import sys
from collections.abc import Callable, Iterable, Iterator

from moss_vl.tools.command_line import message_of
from moss_vl.tools.query_files import extra_keys, parse_line, prepare_query, read_lines
from moss_vl.tools.query_options import add_arguments
from moss_vl.tools.result_files import ResultFiles


BATCH_SIZE = 8


def answer_many(args, load: Callable) -> int:
    """Answers the lines of `args.batch` that have no result in `args.out` yet. Returns the exit code.

    Args:
        load: loads (processor, model) for the arguments.
    """
    lines = read_lines(args.batch)
    if args.out.resolve() == args.batch.resolve():
        raise ValueError(f"--out is the file of the queries, {args.batch}; name another one")
    results = ResultFiles(args.out, lines)
    with results:
        if results.missing:
            todo = [(index, lines[index]) for index in results.missing]
            if args.ray is not None:
                from moss_vl.tools.ray_batches import answer_with_ray

                found = answer_with_ray(args, todo)
            else:
                found = LineAnswers(args, *load(args))(todo)
            _write_results(found, results, len(lines))
    if results.unanswered:
        raise OSError(f"{results.unanswered} queries got no result; run the same command to continue")
    print(f"{len(lines)} queries, {results.failed} failed: {args.out}", file=sys.stderr)
    return 1 if results.failed else 0


def _write_results(found: Iterable[dict], results: ResultFiles, total: int) -> None:
    """Writes results as they come, and shows the progress."""
    from tqdm import tqdm

    with tqdm(total=total, initial=total - len(results.missing), unit="query", file=sys.stderr) as progress:
        for result in found:
            if not results.add(result):
                continue
            if "error" in result:
                progress.set_postfix(failed=results.failed)
            progress.update()


def batch_size_of(args) -> int:
    """Most answers that are written at once. With a seed one, as all of them draw from one random generator."""
    return 1 if args.seed is not None else BATCH_SIZE if args.batch_size is None else args.batch_size


class LineAnswers:
    """Answers lines of a query file with one model.

    Args:
        args: the command line of infer.py.
    """

    def __init__(self, args, processor, model):
        self.args, self.processor, self.model = args, processor, model
        self.batch_size = batch_size_of(args)

    def __call__(self, lines: Iterable[tuple[int, str]]) -> Iterator[dict]:
        """Yields the result of each (index, line) as soon as it is known: index, extra keys, and text or error.

        Raises:
            RuntimeError: if the device does not work any more.
        """
        if self.batch_size == 1:
            return map(self._answer_alone, lines)
        return self._answer_at_once(iter(lines))

    def _answer_at_once(self, lines: Iterator[tuple[int, str]]) -> Iterator[dict]:
        lines_of, again = {}, []  # by the index in the stream: the line and its result so far
        with self.model.stream_batch(self.processor, open_ended=True, batch_size=self.batch_size) as stream:
            while True:
                while len(lines_of) < self.batch_size + 2:  # two wait with decoded media
                    if (line := next(lines, None)) is None:
                        stream.finish()
                        break
                    result, query = self._read(*line)
                    if query is None:
                        yield result
                    else:
                        lines_of[stream.add(query)] = line, result
                if (event := next(stream, None)) is None:
                    break
                if event.kind == "piece":
                    continue
                line, result = lines_of.pop(event.index)
                if event.kind == "end":
                    yield result | {"text": event.text}
                elif isinstance(event.error, (ValueError, OSError)):
                    yield result | {"error": message_of(event.error)}
                else:
                    again.append(line)  # it may have lacked the memory that the others took
        yield from map(self._answer_alone, again)

    def _answer_alone(self, line: tuple[int, str]) -> dict:
        result, query = self._read(*line)
        if query is None:
            return result
        seed = None if self.args.seed is None else self.args.seed + result["index"]
        try:
            return result | {"text": answer(self.processor, self.model, query, seed)}
        except Exception as error:  # an error in one query must not end the run
            if not isinstance(error, (ValueError, OSError)):
                check_device(self.model, error)
            return result | {"error": message_of(error)}

    def refuse(self, line: tuple[int, str], reason: str) -> dict:
        """The result of a line that is not answered."""
        index, text = line
        try:
            copied = extra_keys(parse_line(text))
        except ValueError:
            copied = {}
        return {"index": index, **copied, "error": reason}

    def _read(self, index: int, line: str) -> tuple[dict, dict | None]:
        """(what is known of the result, the query); None for the query if the result is an error."""
        args, result = self.args, {"index": index}
        try:
            parsed = parse_line(line)
            result |= extra_keys(parsed)
            folder = args.batch.absolute().parent  # absolute also in messages, here and on the workers of a cluster
            query = prepare_query(parsed, folder, args.allow_http, args.prompt, args.allow_private_hosts)
            return result, add_arguments(args, query, self.processor)
        except Exception as error:
            return result | {"error": message_of(error)}, None


def answer(processor, model, query: dict, seed: int | None = None) -> str:
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    return model.offline_batch_generate(processor, [query])["results"][0]["text"]


def check_device(model, cause: Exception) -> None:
    """Raises RuntimeError if the device of a model fails at everything, as a GPU does after some errors of kernels."""
    import torch

    try:
        (torch.ones(1, device=model.device) + 1).tolist()
    except RuntimeError as error:
        if "out of memory" in str(error):
            return
        raise RuntimeError(f"the device {model.device} does not work any more: {message_of(cause)}") from cause
