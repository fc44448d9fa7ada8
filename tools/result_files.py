"""The results of a batch on disk: in the order of the queries, whatever the order in which they become known."""

import json
import os
from pathlib import Path

from moss_vl.tools.query_files import parse_line


class ResultFiles:
    """The file of the results of some queries, and the file of those that became known before earlier ones.

    Each result is on disk as soon as it is added: in `out` if all earlier results are there, else in `out`.early until
    they are. So an interrupted run loses no result, and another one continues it.

    Attributes:
        missing: the indices of the queries without a result, in order.
        failed: how many results are errors.

    Raises:
        ValueError: if a file holds a line that is no result of these queries.
    """

    def __init__(self, out: Path, lines: list[str]):
        self.out, self.early = out, out.with_name(f"{out.name}.early")
        done = _read_results(out, lines, in_order=True)
        self._next, self._count = len(done), len(lines)
        self._waiting = {
            result["index"]: result
            for result in _read_results(self.early, lines)
            if result["index"] >= self._next  # the others are in `out` already
        }
        self.failed = sum("error" in result for result in (*done, *self._waiting.values()))
        self.missing = [index for index in range(self._next, self._count) if index not in self._waiting]
        self._files = {}

    def __enter__(self) -> "ResultFiles":
        self._write_waiting()
        return self

    def __exit__(self, *error) -> None:
        for file in self._files.values():
            file.close()
        if self._next == self._count:
            self.early.unlink(missing_ok=True)

    @property
    def unanswered(self) -> int:
        """How many queries have no result yet."""
        return self._count - self._next - len(self._waiting)

    def add(self, result: dict) -> bool:
        """Writes a result. False, without effect, if the query has one already."""
        index = result["index"]
        if index < self._next or index in self._waiting:
            return False
        self.failed += "error" in result
        self._waiting[index] = result
        if index == self._next:
            self._write_waiting()
        else:
            self._write(self.early, result)
        return True

    def _write_waiting(self) -> None:
        while self._next in self._waiting:
            self._write(self.out, self._waiting.pop(self._next))
            self._next += 1

    def _write(self, path: Path, result: dict) -> None:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = open(path, "a", encoding="utf-8")
        file.write(json.dumps(result, ensure_ascii=False) + "\n")
        file.flush()


def _read_results(path: Path, lines: list[str], in_order: bool = False) -> list[dict]:
    """The results that an earlier run wrote for these queries. Removes an incomplete last line, which a killed run
    leaves."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    results = [_read_result(row, lines) for row in data[:end].split(b"\n")[:-1]]
    for position, result in enumerate(results):
        if result is None or (in_order and result["index"] != position):
            raise ValueError(
                f"{path}, line {position + 1}, is no result of these queries; name another --out or move the file away"
            )
    if end < len(data):
        os.truncate(path, end)
    return results


def _read_result(row: bytes, lines: list[str]) -> dict | None:
    """The result in a line of a file; None if it does not belong to one of the queries."""
    try:
        result = json.loads(row)
        index = result["index"]
        if type(index) is not int or not 0 <= index < len(lines) or not ("text" in result or "error" in result):
            return None
        return result if _belongs(result, lines[index]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _belongs(result: dict, line: str) -> bool:
    """Whether the keys that are copied from a query into its result are those of this query."""
    copied = result.keys() - {"index", "text", "error"}
    try:
        query = parse_line(line)
    except ValueError:
        return not copied
    if "id" in query:
        copied |= {"id"}
    return all(json.dumps(result.get(name)) == json.dumps(query.get(name)) for name in copied)
