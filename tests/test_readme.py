"""What the README says, done: its code runs as it stands, its commands work, and its files are there."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT

from moss_vl import infer
from moss_vl.training.nano import evaluate


README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(monkeypatch, capsys):
    """infer.py in this process: what it prints. (A process of its own runs it in test_infer_cli.py.)"""

    def call(*arguments):
        code = infer.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def test_python_runs():
    """All blocks in one program, as a reader would type them one after the other."""
    program = "\n".join(blocks("python"))
    names = {"__name__": "__main__"}
    exec(compile(program, "README.md", "exec"), names)
    found = SimpleNamespace(**names)
    assert isinstance(found.text, str) and len(found.texts) == 2 and all(isinstance(item, str) for item in found.texts)
    assert isinstance(found.answer, str) and found.loss.item() > 0
    assert [len(item["results"][0]["messages"]) for item in (found.first, found.second)] == [2, 4]


def test_commands_run(run):
    """Every `python infer.py` line, without the installation in front of it."""
    commands = [
        line.split("&&")[-1].strip() for block in blocks("bash") for line in block.splitlines() if "infer.py" in line
    ]
    assert len(commands) >= 2
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "infer.py")
        assert run(*arguments).strip(), command


def test_answers_about_the_samples(run, tmp_path):
    """In float32, so that no rounding of one processor or another turns an answer."""
    rows = re.findall(r"^\| `(data/[^`]+)` \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    samples = {f"data/{path.name}" for path in (ROOT / "data").iterdir() if path.suffix in (".jpg", ".mp4")}
    assert {name for name, _, _ in rows} == samples
    queries, answers = tmp_path / "queries.jsonl", tmp_path / "answers.jsonl"
    lines = (
        {"videos" if name.endswith("mp4") else "images": [str(ROOT / name)], "prompt": question}
        for name, question, _ in rows
    )
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("--batch", queries, "--out", answers, "--dtype", "float32")
    given = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert given == [answer for _, _, answer in rows]


def test_the_table_is_the_one_that_was_measured():
    measured = json.loads((ROOT / "training/nano/table.json").read_text())
    assert len(measured["tasks"]) == len(evaluate.TASKS) and all(row["n"] >= 500 for row in measured["tasks"].values())
    assert evaluate.table(measured) in README


def test_installation_lines_name_files_that_are_there():
    files = re.findall(r"pip install -r (\S+)", README)
    assert {"requirements.txt", "requirements-dev.txt"} <= set(files)
    assert all((ROOT / name).is_file() for name in files)


def test_one_test_command():
    """`.ci/run` takes it from here."""
    assert len(re.findall(r"^pip install .*&& .*pytest.*$", README, flags=re.MULTILINE)) == 1


def test_files_of_the_table_are_there_and_all_code_is_in_it():
    table = README.split("## Files")[1]
    names = re.findall(
        r"`([^`]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert all(list(ROOT.glob(name.rstrip("/"))) for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)
