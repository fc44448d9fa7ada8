"""`infer.py --batch --ray` on a local Ray cluster: the results of a run without Ray, whoever dies.

The workers get a `sitecustomize` that kills their process (SIGKILL) if it opens certain files.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT


pytest.importorskip("ray.data", reason="Ray is not installed: pip install -r requirements-ray.txt")

from ray.cluster_utils import Cluster  # noqa: E402

from moss_vl import infer  # noqa: E402


IMAGE, VIDEO = ROOT / "data/example_image.jpg", ROOT / "data/example_video.mp4"
DEADLY = """\
import os, signal, sys


def hook(event, arguments):
    path = str(arguments[0]) if event == "open" else ""
    if "deadly-always" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "deadly-once" in path and not os.path.exists(path + ".died"):
        os.close(os.open(os.path.dirname(path) + "/died", os.O_CREAT))
        os.rename(os.path.dirname(path) + "/died", path + ".died")
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one machine, whose workers die of deadly files."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, as it holds sockets
    (folder / "sitecustomize.py").write_text(DEADLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("PYTHONPATH", str(folder))  # the workers get the package from the driver
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
        yield running.address
        running.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def write_queries(folder, *queries):
    path = folder / "queries.jsonl"
    path.write_text("".join((query if isinstance(query, str) else json.dumps(query)) + "\n" for query in queries))
    return path


def arguments(queries, out, *more):
    return ["--batch", str(queries), "--out", str(out), "--max-new-tokens", "8", "--dtype", "float32", *more]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_cluster_gives_the_results_of_one_machine_though_workers_die(cluster, tmp_path, capsys):
    """Two workers. One query kills one of them once, another one kills every worker that tries it."""
    for name in ("deadly-once.jpg", "deadly-always.jpg"):
        shutil.copyfile(IMAGE, tmp_path / name)
    asked = "What color is the star?"
    queries = [{"id": f"q{index}", "images": [str(IMAGE)], "prompt": asked} for index in range(12)]
    queries[1] = {"id": "clip", "videos": [str(VIDEO)], "prompt": "When does the star appear?", "note": 3}
    queries[0] |= {"failure": "a key of the user", "result": [1]}
    queries[2] = {"id": "missing", "images": ["nowhere.jpg"], "prompt": asked}
    queries[3] = "{broken"
    queries[4] = {"id": "once", "images": ["deadly-once.jpg"], "prompt": asked}
    queries[9] = {"id": "always", "images": ["deadly-always.jpg"], "prompt": asked}
    path = write_queries(tmp_path, *queries)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert infer.main(arguments(path, here)) == 1
    capsys.readouterr()
    assert infer.main(arguments(path, there, "--ray", cluster, "--ray-workers", "2", "--batch-size", "2")) == 1
    out, err = capsys.readouterr()
    wanted, found = rows(here), rows(there)
    assert wanted[9].pop("text") == "blue" and wanted[0]["text"] == "blue"
    assert found == wanted[:9] + [wanted[9] | {"error": "3 workers died while they answered this query"}] + wanted[10:]
    assert out == "" and "12/12" in err and "12 queries, 3 failed" in err and "Traceback" not in err
    assert "a worker died; queries 4 to 7 are answered again, one by one" in err
    assert (tmp_path / "deadly-once.jpg.died").exists() and not (tmp_path / "there.jsonl.early").exists()


@pytest.mark.parametrize(
    "checkpoint, message",
    [("nowhere", "cannot load .*nowhere: no such checkpoint folder"), ("deadly-always", "3 workers on .* died while")],
)
def test_a_checkpoint_that_does_not_load_is_one_error(cluster, tmp_path, capsys, checkpoint, message):
    folder = tmp_path / checkpoint
    if checkpoint != "nowhere":
        shutil.copytree(ROOT / "checkpoints/moss-vl-nano", folder)
    path = write_queries(tmp_path, {"prompt": "a"})
    more = ("--ray", cluster, "--ray-workers", "1", "--checkpoint", str(folder))
    assert infer.main(arguments(path, tmp_path / "out.jsonl", *more)) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and "Traceback" not in err and last.startswith("infer.py: ")
    assert re.search(message, last), err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_driver_that_is_stopped_or_killed_is_continued(cluster, tmp_path):
    """First Ctrl-C, then SIGKILL, then to the end without Ray."""
    long = {"min_new_tokens": 120, "max_new_tokens": 120}
    queries = [{"id": index, "prompt": f"Say {index}", "generate_kwargs": long} for index in range(12)]
    path, out = write_queries(tmp_path, *queries), tmp_path / "out.jsonl"
    early = tmp_path / "out.jsonl.early"
    ray = arguments(path, out, "--ray", cluster, "--ray-workers", "1", "--batch-size", "1")
    before = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "infer.py"), *ray],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline and written(out, early) <= before:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), err
        if number == signal.SIGINT:
            assert err.splitlines()[-1] == "infer.py: interrupted; run the same command to continue"
        assert before < written(out, early) < 12
        before = written(out, early)
    kept = out.read_text().splitlines()
    assert infer.main(arguments(path, out)) == 0
    assert out.read_text().splitlines()[: len(kept)] == kept and not early.exists()
    assert [row["id"] for row in rows(out)] == list(range(12)) and all(row["text"] for row in rows(out))


def written(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


def test_too_many_workers_are_refused(cluster, tmp_path, capsys):
    path = write_queries(tmp_path, {"prompt": "a"})
    assert infer.main(arguments(path, tmp_path / "out.jsonl", "--ray", cluster, "--ray-workers", "3")) == 2
    assert "--ray-workers 3: the Ray cluster has space for 2 workers with a CPU each" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_one_error(tmp_path, capsys):
    path = write_queries(tmp_path, {"prompt": "a"})
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    assert infer.main(arguments(path, tmp_path / "out.jsonl", "--ray", address)) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"infer.py: no Ray cluster at {address} (--ray): ")
    assert "Traceback" not in err
