"""What the README says, done: its code runs as it stands, its commands work, and its files are there."""

import json
import os
import re
import shlex
import subprocess
import sys

from conftest import ROOT

sys.path[:0] = [str(ROOT / "training")]
import evaluate  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(arguments):
    """One thread: several that wait for each other while other programs run take many times as long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_python_runs():
    """All blocks in one program, as a reader would type them one after the other."""
    checks = """
assert isinstance(text, str) and len(texts) == 2 and all(isinstance(item, str) for item in texts)
assert isinstance(answer, str) and loss.item() > 0
assert [len(item["results"][0]["messages"]) for item in (first, second)] == [2, 4]
"""
    done = run(["-c", "\n".join(blocks("python")) + checks])
    assert done.returncode == 0, done.stderr


def test_commands_run():
    """Every `python infer.py` line, without the installation in front of it."""
    commands = [line.split("&&")[-1].strip() for block in blocks("bash") for line in block.splitlines() if "infer.py" in line]
    assert len(commands) >= 2
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        done = run(arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), command


def test_answers_about_the_samples(tmp_path):
    """In float32, so that no rounding of one processor or another turns an answer."""
    rows = re.findall(r"^\| `(data/[^`]+)` \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    samples = {f"data/{path.name}" for path in (ROOT / "data").iterdir() if path.suffix in (".jpg", ".mp4")}
    assert {name for name, _, _ in rows} == samples
    queries, answers = tmp_path / "queries.jsonl", tmp_path / "answers.jsonl"
    lines = ({"videos" if name.endswith("mp4") else "images": [str(ROOT / name)], "prompt": question} for name, question, _ in rows)
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(["infer.py", "--batch", str(queries), "--out", str(answers), "--dtype", "float32"])
    assert done.returncode == 0, done.stderr
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
    names = re.findall(r"`([^`]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert all(list(ROOT.glob(name.rstrip("/"))) for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)
