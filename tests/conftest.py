"""Imports the project as a package in place, and keeps every test off the network, out of the user's caches, and tidy."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest


SCRATCH = Path(tempfile.mkdtemp(prefix="moss-vl-tests-"))  # of this process; nothing of it outlives the run
(SCRATCH / "tmp").mkdir()
os.environ["HF_HOME"] = str(SCRATCH / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

ROOT = Path(__file__).resolve().parent.parent
SHARED_GOLDEN = ROOT.parent / "shared" / "golden"
GOLDEN = SHARED_GOLDEN if SHARED_GOLDEN.is_dir() else ROOT / "tests" / "golden"

os.environ["PYTHONPATH"] = str(ROOT)  # for child processes; in this one, pyproject.toml puts the root on the path


def pytest_configure(config):
    """An exception in a thread is a failure, not a warning that nobody reads."""
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


@atexit.register
def forget_scratch(process=os.getpid()):
    if os.getpid() == process:  # and no fork of it
        shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def tidy(monkeypatch, tmp_path_factory):
    """The temporary directory of a test is its own and empty, and what a test or the code it runs leaves there is a failure."""
    tmp_path_factory.getbasetemp()  # pytest's own, beside it
    folder = SCRATCH / "tmp"
    monkeypatch.setenv("TMPDIR", str(folder))  # of its child processes
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    left = sorted(
        path.name for path in folder.iterdir() if not path.name.startswith(("torch", "pytorch"))
    )  # its own caches and logs
    for name in left:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    assert not left, f"left in the temporary directory: {', '.join(left)}"
