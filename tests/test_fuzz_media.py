"""A short run of the fuzzer of media files, and its undamaged seeds."""

import os
import subprocess
import sys

from conftest import ROOT


def fuzzer(*arguments):
    """The lines that the fuzzer prints. It runs in its own process, because its workers are forks."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "fuzz_media.py"), *arguments]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": ""})
    assert "damage" in out.stdout, out.stderr[-2000:]
    return out.stdout.splitlines()


def test_damaged_files_end_in_frames_or_a_named_error():
    lines = fuzzer("--files", "100", "--seed", "1", "--limit", "20")
    assert [line for line in lines if line.startswith(("raw error", "timeout", "memory", "crash"))] == []


def test_undamaged_seeds_give_frames():
    lines = fuzzer("--undamaged")
    row = next(line for line in lines if line.startswith("all")).split()
    assert int(row[1]) >= 40 and set(row[2:]) == {"0"}, lines
