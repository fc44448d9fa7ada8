"""The programs and the notebook in examples/ run and answer rightly, on moss-vl-nano."""

import json
import runpy
import sys
import types

import pytest
from conftest import ROOT
from PIL import Image
from realtime import make_talking_model


EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """What an example prints, run in this process as a command in the root."""

    def call(name, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return call


def test_pipeline(run):
    assert run("pipeline") == ["blue"]


def test_streaming(run):
    assert run("streaming")[0].startswith("at 0.0 seconds a large white ring at the top left")


def test_batches(run):
    lines = run("batches")
    assert {line for line in lines if "..." not in line} == {"0: blue", "1: 3", "2: 3.3 seconds"}
    pieces = {index: "".join(line[6:] for line in lines if line.startswith(f"{index}: ...")) for index in "012"}
    assert pieces == {"0": "blue", "1": "3", "2": "3.3 seconds"}


def test_sessions(run):
    answers = [line.split("? ")[1] for line in run("sessions")]
    assert answers == ["4.7 seconds", "up", "2.3 seconds"]


def test_realtime(run):
    """The star appears in the frame at 9 seconds. Printed are events, a line each."""
    words = "".join(line.split("text='")[1].split("'")[0] for line in run("realtime") if line.startswith("Text("))
    assert words == "the star appears"


def test_realtime_with_another_checkpoint(run, tmp_path):
    processor, model = make_talking_model()
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    lines = run("realtime", tmp_path, ROOT / "data/example_video.mp4")
    frames = sum(line.startswith("FrameTaken") for line in lines)
    assert frames >= 5 and sum("' star'" in line for line in lines) == frames and lines[-1].startswith("Parked")


def test_heat_maps(run, tmp_path):
    [line] = run("heat_maps", tmp_path / "map.png")
    assert line.startswith("yellow: 9") and Image.open(tmp_path / "map.png").size >= (200, 200)
    with pytest.raises(SystemExit, match="heat_maps.py OUT.png"):
        run("heat_maps")


def test_the_notebook(monkeypatch):
    monkeypatch.chdir(EXAMPLES)  # as Jupyter starts
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert (names["picture"], names["replies"]) == ("blue", ["4.7 seconds", "up"])
    assert "the ring changes color to orange" in names["video"] and names["compared"].strip()
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not committed"


def test_the_adapter_answers_documents_of_lmms_eval(monkeypatch):
    instances = pytest.importorskip("lmms_eval.api.instance", reason="lmms-eval is not installed")
    monkeypatch.chdir(ROOT)
    model = runpy.run_path(str(EXAMPLES / "lmms_eval_adapter.py"))["MossVL"](fps=1.0)
    docs = [
        ({"type": "image", "url": Image.open("data/example_image.jpg")}, "What color is the star?"),
        ({"type": "video", "url": "data/example_video.mp4"}, "When does the star appear?"),
    ]
    model.task_dict = {"shapes": {"test": docs}}

    def messages(doc):
        return [{"role": "user", "content": [doc[0], {"type": "text", "text": doc[1]}]}]

    options = {"until": [" seconds"], "max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1}
    requests = []
    for index in range(2):
        metadata = {"task": "shapes", "doc_id": index, "repeats": 1}
        arguments = ("", messages, options, index, "shapes", "test")
        requests.append(instances.Instance("generate_until", arguments, index, metadata))
    assert model.generate_until(requests) == ["blue", "3.3"]
    assert "until" in options


@pytest.fixture
def base_of_vlmeval(monkeypatch):
    """VLMEvalKit, or, if it is not installed, its base class as in ms-vlmeval 0.0.20 as far as the adapter uses it."""
    try:
        import vlmeval.vlm.base  # noqa: F401
    except ImportError:

        class BaseModel:
            def __init__(self):
                self.dump_image_func = None

            def generate(self, message, dataset=None):
                return self.generate_inner(message, dataset)

            def chat(self, messages, dataset=None):
                return self.chat_inner(messages, dataset=dataset)

        base = types.ModuleType("vlmeval.vlm.base")
        base.BaseModel = BaseModel
        for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
            monkeypatch.setitem(sys.modules, name, base)


def test_the_adapter_answers_messages_of_vlmevalkit(base_of_vlmeval, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = runpy.run_path(str(EXAMPLES / "vlmeval_adapter.py"))["MossVL"](dtype="float32")
    picture = {"type": "image", "value": "data/example_image.jpg"}
    asked = [{"type": "text", "value": text} for text in ("What color is the star?", "When does the star appear?")]
    system = {"type": "text", "value": "Be brief.", "role": "system"}
    assert model.generate([picture, asked[0]]) == "blue"
    messages, query = [], type(model.model).offline_batch_generate

    def spy(self, processor, queries):
        messages.extend(queries[0]["messages"])
        return query(self, processor, queries)

    monkeypatch.setattr(type(model.model), "offline_batch_generate", spy)
    clip = {"type": "video", "value": "data/example_video.mp4"}
    assert model.generate([system, clip, asked[1]]) == "3.3 seconds"
    assert [turn["role"] for turn in messages] == ["system", "user"]
    assert messages[1]["content"][0] == {"type": "video", "video": "data/example_video.mp4", "fps": 1.0}
    model.fps, model.nframe = None, 4  # as VLMEvalKit sets them for a data set of 4 frames
    model.generate([clip, asked[1]])
    frames = {"nframes": 4, "max_frames": 4}
    assert messages[2]["content"][0] == {"type": "video", "video": "data/example_video.mp4", **frames}
    model.generate([{**clip, "nframes": 3}, asked[1]])
    assert messages[3]["content"][0] == {"type": "video", "video": "data/example_video.mp4", "nframes": 3}
    answer = {"role": "assistant", "content": [{"type": "text", "value": "blue"}]}
    turns = [{"role": "user", "content": [picture, asked[0]]}, answer]
    assert model.chat([*turns, {"role": "user", "content": [asked[0]]}]) == "blue"


def test_every_example_is_short_and_run_here():
    programs = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert programs.pop("lmms_eval_adapter") and programs.pop("vlmeval_adapter")
    assert set(programs) == {"pipeline", "streaming", "batches", "sessions", "realtime", "heat_maps"}
    assert all(len(text.splitlines()) < 30 for text in programs.values())
