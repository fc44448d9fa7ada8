"""The command infer.py on the small checkpoint: single questions, batches, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from moss_vl import infer
from moss_vl.generation_streams import BatchStream
from moss_vl.tools import query_files


NANO = ROOT / "checkpoints/moss-vl-nano"
IMAGE, VIDEO = ROOT / "data/example_image.jpg", ROOT / "data/example_video.mp4"
SHORT = ("--max-new-tokens", "4", "--min-pixels", "4096", "--max-pixels", "20000")


@pytest.fixture(scope="module")
def loaded():
    """Processor and model, loaded once and as infer.py loads them."""
    return infer.load(infer.parse(["-p", "", "--dtype", "float32"]))


@pytest.fixture
def run(loaded, monkeypatch, capsys):
    """Runs infer.py in this process on the loaded checkpoint: (exit code, stdout, stderr)."""
    monkeypatch.setattr(infer, "load", lambda args: loaded)

    def call(*arguments):
        try:
            code = infer.main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def asked(loaded, monkeypatch):
    """The queries that the model gets."""
    recorded, generate, add = [], type(loaded[1]).offline_batch_generate, BatchStream.add

    def spy(self, processor, queries, **kwargs):
        recorded.extend(queries)
        return generate(self, processor, queries, **kwargs)

    def spy_on_stream(self, query, *state):
        recorded.append(query)
        return add(self, query, *state)

    monkeypatch.setattr(type(loaded[1]), "offline_batch_generate", spy)
    monkeypatch.setattr(BatchStream, "add", spy_on_stream)
    return recorded


def parts_of(query):
    return [part["type"] for part in query["messages"][0]["content"]]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, *queries):
    path.write_text(
        "".join((query if isinstance(query, str) else json.dumps(query)) + "\n" for query in queries), encoding="utf-8"
    )
    return path


# one question


def test_the_command_of_the_readme():
    command = [sys.executable, ROOT / "infer.py", VIDEO, "-p", "What happens?", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_the_answer_is_streamed(run, loaded):
    processor, model = loaded
    code, out, _ = run(IMAGE, "-p", "What is it?", "--no-template", *SHORT)
    text = model.offline_image_generate(
        processor,
        "What is it?",
        str(IMAGE),
        use_template=False,
        max_new_tokens=4,
        shortest_edge=4096,
        longest_edge=20000,
    )
    assert (code, out) == (0, text + "\n")


def test_media_keep_their_order(run, asked, tmp_path):
    picture, clip = tmp_path / "picture", tmp_path / "clip"
    shutil.copyfile(IMAGE, picture)
    shutil.copyfile(VIDEO, clip)
    code, _, err = run(picture, clip, "-p", "Compare.", IMAGE, "--frames", "2", *SHORT)
    assert code == 0, err
    assert parts_of(asked[0]) == ["image", "video", "image", "text"]
    assert run("-p", "Only words.", *SHORT[:2])[0] == 0 and parts_of(asked[1]) == ["text"]
    assert run(picture, *SHORT)[0] == 0 and asked[2]["messages"][0]["content"][1]["text"] == ""


def test_only_an_animated_gif_is_a_video(tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "stands.gif")
    assert [query_files.probe_file(tmp_path / name) for name in ("moves.gif", "stands.gif")] == ["video", "image"]


OPTIONS = [
    (("--frames", "4"), "media_kwargs", dict(num_frames=4, video_fps=None)),
    (("--frames", "300"), "media_kwargs", dict(num_frames=300, max_frames=300)),
    (("--frames", "4", "--fps", "2"), "media_kwargs", dict(max_frames=4, video_fps=2.0)),
    (("--fps", "0.5"), "media_kwargs", dict(video_fps=0.5, max_frames=None, video_max_pixels=None)),
    ((), "media_kwargs", dict(video_fps=None, min_pixels=4096)),
    (
        ("--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "1"),
        "generate_kwargs",
        dict(do_sample=True, temperature=0.5, top_p=0.9, top_k=7),
    ),
    (("--repetition-penalty", "1.5"), "generate_kwargs", dict(do_sample=False, repetition_penalty=1.5)),
    (
        ("--system", "Be short.", "--thinking", "deep_thinking"),
        None,
        dict(system_prompt="Be short.", thinking_mode="deep_thinking"),
    ),
    (("--template",), None, dict(use_template=True)),
    (("--no-template",), None, dict(use_template=False)),
    ((), None, dict(use_template=None)),
]


@pytest.mark.parametrize("options, where, expected", OPTIONS)
def test_options_reach_the_query(run, asked, options, where, expected):
    code, _, err = run(VIDEO, *SHORT, *options)
    assert code == 0, err
    query = asked[0] if where is None else asked[0][where]
    assert {name: query.get(name) for name in expected} == expected
    assert asked[0]["generate_kwargs"]["max_new_tokens"] == 4 and asked[0]["media_kwargs"]["max_pixels"] == 20000


def test_a_seed_makes_sampling_repeatable(run):
    """The temperature is high, as the trained checkpoint is too certain to depend on the seed at usual ones."""
    said = [run("-p", "Say", "--max-new-tokens", 12, "--temperature", 8, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_dtype_device_and_attention_of_the_model():
    args = infer.parse(["-p", "", "--device", "cpu", "--dtype", "bfloat16", "--attn", "eager"])
    _, model = infer.load(args)
    assert (
        model.dtype == torch.bfloat16 and model.device.type == "cpu" and model.config._attn_implementation == "eager"
    )


WRONG_CALLS = [
    ((), "nothing to do"),
    (("--frames", "0", "a.mp4"), "--frames: must be at least 1, got 0"),
    (("--fps", "-1", "a.mp4"), "--fps: must be above 0, got -1"),
    (("--top-p", "2", "-p", "a"), "--top-p: must be at most 1, got 2"),
    (("--top-p", "0.5", "-p", "a"), "--top-p is for sampling"),
    (("--max-new-tokens", "many", "-p", "a"), "invalid whole number value: 'many'"),
    (("--dtype", "int8", "-p", "a"), "invalid choice: 'int8'"),
    (("--batch", "a.jsonl"), "--batch needs --out"),
    (("--out", "a.jsonl", "-p", "a"), "--out goes with --batch"),
    (("--ray", "-p", "a"), "--ray goes with --batch"),
    (("--batch-size", "2", "-p", "a"), "--batch-size goes with --batch"),
    (("--batch", "a.jsonl", "--out", "b.jsonl", "--ray-workers", "2"), "--ray-workers goes with --ray"),
    (("--batch", "a.jsonl", "--out", "b.jsonl", "--ray", "--ray-gpus", "1.5"), "a whole number if it is above 1"),
    (("--batch", "a.jsonl", "--out", "b.jsonl", "--ray", "--ray-gpus", "1", "--device", "cpu"), "no effect"),
    (("--batch", "a.jsonl", "--out", "b.jsonl", "--ray", "ray://h:1"), "takes no ray:// address"),
    (("--batch", "a.jsonl", "--out", "b.jsonl", "c.png"), "named in its lines"),
    (("nowhere.mp4",), "no such file: nowhere.mp4"),
    ((ROOT,), "is not a file"),
    (("--batch", "nowhere.jsonl", "--out", "b.jsonl"), "infer.py: no such file: nowhere.jsonl"),
    ((IMAGE, "-p", "a", "--fps", "2"), "--fps would have no effect: no video is given"),
    ((IMAGE, IMAGE, "-p", "a", "--fps", "2", "--frames", "4"), "--frames and --fps would have no effect"),
    (("-p", "a", "--max-pixels", "4096"), "--max-pixels has no effect without images and videos"),
    (("-p", "a", "--frames", "4"), "--frames has no effect without images and videos"),
    ((ROOT / "LICENSE", "-p", "a"), "LICENSE"),
]


@pytest.mark.parametrize("arguments, message", WRONG_CALLS)
def test_wrong_usage_is_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and "Traceback" not in err


def test_empty_files_are_named(run, tmp_path):
    (tmp_path / "empty.mp4").touch()
    code, out, err = run(tmp_path / "empty.mp4", "-p", "a")
    assert (code, out) == (2, "") and "empty.mp4 is empty" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("--checkpoint", "no/such/folder"), "no such checkpoint folder: no/such/folder"),
        (("--checkpoint", str(ROOT / "data")), "data"),
        (("--device", "abacus"), "--device abacus"),
        *(
            []
            if torch.cuda.is_available()
            else [(("--device", "cuda"), "--device cuda: this torch finds no CUDA device")]
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_one_line(capsys, options, message):
    assert infer.main(["-p", "a", *options]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in (
        "--checkpoint",
        "--frames",
        "--fps",
        "--max-new-tokens",
        "--no-template",
        "--device",
        "--dtype",
        "--batch",
        "--out",
        "exit codes",
    ):
        assert word in text


def test_ctrl_c_prints_no_traceback(run, loaded, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(loaded[1]), "offline_batch_generate", interrupt)
    assert run("-p", "a") == (130, "", "infer.py: interrupted\n")


# many questions


@pytest.fixture
def many(tmp_path):
    """(file of queries, beside their media; file for the results)."""
    shutil.copyfile(IMAGE, tmp_path / "a.jpg")
    shutil.copyfile(VIDEO, tmp_path / "b.mp4")
    queries = [
        {"id": "picture", "prompt": "What is it?", "images": ["a.jpg"]},
        {"id": 7, "prompt": "What happens?", "videos": "b.mp4", "media_kwargs": {"num_frames": 3}},
        "",
        {"media": ["b.mp4", "a.jpg"], "prompt": "Both — ◯?"},
        {"id": "missing", "prompt": "a", "images": ["c.jpg"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "And?"}]}
            ],
            "generate_kwargs": {"max_new_tokens": 3},
        },
        {"promt": "a"},
        "{broken",
        "[1]",
        {"videos": [{"video_path": "b.mp4", "segments": [[0, 2]]}]},
    ]
    return write_lines(tmp_path / "queries.jsonl", *queries), tmp_path / "results.jsonl"


def many_arguments(many, *more):
    return ("--batch", many[0], "--out", many[1], "--frames", 2, "-p", "By default?", *SHORT, *more)


def test_a_batch_continues_after_a_failed_query(run, asked, many, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths are relative to the file of queries, not to the working directory
    code, out, err = run(*many_arguments(many))
    results = rows(many[1])
    assert (code, out) == (1, "")
    assert [result["index"] for result in results] == list(range(9))
    assert [result.get("id") for result in results] == ["picture", 7, None, "missing", None, None, None, None, None]
    assert ["text" in result for result in results] == [True, True, True, False, True, False, False, False, True]
    messages = [result["error"] for result in results if "error" in result]
    for part, message in zip(
        ("c.jpg", "did you mean 'prompt'", "Expecting property name", "must be a JSON object"), messages, strict=True
    ):
        assert part in message and "Traceback" not in message and "query 0" not in message
    assert "9/9" in err and "9 queries, 4 failed" in err
    assert asked[1]["media_kwargs"]["num_frames"] == 3 and asked[0]["media_kwargs"]["num_frames"] == 2
    assert parts_of(asked[2]) == ["video", "image", "text"] and asked[4]["generate_kwargs"]["max_new_tokens"] == 3
    assert asked[-1]["prompt"] == "By default?"


def test_a_line_gets_the_answer_of_the_command(run, many):
    run(*many_arguments(many))
    assert run(many[0].parent / "a.jpg", "-p", "What is it?", *SHORT)[1] == rows(many[1])[0]["text"] + "\n"


@pytest.mark.parametrize(
    "torn", ["", '{"index": 4, "te', '{"index": 4, "text": "cut off, but whole"}'], ids=["clean", "torn", "no newline"]
)
def test_an_interrupted_run_continues(run, asked, many, torn):
    run(*many_arguments(many))
    whole = many[1].read_text(encoding="utf-8")
    many[1].write_text("".join(whole.splitlines(keepends=True)[:4]) + torn, encoding="utf-8")
    asked.clear()
    code, _, err = run(*many_arguments(many))
    assert code == 1 and many[1].read_text(encoding="utf-8") == whole
    assert len(asked) == 3 and "9 queries, 4 failed" in err


def test_a_finished_batch_loads_no_model(run, many, monkeypatch):
    lines = write_lines(many[0], {"prompt": "a"})
    assert run("--batch", lines, "--out", many[1], *SHORT)[0] == 0
    monkeypatch.setattr(infer, "load", lambda args: pytest.fail("loaded"))
    code, _, err = run("--batch", lines, "--out", many[1], *SHORT)
    assert code == 0 and "1 queries, 0 failed" in err and len(rows(many[1])) == 1


@pytest.mark.parametrize(
    "results",
    [
        '{"index": 1, "text": ""}\n',
        '{"index": 0, "id": "other", "text": ""}\n',
        "not json\n",
        '{"index": 0}\n',
        '{"index": 0, "text": ""}\n' * 2,
    ],
)
def test_results_of_other_queries_are_not_overwritten(run, many, results):
    many[1].write_text(results)
    code, _, err = run(*many_arguments(many))
    assert code == 2 and "is no result of these queries" in err and many[1].read_text() == results


def test_results_do_not_go_into_the_queries(run, many):
    before = many[0].read_text()
    code, _, err = run("--batch", many[0], "--out", many[0])
    assert code == 2 and "--out is the file of the queries" in err and many[0].read_text() == before


def test_a_seeded_batch_does_not_depend_on_where_it_was_cut(run, many):
    lines = write_lines(many[0], *({"prompt": f"Say {i}"} for i in range(3)))
    arguments = ("--batch", lines, "--out", many[1], "--temperature", 1.5, "--seed", 3, *SHORT)
    run(*arguments)
    whole = rows(many[1])
    write_lines(many[1], *whole[:1])
    assert run(*arguments)[0] == 0 and rows(many[1]) == whole


def test_ctrl_c_in_a_batch_keeps_the_results(run, tmp_path):
    """A separate process gets a signal in the middle of a long run; the rest of the run follows in this process."""
    queries = write_lines(
        tmp_path / "queries.jsonl",
        *({"id": i, "prompt": "Go on", "generate_kwargs": {"min_new_tokens": 160}} for i in range(5)),
    )
    out = tmp_path / "results.jsonl"
    arguments = ["--batch", str(queries), "--out", str(out), "--max-new-tokens", "160", "--batch-size", "2"]
    command = [sys.executable, str(ROOT / "infer.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - whatever the tests were started with
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listening)
    deadline = time.monotonic() + 120
    while (
        process.poll() is None and time.monotonic() < deadline and not (out.exists() and out.read_bytes().count(b"\n"))
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    done = rows(out)
    assert process.returncode == 130 and "run the same command to continue" in err and "Traceback" not in err, err
    assert 1 <= len(done) < 5
    code, _, err = run(*arguments)
    assert code == 0, err
    assert rows(out)[: len(done)] == done and [row["id"] for row in rows(out)] == [0, 1, 2, 3, 4]
