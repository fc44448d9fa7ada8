"""Inputs of infer.py: URLs, lists of frames, JSON lists, training records, all keys; and unwritable caches."""

import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_infer_cli import IMAGE, SHORT, VIDEO, asked, infer, loaded, parts_of, rows, run, write_lines  # noqa: F401 - most are fixtures


@pytest.fixture
def web(tmp_path):
    """(URL of a web server with the files `picture` and `clip`, list of log lines: a path per request)."""
    folder, paths = tmp_path / "web", []
    folder.mkdir()
    shutil.copyfile(IMAGE, folder / "picture")
    shutil.copyfile(VIDEO, folder / "clip")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            paths.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def grids(loaded, monkeypatch):
    """The frames per medium of each `generate` call."""
    recorded, generate = [], loaded[1].generate

    def spy(**kwargs):
        recorded.append(kwargs["grid_thw"][:, 0].tolist())
        return generate(**kwargs)

    monkeypatch.setattr(loaded[1], "generate", spy)
    return recorded


def data_url(path, kind):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# arguments


def test_urls_are_read_like_paths(run, web, asked, monkeypatch):
    url, paths = web
    monkeypatch.setenv("HOME", str(ROOT / "data"))
    said = run(IMAGE, "-p", "What color is the star?", *SHORT)
    for source in (IMAGE.as_uri(), data_url(IMAGE, "image/jpeg"), "~/example_image.jpg"):
        assert run(source, "-p", "What color is the star?", *SHORT) == said, source[:50]
    assert (
        run(f"{url}/picture", "-p", "What color is the star?", "--allow-http", "--allow-private-hosts", *SHORT) == said
    )
    assert said[0] == 0 and said[1].strip() and [parts_of(query) for query in asked] == [["image", "text"]] * 5
    assert paths == ["/picture"], "one download"
    code, _, err = run(
        f"{url}/clip",
        data_url(VIDEO, "video/mp4"),
        VIDEO.as_uri(),
        "--frames",
        2,
        "--allow-http",
        "--allow-private-hosts",
        *SHORT,
    )
    assert code == 0 and parts_of(asked[-1]) == ["video"] * 3 + ["text"], err
    assert paths == ["/picture", "/clip"]


def test_nothing_is_downloaded_without_allow_http(run, web, monkeypatch):
    url, paths = web
    monkeypatch.setattr(infer, "load", lambda args: pytest.fail("loaded"))
    code, out, err = run(f"{url}/picture", "-p", "a", *SHORT)
    assert (code, out) == (2, "") and f"'{url}/picture' would be downloaded; give --allow-http" in err and not paths


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("file:///no/such/file.png", "no such file: /no/such/file.png"),
        ("file://elsewhere/a.png", "another machine, 'elsewhere'"),
        ("data:image/png;base64,!!", "is not base64"),
        ("A" * 5000, "no such file: 'AAAA"),
    ],
    ids=["no file", "another machine", "base64", "long"],
)
def test_wrong_urls_are_errors(run, wrong, message):
    code, out, err = run(wrong, "-p", "a", *SHORT)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err and len(err) < 1000


@pytest.mark.parametrize("options, frames", [((), [8, 8]), (("--fps", "4"), None)])
def test_frames_holds_for_each_video(run, grids, asked, options, frames):
    code, _, err = run(VIDEO, VIDEO, "--frames", 8, *options, *SHORT)
    assert code == 0, err
    assert grids[0] == frames if frames else sum(grids[0]) == 8
    run(
        VIDEO,
        VIDEO,
        VIDEO,
        "--frames",
        100,
        "-p",
        "x",
        "--max-new-tokens",
        1,
        "--min-pixels",
        1024,
        "--max-pixels",
        1024,
    )
    assert asked[-1]["media_kwargs"]["max_frames"] == 300


def test_the_ends_of_ranges_are_accepted(run, asked):
    for options, expected in (
        (("--top-p", "1", "--temperature", "1"), {"top_p": 1.0}),
        (("--top-k", "0", "--temperature", "1"), {"top_k": 0}),
        (("--temperature", "0"), {"do_sample": False}),
        (("--max-new-tokens", "1"), {"max_new_tokens": 1}),
    ):
        code, _, err = run("-p", "a", *SHORT[:2], *options)
        assert code == 0 and expected.items() <= asked[-1]["generate_kwargs"].items(), err
    for options in (
        ("--top-p", "1.01"),
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--max-new-tokens", "0"),
        ("--temperature", "-0.1"),
    ):
        assert run("-p", "a", "--temperature", "1", *options)[0] == 2


# batches


@pytest.fixture
def batch(run, asked, tmp_path, monkeypatch):
    """Runs a file of queries beside a.jpg and b.mp4 from another folder: (exit code, stderr, results, queries of the
    model)."""
    shutil.copyfile(IMAGE, tmp_path / "a.jpg")
    shutil.copyfile(VIDEO, tmp_path / "b.mp4")
    monkeypatch.chdir(ROOT)

    def call(*queries, options=(), name="queries.jsonl"):
        file, out = tmp_path / name, tmp_path / f"results of {name}"
        out.unlink(missing_ok=True)
        write_lines(file, *queries)
        if name.endswith(".json"):
            file.write_text(json.dumps(list(queries), indent=1), encoding="utf-8-sig")
        asked.clear()
        code, _, err = run("--batch", file, "--out", out, "--frames", 2, *SHORT, *options)
        return code, err, rows(out), list(asked)

    return call


def user(*parts):
    return {"messages": [{"role": "user", "content": [*parts, "What color is the star?"]}]}


def test_paths_under_all_keys_start_at_the_folder_of_the_file(batch, tmp_path):
    image, video = str(tmp_path / "a.jpg"), str(tmp_path / "b.mp4")
    images = (
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "image_url": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image", "url": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "image": {"path": "a.jpg"}},
    )
    videos = (
        {"type": "video", "video": "b.mp4"},
        {"type": "video", "video_path": "b.mp4"},
        {"type": "video_url", "video_url": {"url": "b.mp4"}},
        {"type": "video", "path": "b.mp4"},
        {"type": "video", "video": {"video_path": "b.mp4", "segments": [[0, 1]]}},
    )
    code, err, results, asked = batch(
        *map(user, images),
        *map(user, videos),
        {"media": ["b.mp4", {"image": "a.jpg"}]},
        {"images": [{"url": "a.jpg"}], "videos": {"path": "b.mp4"}},
    )
    assert code == 0, results
    parts = [query["messages"][0]["content"] for query in asked[:-1]]
    assert [part[0]["image"] for part in parts[:6]] == [image] * 6
    assert [part[0]["video"] for part in parts[6:10]] == [video] * 4
    assert parts[10][0]["video"] == {"video_path": video, "segments": [[0, 1]]}
    assert parts[11][:2] == [{"type": "video", "video": video}, {"type": "image", "image": image}]
    assert asked[-1]["images"] == [image] and asked[-1]["videos"] == video
    for same in (results[:6], results[6:10]):
        assert [result["text"] for result in same] == [same[0]["text"]] * len(same) and same[0]["text"].strip()


def test_a_list_of_frames_is_a_video(batch, tmp_path, grids):
    image = str(tmp_path / "a.jpg")
    code, _, results, asked = batch(
        user({"type": "video", "video": ["a.jpg"] * 3, "sample_fps": 2.0}),
        {"videos": [{"video": ["a.jpg"] * 2, "sample_fps": 1}]},
        {"media": [{"video": ["a.jpg"] * 4, "sample_fps": 1}]},
        options=("--fps", 1),
    )
    assert code == 0, results
    assert asked[0]["messages"][0]["content"][0]["video"] == {"video_path": [image] * 3, "sample_fps": 2.0}
    assert grids == [[3], [2], [4]]


def test_a_json_list_is_read_like_lines(batch):
    queries = [{"id": i, "prompt": f"Say {i}"} for i in range(3)]
    lines, as_list = batch(*queries), batch(*queries, name="queries.json")
    assert lines[0] == as_list[0] == 0 and lines[2] == as_list[2] and [row["id"] for row in as_list[2]] == [0, 1, 2]


def test_a_broken_json_list_is_an_error(run, tmp_path):
    (tmp_path / "q.json").write_text('[{"prompt": "a"},')
    code, _, err = run("--batch", tmp_path / "q.json", "--out", tmp_path / "r.jsonl")
    assert code == 2 and "begins like a JSON list, but is not one" in err


def test_a_json_list_continues_after_earlier_results(batch, run, tmp_path):
    queries = [{"id": i, "prompt": f"Say {i}"} for i in range(3)]
    whole = batch(*queries, name="q.json")[2]
    out = tmp_path / "results of q.json"
    write_lines(out, whole[0])
    assert run("--batch", tmp_path / "q.json", "--out", out, "--frames", 2, *SHORT)[0] == 0 and rows(out) == whole


ANSWER = {"role": "assistant", "content": "a star"}


def test_training_records_are_queries(batch):
    question = {"role": "user", "content": "<|image|>What color is the star?"}
    human = [{"from": "human", "value": "<|image|>What color is the star?"}, {"from": "gpt", "value": "a star"}]
    code, _, results, asked = batch(
        {"messages": [question], "images": ["a.jpg"]},
        {"messages": [question, ANSWER], "images": ["a.jpg"], "id": 1},
        {"messages": [question, ANSWER, ANSWER], "images": "a.jpg", "system_prompt": None, "videos": None},
        {"conversations": human, "images": ["a.jpg"], "label": "star"},
        {"prompt": "What color is the star?", "response": "a star", "images": ["a.jpg"]},
        {"messages": [question, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER], "images": ["a.jpg"]},
    )
    assert code == 0, results
    assert [result["text"] for result in results[:5]] == [results[0]["text"]] * 5 and results[0]["text"].strip()
    assert [message["role"] for message in asked[5]["messages"]] == ["user", "assistant", "user"]
    assert results[1]["id"] == 1 and results[3]["label"] == "star" and results[4]["response"] == "a star"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": [ANSWER]}, "the assistant's alone"),
        ({"conversations": [{"from": "human", "value": "a"}], "prompt": "b"}, "conversations or prompt, got both"),
        ({"conversations": "a"}, "conversations must be a list of turns"),
        ({"media": [3]}, "media holds 3"),
        ({"media": [{"url": "a.jpg"}]}, "expected a path, a URL, or a dict with 'image' or 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "imge": "a.jpg"}]}]}, "did you mean 'image'"),
        (user({"type": "image", "url": "https://example.com/a.png"}), "give --allow-http"),
        ({"images": ["http://example.com/a.png"]}, "give --allow-http"),
        ({"media": ["https://example.com/a.png"]}, "give --allow-http"),
        ({"videos": [["http://example.com/a.png"]]}, "give --allow-http"),
    ],
)
def test_wrong_records_are_errors(batch, record, message):
    code, _, [result], asked = batch(record)
    assert code == 1 and message in result["error"] and not asked


def test_other_keys_of_a_line_are_copied_into_its_result(batch):
    record = {"id": "x", "metadata": {"source": "web"}, "label": None, "text": "mine", "index": 5, "error": "mine"}
    code, _, results, _ = batch({"prompt": "a", **record}, {"prompt": "a", "images": ["missing.png"], **record})
    kept = {"id": "x", "metadata": {"source": "web"}, "label": None}
    assert [{name: row.get(name) for name in kept} for row in results] == [kept] * 2
    assert results[0]["index"] == 0 and results[0]["text"] != "mine" and "error" not in results[0]
    assert results[1]["index"] == 1 and "missing.png" in results[1]["error"] and "text" not in results[1] and code == 1


def test_urls_in_lines_need_permission(batch, web):
    url, paths = web
    queries = [
        {"images": [f"{url}/picture"]},
        user({"type": "image", "image_url": {"url": f"{url}/picture"}}),
        {"media": f"{url}/clip"},
    ]
    code, _, results, _ = batch(*queries, options=("--allow-http", "--allow-private-hosts"))
    assert code == 0 and sorted(paths) == ["/clip", "/picture", "/picture"], results
    code, _, results, _ = batch(
        {"images": [f"{url}/picture"], "media_kwargs": {"allow_http": True, "allow_private_hosts": True}}
    )
    assert code == 0, results


def test_options_of_a_line_override_the_command_line_under_any_alias(batch, grids):
    code, _, results, asked = batch(
        {"videos": "b.mp4"},
        {"videos": "b.mp4", "media_kwargs": {"nframes": 3}},
        {"videos": "b.mp4", "media_kwargs": {"fps": 0.5}},
        {"videos": "b.mp4", "media_kwargs": {"longest_edge": 9000}},
        {"videos": "b.mp4", "media_kwargs": {"fps": 1, "video_fps": 1}},
    )
    assert code == 1 and "names of the same option" in results[4]["error"], results
    assert grids == [[2], [3], [5], [2]]
    assert batch({"videos": "b.mp4", "media_kwargs": {"nframes": 3}}, options=("--fps", 1))[0] == 0 and grids[-1] == [
        3
    ]
    assert asked[3]["media_kwargs"]["longest_edge"] == 9000 and "max_pixels" not in asked[3]["media_kwargs"]


def test_null_counts_as_absent(batch):
    code, _, results, asked = batch(
        {"prompt": None, "system_prompt": None, "images": None, "generate_kwargs": None},
        options=("-p", "By default?", "--system", "Be short."),
    )
    assert code == 0 and asked[0]["prompt"] == "By default?" and asked[0]["system_prompt"] == "Be short.", results


# caches


def test_a_checkpoint_folder_needs_no_cache():
    """In a process, as the libraries read the environment when they are imported."""
    environment = {**os.environ, "HF_HOME": "/dev/null/cache", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", "-p", "a"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_only_errors_of_the_file_system_are_attributed_to_the_cache(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/dev/null/hub")
    refused = PermissionError(13, "Permission denied", "/x")
    infer.check_cache(OSError("no such model"))
    wrapped = OSError("there was a problem")
    wrapped.__cause__ = refused
    for cause in (refused, wrapped):
        with pytest.raises(
            OSError, match="/dev/null/hub, the folder for downloaded checkpoints, .*; set HF_HUB_CACHE or HF_HOME"
        ) as error:
            infer.check_cache(cause)
        assert error.value.__cause__ is cause


def test_a_writable_cache_is_not_blamed(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    infer.check_cache(PermissionError(13, "Permission denied", "/x"))
