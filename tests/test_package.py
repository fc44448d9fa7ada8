"""The installed package `moss_vl`: its wheel, folders that load by its code, other processes, and its commands.

The tests of this file start processes whose `moss_vl` is the installed one, away from the checkout. This process loads
the same folders as remote code.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from cross_version import load_checkpoint
from safetensors.torch import load_file

from moss_vl import infer
from moss_vl.configuration_moss_vl import AUTO_MODELS
from moss_vl.tools import commands, install_into, quantize


NANO = ROOT / "checkpoints/moss-vl-nano"
CODE_FILES = install_into.code_files()
PHOTO, VIDEO = str(ROOT / "data/example_image.jpg"), str(ROOT / "data/example_video.mp4")
NOT_SOURCES = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "media", "golden")
BUILD = """\
import sys
from setuptools import build_meta
sys.argv[1:] = []
print(getattr(build_meta, 'build_' + {kind!r})({folder!r}))
"""


# Started with PYTHONPATH=SITE, and with a folder for remote code that has to stay absent.
LOAD = """
import json, sys
import torch
from safetensors.torch import save_file
import moss_vl
import transformers
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

folders, photo, video, out, auto_names = json.loads(sys.argv[1])
for name, folder in folders.items():
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor(text="<|image|><|video|>What happens?", images=photo, videos=video, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.contiguous()
    save_file({"logits": logits, "pixel_values": inputs["pixel_values"]}, f"{out}/{name}.safetensors")
    model.save_pretrained(f"{out}/{name}")
    processor.save_pretrained(f"{out}/{name}")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        autos = [getattr(transformers, auto) for auto in auto_names if hasattr(transformers, auto)]
        models = [auto.from_config(config) for auto in autos]
        parts = [transformers.AutoModel.from_config(part) for part in (config.text_config, config.vision_config)]
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    videos = processor.video_processor
    if not transformers.__version__.startswith("4."):  # that of 4.57 needs torchvision
        videos = AutoVideoProcessor.from_pretrained(folder)  # as pipelines load it
    loaded = [config, processor, videos, images, model, *models, *parts]
    print(json.dumps([name, sorted({f"{type(one).__module__}.{type(one).__name__}" for one in loaded})]))
    assert type(transformers.AutoTokenizer.from_pretrained(folder)).__name__.startswith("Qwen2Tokenizer")
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""

SEND = """
import json, pickle, sys
import torch
from multiprocessing import get_context


def answer(pickled):
    processor, model, cache, ids, states = pickle.loads(pickled)
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=model.fork_cache(cache)).logits
    query = {"prompt": "And the square?", "generate_kwargs": {"max_new_tokens": 8}}
    text = model.offline_batch_generate(processor, [query], session_states=states)["results"][0]["text"]
    return logits.numpy(), text, [name for name in sys.modules if name.startswith("transformers_modules")]


if __name__ == "__main__":
    import moss_vl
    from transformers import AutoModelForCausalLM, AutoProcessor

    folder, photo = json.loads(sys.argv[1])
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    query = {"images": [photo], "prompt": "What color is the star?", "generate_kwargs": {"max_new_tokens": 8}}
    states = model.offline_batch_generate(processor, [query], keep_cache=True)["session_states"]
    assert states[0].has_cache
    inputs = processor(text="<|image|>What", images=photo, return_tensors="pt")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    pickled = pickle.dumps((processor, model, cache, torch.tensor([[5, 6]]), states))
    with get_context("spawn").Pool(1) as pool:
        there = pool.apply(answer, (pickled,))
    here = answer(pickled)
    assert (there[0] == here[0]).all() and there[1] == here[1] and there[1]
    assert there[2] == here[2] == []
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the checkout, in which a build may write. Its checkpoint is a file of one byte."""
    folder = shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "moss-vl", symlinks=True, ignore=NOT_SOURCES)
    (folder / "checkpoints/moss-vl-nano/model.safetensors").write_bytes(b"x")
    return folder


def build(sources, kind: str, folder: Path) -> Path:
    """Builds a "wheel", an "editable" one or an "sdist" by the build backend that pyproject.toml names."""
    script = BUILD.format(kind=kind, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder into which pip installed the wheel."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def start(site, tmp_path):
    """Runs Python in a process that knows the installed package only."""

    def run(*arguments, path=site):
        environment = {**os.environ, "PYTHONPATH": str(path), "HF_MODULES_CACHE": str(tmp_path / "remote-code")}
        command = [sys.executable, *map(str, arguments)]
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}  # no questions are answered
        done = subprocess.run(command, **options, env=environment, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    yield run


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def foreign_folder(folder):
    """The small checkpoint with code that fails when it is run."""
    shutil.copytree(NANO, folder, symlinks=False)
    for name in CODE_FILES:
        (folder / name).write_text("raise RuntimeError('the code of the folder was run')\n")
    return folder


def untouched(folder):
    """As a released folder: no class for image-text-to-text, and references to another repository."""
    foreign_folder(folder)
    edit_json(folder / "config.json", lambda config: config["auto_map"].pop("AutoModelForImageTextToText"))
    for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        edit_json(folder / name, lambda file: file.update(auto_map=at_the_hub(file["auto_map"])))


def at_the_hub(auto_map):
    return {auto: f"owner/name--{reference}" for auto, reference in auto_map.items()}


def without_code(folder):
    """No code, and no auto_map: only the names of classes."""
    foreign_folder(folder)
    for name in CODE_FILES:
        (folder / name).unlink()
    for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        edit_json(folder / name, lambda file: file.pop("auto_map"))


def of_other_classes(folder):
    """The code of somebody else, with other names."""
    foreign_folder(folder)
    others = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_moss_vl.XModel"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=others))


def saved_anew(folder):
    """As a tuned checkpoint."""
    processor, model = load_checkpoint(NANO)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


FOLDERS = {make.__name__: make for make in (untouched, without_code, of_other_classes, saved_anew)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("folders")
    for name, make in FOLDERS.items():
        make(parent / name)
    return {name: str(parent / name) for name in FOLDERS}


@pytest.fixture(scope="module")
def expected():
    """Pixels and logits of the small checkpoint, by remote code."""
    processor, model = load_checkpoint(NANO)
    assert type(model).__module__.startswith("transformers_modules.")
    return observe(processor, model)


def observe(processor, model):
    inputs = processor(text="<|image|><|video|>What happens?", images=PHOTO, videos=VIDEO, return_tensors="pt")
    with torch.no_grad():
        return {"logits": model(**inputs).logits, "pixel_values": inputs["pixel_values"]}


def test_the_wheel_holds_the_code_and_no_checkpoint(wheel):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    modules = {name for path in ROOT.glob("*.py") if (name := path.name) != "setup.py"}
    modules |= {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    settings = {path.name for path in ROOT.glob("*.json")}
    pictures = {path for question in quantize.QUESTIONS for path in question.get("images", ())}
    package = {f"moss_vl/{name}" for name in {"__init__.py", *modules, *settings, *pictures}}
    assert modules >= set(CODE_FILES) and settings >= {"config.json", "preprocessor_config.json"}
    others = {name for name in names if not name.startswith("moss_vl-1")}
    assert others == package
    assert sum(info.file_size for info in archive.infolist()) < 3_000_000


def test_a_source_distribution_makes_the_same_wheel(sources, wheel, tmp_path):
    archive = build(sources, "sdist", tmp_path)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    again = build(tmp_path / "unpacked" / archive.name.removesuffix(".tar.gz"), "wheel", tmp_path)
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_any_folder_loads_by_the_installed_code_and_is_saved_with_it(start, folders, expected, tmp_path):
    """Also with code that must not run; the saved folder then loads as remote code. All numbers are equal."""
    arguments = json.dumps([folders, PHOTO, VIDEO, str(tmp_path), AUTO_MODELS])
    done = start("-c", LOAD, arguments)
    assert done.returncode == 0, done.stderr
    classes = {
        "configuration_moss_vl.MossVLConfig",
        "decoder.MossVLTextModel",
        "image_processing_moss_vl.MossVLImageProcessor",
        "modeling_moss_vl.MossVLForConditionalGeneration",
        "processing_moss_vl.MossVLProcessor",
        "video_processing_moss_vl.MossVLVideoProcessor",
        "vision_encoder.MossVLVisionModel",
    }
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [[name, sorted(f"moss_vl.{one}" for one in classes)] for name in folders]
    for name in folders:
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        saved = tmp_path / name
        assert all((saved / file).read_bytes() == (ROOT / file).read_bytes() for file in CODE_FILES), name
        again = observe(*load_checkpoint(saved))
        assert all(torch.equal(again[key], expected[key]) for key in expected), name
    assert not (tmp_path / "remote-code").exists(), "code of a folder was copied"


def test_models_processors_and_caches_are_sent_to_other_processes(start, tmp_path):
    script = tmp_path / "send.py"
    script.write_text(SEND)
    done = start(script, json.dumps([str(NANO), PHOTO]))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "remote-code").exists()


PIPELINES = """
import sys
import moss_vl
from moss_vl.pipeline_moss_vl import MossVLTextGenerationPipeline
from transformers import pipeline

folder, photo = sys.argv[1:]
chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": sys.stdin.read()}]}]
pipe = pipeline("image-text-to-text", model=folder, dtype="float32")
print(pipe(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"])
texts = pipeline("text-generation", model=folder, pipeline_class=MossVLTextGenerationPipeline)
print(repr(texts("A star is", max_new_tokens=2)[0]["generated_text"]))
try:
    texts(chat)
except ValueError as error:
    print(error)
"""


def test_pipelines_of_the_installed_package(site, folders, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PIPELINES, folders["without_code"], PHOTO],
        input="What color is the star?",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    answer, text, refusal = done.stdout.splitlines()
    assert answer == "blue" and text.startswith("'A star is") and "expected text alone" in refusal


def test_the_examples_of_the_page_run(start, tmp_path):
    page = (ROOT / "docs/package.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "examples.py"
    code = ["import os", f"os.chdir({str(ROOT)!r})", *examples, "print(answer, repr(text), sep='\\n')"]
    script.write_text("\n".join(code))
    answer, text = start(script).stdout.splitlines()
    assert answer == "blue" and text.startswith("'A star is")


# An editable install


EDITABLE = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
import moss_vl, transformers
import moss_vl.tools.commands
assert importlib.util.find_spec("xrope") is importlib.util.find_spec("tools") is None
assert type(transformers.AutoConfig.from_pretrained(sys.argv[2])) is moss_vl.configuration_moss_vl.MossVLConfig
print(moss_vl.__path__[0], moss_vl.tools.commands.__file__, moss_vl.xrope.__file__, sep="\\n")
"""


def test_an_editable_install_registers_the_checkout(sources, start, tmp_path):
    """`pip install -e .`: `moss_vl` is the checkout, and no other name of it can be imported."""
    shutil.unpack_archive(build(sources, "editable", tmp_path), tmp_path / "site", "zip")
    done = start("-c", EDITABLE, tmp_path / "site", NANO, path="")
    assert done.returncode == 0, done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == [
        sources,
        sources / "tools/commands.py",
        sources / "xrope.py",
    ]


# Commands


@pytest.fixture
def moss_vl_command(start, site):
    """Runs the script that pip wrote for the entry point."""

    def run(*arguments):
        return start(site / "bin/moss-vl", *arguments)

    return run


def test_infer_answers_without_running_the_code_of_the_folder(moss_vl_command, folders):
    options = ("--dtype", "float32", "--checkpoint", folders["of_other_classes"])
    done = moss_vl_command("infer", PHOTO, "-p", "What color is the star?", *options)
    assert (done.returncode, done.stdout.strip()) == (0, "blue"), done.stderr


def test_serve_is_the_server(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["serve", "--help"])
    assert end.value.code == 0 and "usage: serve.py" in capsys.readouterr().out


def test_quantize_is_the_tool(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["quantize", "--help"])
    assert end.value.code == 0 and "--to" in capsys.readouterr().out


def test_live_takes_its_source_first(capsys):
    assert commands.main(["live", "no-such-source.mp4", "--checkpoint", str(NANO)]) == 2
    assert "no-such-source.mp4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.main(["live", "--help"])
    assert "--live SOURCE" in capsys.readouterr().out


def test_a_package_without_the_small_checkpoint_asks_for_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(infer, "NANO", tmp_path / "not-installed")
    with pytest.raises(SystemExit):
        commands.main(["infer", PHOTO])
    assert "required: --checkpoint" in capsys.readouterr().err


def test_install_writes_the_installed_code_and_checks_it(moss_vl_command, folders, tmp_path):
    folder = shutil.copytree(folders["of_other_classes"], tmp_path / "downloaded")
    done = moss_vl_command("install", folder)
    assert done.returncode == 0, done.stderr
    assert "model: MossVLForConditionalGeneration" in done.stdout and "weights: names and shapes of all" in done.stdout
    assert all((folder / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE_FILES)
    assert "transformers_modules" in type(load_checkpoint(folder)[1]).__module__


@pytest.mark.parametrize("arguments, code, message", [
    (["--help"], 0, ""),
    ([], 2, "moss-vl: no command given"),
    (["inver"], 2, "moss-vl: unknown command 'inver'"),
])  # fmt: skip
def test_usage_of_the_command(capsys, arguments, code, message):
    assert commands.main(arguments) == code
    out, err = capsys.readouterr()
    assert message in err and ("  infer  " in out) == (code == 0) and ("  infer  " in err) == (code == 2)
