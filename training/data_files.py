"""Data files as entries, records that are not checked yet: JSON lists, JSONL, parquet files, and folders of
`datasets.save_to_disk`.

Entries are read one after the other, so that a file may be larger than memory (a JSON list excepted).
"""

import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moss_vl.tools.command_line import message_of


PARQUET = (".parquet", ".pq")
ROWS_AT_ONCE = 64  # of a table; a row may hold an image


@dataclass(frozen=True)
class Entry:
    """A record as a data file has it, not checked.

    Attributes:
        where: file and index, for messages.
        folder: where relative paths start.
        load: returns the parsed record. Raises ValueError if it is not JSON.
    """

    where: str
    folder: Path
    load: Callable[[], object]


def read_entries(source) -> Iterator[Entry]:
    """The records of a data file or folder, or of an iterable of dicts such as `datasets.IterableDataset`.

    Raises:
        ValueError, FileNotFoundError: if the file as a whole cannot be read.
        ImportError: for a table without pyarrow.
    """
    if not isinstance(source, (str, Path)):
        return _iterable_entries(source)
    file = Path(source)
    if file.is_dir():
        return _folder_entries(file)
    if not file.is_file():
        raise FileNotFoundError(f"no such data file: {file}")
    return _parquet_entries(file) if file.suffix in PARQUET else _json_entries(file)


def _value(value):
    return value


def _iterable_entries(rows: Iterable) -> Iterator[Entry]:
    for index, row in enumerate(rows):
        yield Entry(f"record {index} of the data set", Path(), functools.partial(without_nulls, row))


# JSON


def _json_entries(file: Path) -> Iterator[Entry]:
    """The records of a JSON list, of JSONL, or of a file with a single object over several lines."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            first = next((line for line in lines if line.strip()), "").lstrip()
            if first.startswith("["):
                lines.seek(0)
                yield from _list_entries(file, lines.read())
                return
            if file.suffix == ".json" and first.startswith("{") and not _is_json(first):
                lines.seek(0)
                if _is_json(text := lines.read()):
                    yield Entry(f"{file}, record 0", file.parent, functools.partial(parse_json, text))
                    return
            lines.seek(0)
            yield from _line_entries(file, lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}; expected a JSON list or JSONL") from None


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def parse_json(text: str):
    """The value of a JSON text. Raises ValueError for anything else, and for values that Python cannot nest."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _list_entries(file: Path, text: str) -> Iterator[Entry]:
    try:
        values = parse_json(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{file} begins like a JSON list, but is not one: {error}") from None
    for index, value in enumerate(values):
        yield Entry(f"{file}, record {index}", file.parent, functools.partial(_value, value))


def _line_entries(file: Path, lines: Iterable[str]) -> Iterator[Entry]:
    """The records of JSONL, one JSON object per line. A line is parsed when its record is loaded."""
    index = 0
    for number, line in enumerate(lines, start=1):
        if line.strip("\ufeff \t\r\n"):
            where = f"{file}, record {index} (line {number})"
            yield Entry(where, file.parent, functools.partial(_parse_line, line.removeprefix("\ufeff")))
            index += 1


def _parse_line(line: str):
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(
            f"not a JSON object: {error}; expected one per line, or a JSON list as the whole file"
        ) from None


# tables


def _parquet_entries(file: Path) -> Iterator[Entry]:
    _require_pyarrow(file)
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            yield from _batch_entries(file, file.parent, table.iter_batches(batch_size=ROWS_AT_ONCE))
    except arrow.ArrowException as error:
        raise ValueError(f"{file} is not a parquet file that pyarrow can read: {error}") from None


def is_data_set(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _folder_entries(folder: Path) -> Iterator[Entry]:
    """The rows of a folder of `datasets.save_to_disk`."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(_names_in(folder / "dataset_dict.json", "splits"))
        raise ValueError(f"{folder} holds several splits, {splits}; name the folder of one of them")
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"{folder} is a folder without state.json; expected a data file, or a folder written by save_to_disk"
        )
    _require_pyarrow(folder)
    import pyarrow as arrow

    files = _names_in(folder / "state.json", "_data_files", "filename")

    def batches():
        for name in files:
            with arrow.memory_map(str(folder / name)) as data, arrow.ipc.open_stream(data) as reader:
                yield from reader

    try:
        yield from _batch_entries(folder, folder, batches())
    except arrow.ArrowException as error:
        raise ValueError(f"{folder} cannot be read by pyarrow: {error}") from None


def _names_in(file: Path, key: str, of_each: str | None = None) -> list[str]:
    """The list under `key` of a file of `save_to_disk`; of objects, their names under `of_each`."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        return [name if of_each is None else name[of_each] for name in value[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} was not written by save_to_disk ({message_of(error)}); expected {key!r} in it"
        ) from None


def _batch_entries(name: Path, folder: Path, batches: Iterable) -> Iterator[Entry]:
    """The rows of record batches of a table. A row becomes Python objects when its record is loaded."""
    index = 0
    for batch in batches:
        names = batch.schema.names
        if twice := sorted({column for column in names if names.count(column) > 1}):
            raise ValueError(f"{name} has several columns {', '.join(map(repr, twice))}; rename or remove them")
        for number in range(batch.num_rows):
            row = batch.take([number])  # a copy: a waiting row must not keep all others of its batch in memory
            yield Entry(f"{name}, record {index}", folder, functools.partial(_load_row, row))
            index += 1


def _load_row(row) -> dict:
    return without_nulls(row.to_pylist()[0])


def without_nulls(value):
    """A row without the keys whose value is null, at any depth: a table has every key of a column in every row."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _require_pyarrow(file: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{file} needs the package pyarrow: pip install pyarrow")
