"""Data sets as tables: parquet files, folders of `save_to_disk` and objects of the datasets library, with images as
bytes; and their records against those of the same JSON."""

import importlib.util
import json

import datasets
import pyarrow as arrow
import pyarrow.parquet
import pytest
from test_records import folder, turns, write  # noqa: F401 - folder is a fixture
from tuning import NANO, load_processor

from moss_vl.training.batches import encode
from moss_vl.training.data_files import ROWS_AT_ONCE, read_entries
from moss_vl.training.record_turns import read_conversation
from moss_vl.training.records import read_record, read_records


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def records_of(folder):  # noqa: F811
    """Records with and without media; in a table, every row has all keys."""
    picture = {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue", "name": "look"},
        {"role": "assistant", "content": "Blue."},
    ]
    clip = {"video_path": "v.mp4", "segments": [[0.0, 1.0], [1.5]]}
    return [
        {"messages": turns("<image>What?", "a star"), "images": [picture], "weight": 2.0},
        {"messages": turns("Say yes.", "yes")},
        {"messages": chat, "tools": json.dumps(TOOLS)},
        {"messages": turns("<video>?", "a box"), "videos": [clip]},
    ]


def without_bytes(records):
    """The same with a path in place of bytes, as JSON can hold it."""
    return [record | ({"images": ["a.png"]} if "images" in record else {}) for record in records]


def contents(records) -> list:
    """What records say, without their places."""
    return [(one.messages, len(one.images), one.videos, one.tools, one.weight) for one in records]


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_tables_have_the_records_of_the_same_json(folder, form):  # noqa: F811
    records = records_of(folder)
    expected = read_records(write(folder, *without_bytes(records)))
    columns = {name: None for record in records for name in record}
    rows = [columns | record for record in records]
    if form == "parquet":
        path = folder / "data.parquet"
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
        for name in ("v.mp4", "a.png"):
            (path / name).write_bytes((folder / name).read_bytes())
    found = read_records(path)
    renamed = [
        [video | {"video_path": video["video_path"].replace(str(path), str(folder))} for video in one.videos]
        for one in found
    ]
    assert contents(expected) == [
        (messages, images, videos, tools, weight)
        for (messages, images, _, tools, weight), videos in zip(contents(found), renamed, strict=True)
    ]
    assert found[0].images == [(folder / "a.png").read_bytes()] and found[0].where == f"{path}, record 0"
    processor = load_processor(NANO)
    ours, theirs = encode(found[0], processor), encode(expected[0], processor)
    assert ours["pixel_values"].equal(theirs["pixel_values"]) and ours["input_ids"].equal(theirs["input_ids"])


def test_image_columns_of_the_datasets_library(folder):  # noqa: F811
    """As its Image feature stores them, in files and in an IterableDataset that does not decode."""
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "response": datasets.Value("string"), "image": datasets.Image()}
    )
    rows = [{"prompt": f"{index}?", "response": str(index), "image": str(folder / "a.png")} for index in range(3)]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(folder / "pictures")
    made.to_parquet(folder / "pictures.parquet")
    stream = made.to_iterable_dataset()
    for source in (
        folder / "pictures",
        folder / "pictures.parquet",
        stream,
        stream.cast_column("image", datasets.Image(decode=False)),
    ):
        found = [read_record(entry, {}) for entry in read_entries(source)]
        assert [one.messages[1]["content"] for one in found] == ["0", "1", "2"]
        assert all(len(one.images) == 1 for one in found)


def test_a_table_is_read_in_parts(tmp_path):
    """Rows become Python objects one by one."""
    count = 2 * ROWS_AT_ONCE + 3
    table = arrow.Table.from_pylist([{"response": str(index)} for index in range(count)])
    arrow.parquet.write_table(table, tmp_path / "data.parquet")
    entries = list(read_entries(tmp_path / "data.parquet"))
    assert [entry.load() for entry in entries] == [{"response": str(index)} for index in range(count)]


def test_nulls_inside_arguments_of_json_stay(tmp_path):
    """JSON has no columns, so a null of a call is meant."""
    call = {"name": "look", "arguments": {"at": None}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    record = {"messages": [{"role": "user", "content": "?"}, message]}
    found = read_conversation(record, tmp_path)
    assert found.messages[1]["tool_calls"][0]["function"] == call


def test_tables_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1, but no more")
    with pytest.raises(ValueError, match="data.parquet is not a parquet file that pyarrow can read"):
        read_records(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="is a folder without state.json"):
        read_records(tmp_path)
    made = datasets.Dataset.from_list([{"response": "x"}])
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds several splits, train, test; name the folder of one of them"):
        read_records(tmp_path / "splits")
    assert len(read_records(tmp_path / "splits/train")) == 1
    (tmp_path / "splits/test/state.json").write_text(json.dumps({"_data_files": [{"filename": "none.arrow"}]}))
    with pytest.raises((ValueError, OSError)):
        read_records(tmp_path / "splits/test")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(ImportError, match="data.parquet needs the package pyarrow: pip install pyarrow"):
        read_records(tmp_path / "data.parquet")


def test_columns_of_one_name_are_named(tmp_path):
    table = arrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "response"])
    arrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="twice.parquet has several columns 'response'"):
        list(read_entries(tmp_path / "twice.parquet"))


@pytest.mark.parametrize("name, text", [("state.json", "{}"), ("state.json", "[1]"), ("dataset_dict.json", "{")])
def test_damaged_folders_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} was not written by save_to_disk"):
        list(read_entries(tmp_path))
