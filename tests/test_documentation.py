"""The documentation is true: code runs, commands answer rightly, tables are measured, files and links exist."""

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from moss_vl import infer
from moss_vl.training.nano import evaluate


PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in (".", "docs", "training", "training/nano")
    for path in sorted((ROOT / folder).glob("*.md"))
}
README, USAGE = PAGES["README.md"], PAGES["docs/usage.md"]
NANO, ARCHITECTURE = PAGES["training/nano/README.md"], PAGES["docs/architecture.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(monkeypatch, capsys):
    """What infer.py prints, run in this process. test_infer_cli.py runs it in a process of its own."""

    def call(*arguments):
        code = infer.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def infer_commands():
    lines = [line for block in blocks(README, "bash") for line in block.splitlines() if "infer.py" in line]
    return [shlex.split(line.split("&&")[-1]) for line in lines]


def test_python_examples_run_one_after_the_other():
    names = {"__name__": "__main__"}
    for name, page in (("README.md", README), ("docs/usage.md", USAGE), ("docs/demo.md", PAGES["docs/demo.md"])):
        exec(compile("\n".join(blocks(page, "python")), name, "exec"), names)
        found = SimpleNamespace(**names)
        assert isinstance(found.text, str) and isinstance(found.answer, str)
        assert [len(item["results"][0]["messages"]) for item in (found.first, found.second)] == [2, 4]
    assert found.answers[1] == "3.3 seconds" and found.contents.frames == [6]
    assert len(found.texts) == 2 and all(isinstance(item, str) for item in found.texts)
    assert sorted(found.pieces) == [0, 1] and found.state.has_cache
    assert [bool(result["text"]) for result in found.replies["results"]] == [True, True]
    assert found.word.text == "yellow" and found.weights.shares[0] > 0.5  # docs/demo.md
    assert found.loss.item() > 0 and "image_features" in found.inputs


def test_the_first_command_answers_rightly(run):
    """data/sample_b.mp4: a white ring turns orange at 2 s, a yellow cross moves up at 4 s; frames are 1.2 s apart."""
    program, script, *arguments = infer_commands()[0]
    assert (program, script) == ("python", "infer.py")
    assert run(*arguments, "--dtype", "float32").strip() == (
        "at 0.0 seconds a large white ring at the top left, a small yellow cross at the bottom right; "
        "at 2.3 seconds the ring changes color to orange; at 4.7 seconds the cross moves up"
    )


def test_every_infer_command_of_the_readme_runs(run):
    commands = infer_commands()
    assert len(commands) >= 2
    for program, script, *arguments in commands:
        assert (program, script) == ("python", "infer.py")
        assert run(*arguments).strip(), arguments


def test_the_transcript_of_the_readme_is_what_the_checkpoint_says(run):
    """A star appears at 9.0 s. With --fast, the output is the same on any machine."""
    [(command, said)] = re.findall(r"^\$ python infer\.py (--live .*)\n((?:\[.*\n)+)", README, flags=re.MULTILINE)
    assert run(*shlex.split(command), "--fast", "--dtype", "float32") == said == "[   9.0s] the star appears\n"


def test_the_answers_in_the_table_are_those_of_the_checkpoint(run, tmp_path):
    """In float32, where processors round alike."""
    rows = re.findall(r"^\| `(data/[^`]+)` \| (.*?) \| (.*?) \| ", NANO, flags=re.MULTILINE)
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


def test_the_table_of_the_examination_is_the_measured_one():
    measured = json.loads((ROOT / "training/nano/table.json").read_text())
    assert len(measured["tasks"]) == len(evaluate.TASKS) and all(row["n"] >= 500 for row in measured["tasks"].values())
    assert evaluate.table(measured) in NANO


@pytest.mark.parametrize("page", PAGES)
def test_links_and_requirement_files_exist(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page])
    assert [link for link in links if not (folder / link).exists()] == []
    assert [name for name in re.findall(r"pip install -r (\S+)", PAGES[page]) if not (ROOT / name).is_file()] == []


def test_there_is_one_test_command():
    """`.ci/run` reads it from the README."""
    assert len(re.findall(r"^pip install .*&& .*pytest.*$", README, flags=re.MULTILINE)) == 1


def test_the_readme_is_short():
    assert len(README.split()) < 1000


def test_every_file_is_in_the_table_of_files():
    table = ARCHITECTURE.split("## Files")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = re.findall(r"`([^`]+)`", "\n".join(first_cells))
    assert [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []
    folders = ("", "tools/", "training/", "training/nano/", "benchmarks/")
    code = {f"{folder}{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert code - set(names) == set()


def test_the_fuzzer_runs_as_contributors_are_told(monkeypatch):
    monkeypatch.delenv("PYTHONPATH")  # a contributor has not set it
    [command] = re.findall(r"^python (tests/\S+) --seeds 0 \d+", PAGES["CONTRIBUTING.md"], flags=re.MULTILINE)
    done = subprocess.run([sys.executable, command, "--seeds", "0", "2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 conversations, 0 wrong" in done.stdout
