"""install_into.py on downloaded, incomplete, damaged and foreign folders, and in the cache of huggingface_hub."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import transformers.dynamic_module_utils  # noqa: F401 - before a check changes its cache
from conftest import ROOT
from safetensors.torch import load_file, save_file

from moss_vl.tools import install_into


NANO = ROOT / "checkpoints/moss-vl-nano"
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja")
OLD_CODE = "class MossVLForConditionalGeneration:\n    pass  # an older version\n"

installer = install_into


@pytest.fixture
def downloaded(tmp_path):
    """A downloaded checkpoint with older code, and JSON files without some auto_map entries."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in (*SETTINGS, *TOKENIZER, "model.safetensors"):
        shutil.copyfile(NANO / name, folder / name)
    for name in ("modeling_moss_vl.py", "configuration_moss_vl.py"):
        (folder / name).write_text(OLD_CODE)
    edit_json(folder / "config.json", lambda config: config["auto_map"].pop("AutoModelForImageTextToText"))
    edit_json(folder / "preprocessor_config.json", lambda config: config.pop("auto_map"))
    return folder


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def auto_map(folder, name):
    return json.loads((folder / name).read_text())["auto_map"]


def snapshot(folder):
    """Path -> content or link target of everything in the folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def run_script(*arguments):
    """Runs the command in a new process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/install_into.py"), *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process, which saves the imports."""
    monkeypatch.setenv("HF_MODULES_CACHE", "")  # restored after the test

    def call(*arguments):
        code = installer.main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


def backups(folder):
    return list(folder.glob(".moss-vl-backup-*"))


def test_code_is_installed_and_replaced_files_are_kept(downloaded):
    weights = (downloaded / "model.safetensors").read_bytes()
    done = run_script(downloaded)
    assert done.returncode == 0, done.stderr
    for line in (
        "replace modeling_moss_vl.py",
        "add     processing_moss_vl.py",
        "gains AutoModelForImageTextToText",
        "gains AutoProcessor, gains AutoImageProcessor",
        "weights: names and shapes of all",
        "processor: MossVLProcessor",
    ):
        assert line in done.stdout
    for name in installer.code_files():
        assert (downloaded / name).read_bytes() == (ROOT / name).read_bytes()
    assert auto_map(downloaded, "config.json") == auto_map(ROOT, "config.json")
    assert auto_map(downloaded, "preprocessor_config.json") == auto_map(ROOT, "preprocessor_config.json")
    assert (downloaded / "model.safetensors").read_bytes() == weights
    (backup,) = backups(downloaded)
    assert sorted(path.name for path in backup.iterdir()) == [
        "config.json",
        "configuration_moss_vl.py",
        "modeling_moss_vl.py",
        "preprocessor_config.json",
    ]
    assert (backup / "modeling_moss_vl.py").read_text() == OLD_CODE
    assert str(backup) in done.stdout

    before = snapshot(downloaded)
    assert installer.main([str(downloaded), "--no-check"]) == 0
    assert snapshot(downloaded) == before


def test_weights_that_do_not_fit_undo_all_changes(downloaded, run):
    weights = load_file(downloaded / "model.safetensors")
    del weights["lm_head.weight"]
    weights["model.separator_token"] = weights["model.separator_token"][:7].contiguous()
    save_file(weights, downloaded / "model.safetensors")
    before = snapshot(downloaded)
    done = run(downloaded)
    assert done.returncode == 1
    assert "missing: lm_head.weight" in done.stderr
    assert "model.separator_token: (7,) in the file, (256,) in the model" in done.stderr
    assert "were undone" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(downloaded) == before and not backups(downloaded)


def test_a_contradictory_config_undoes_all_changes(downloaded, run):
    edit_json(downloaded / "config.json", lambda config: config["text_config"].update(cross_attention_layers=[0, 6]))
    before = snapshot(downloaded)
    done = run(downloaded)
    assert done.returncode == 1 and "does not load" in done.stderr and "Traceback" not in done.stderr
    assert snapshot(downloaded) == before and not backups(downloaded)


def test_missing_files_of_a_download_are_reported(downloaded, run):
    """There is an index without its files, no tokenizer, and no processor files."""
    names = list(load_file(downloaded / "model.safetensors"))
    for name in ("model.safetensors", *TOKENIZER, "preprocessor_config.json", "video_preprocessor_config.json"):
        (downloaded / name).unlink()
    index = {"weight_map": {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}}
    (downloaded / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run(downloaded)
    assert done.returncode == 0, done.stderr
    assert "2 files are missing, first model-0.safetensors" in done.stdout
    assert "the folder holds no tokenizer" in done.stdout
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (downloaded / name).read_bytes() == (ROOT / name).read_bytes()


def test_files_of_different_models_are_warned_of(downloaded, run):
    edit_json(downloaded / "preprocessor_config.json", lambda settings: settings.update(patch_size=14))
    edit_json(downloaded / "config.json", lambda config: config.update(image_token_id=3))
    weights = load_file(downloaded / "model.safetensors")
    save_file(
        weights | {"model.of_the_past": weights["model.separator_token"].clone()}, downloaded / "model.safetensors"
    )
    done = run(downloaded)
    assert done.returncode == 0, done.stderr
    assert "warning: patch_size is 14 in MossVLImageProcessor" in done.stdout
    assert "warning: image_token_id is 741 in the tokenizer, 3 in config.json" in done.stdout
    assert "warning: the model has none of these tensors: model.of_the_past" in done.stdout


def test_dry_run_changes_nothing(downloaded, capsys):
    before = snapshot(downloaded)
    assert installer.main([str(downloaded), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "replace modeling_moss_vl.py" in shown and "dry run" in shown
    assert snapshot(downloaded) == before


def test_a_failure_while_writing_undoes_all_changes(downloaded, monkeypatch, capsys):
    shutil.move(downloaded / "modeling_moss_vl.py", downloaded / "elsewhere.txt")
    (downloaded / "modeling_moss_vl.py").symlink_to("elsewhere.txt")
    (downloaded / "xrope.py").symlink_to("nowhere.txt")
    before = snapshot(downloaded)
    real, calls = installer.put, []

    def put(path, content, link):
        calls.append(path.name)
        if len(calls) == len(installer.code_files()) + 1:
            raise OSError(28, "No space left on device", str(path))
        real(path, content, link)

    monkeypatch.setattr(installer, "put", put)
    assert installer.main([str(downloaded), "--no-check"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(calls) > len(installer.code_files())
    assert snapshot(downloaded) == before and not backups(downloaded)


def test_files_of_the_hub_s_cache_are_not_written_through(downloaded, tmp_path):
    """In its snapshot folders, every file is a link to a blob that other revisions share."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(downloaded.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(os.path.join("..", "blobs", path.name))
    before = snapshot(blobs)
    assert installer.main([str(downloaded), "--no-check"]) == 0
    assert snapshot(blobs) == before
    assert not (downloaded / "modeling_moss_vl.py").is_symlink() and (downloaded / "model.safetensors").is_symlink()
    (backup,) = backups(downloaded)
    assert (backup / "modeling_moss_vl.py").read_text() == OLD_CODE


def test_link_makes_links(downloaded):
    assert installer.main([str(downloaded), "--link", "--no-check"]) == 0
    for name in installer.code_files():
        assert (downloaded / name).is_symlink() and (downloaded / name).resolve() == ROOT / name
    before = snapshot(downloaded)
    assert installer.main([str(downloaded), "--link", "--no-check"]) == 0
    assert snapshot(downloaded) == before


def test_auto_map_entries_are_kept_if_the_code_defines_them(downloaded):
    edit_json(
        downloaded / "config.json",
        lambda config: config["auto_map"].update(
            AutoModel="modeling_moss_vl.MossVLModel",
            AutoConfig="someone/moss--configuration_moss_vl.MossVLConfig",
            AutoModelForCausalLM="modeling_moss_vl.MossVLOfThePast",
            AutoTokenizer=["tokenization_x.X", None],
        ),
    )
    edit_json(
        downloaded / "preprocessor_config.json",
        lambda config: config.update(auto_map={"AutoImageProcessor": "processing_moss_vl.MossVLImageProcessor"}),
    )
    assert installer.main([str(downloaded), "--no-check"]) == 0
    assert auto_map(downloaded, "config.json") == auto_map(ROOT, "config.json") | {
        "AutoModel": "modeling_moss_vl.MossVLModel",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    assert auto_map(downloaded, "preprocessor_config.json") == {
        "AutoImageProcessor": "processing_moss_vl.MossVLImageProcessor",
        "AutoProcessor": "processing_moss_vl.MossVLProcessor",
    }


def test_processor_config_of_transformers_5_is_completed(downloaded, run):
    parts = {
        name: json.loads((downloaded / file).read_text())
        for name, file in (
            ("image_processor", "preprocessor_config.json"),
            ("video_processor", "video_preprocessor_config.json"),
        )
    }
    for part in parts.values():
        part.pop("auto_map", None)
    (downloaded / "processor_config.json").write_text(json.dumps({"processor_class": "MossVLProcessor", **parts}))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (downloaded / name).unlink()
    done = run(downloaded)
    assert done.returncode == 0, done.stderr
    assert "processor: MossVLProcessor" in done.stdout
    assert not (downloaded / "preprocessor_config.json").exists()
    completed = json.loads((downloaded / "processor_config.json").read_text())
    assert completed["auto_map"] == {"AutoProcessor": "processing_moss_vl.MossVLProcessor"}
    assert completed["video_processor"]["auto_map"] == {
        "AutoVideoProcessor": "video_processing_moss_vl.MossVLVideoProcessor"
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object, got list"),
        (
            lambda folder: edit_json(folder / "config.json", lambda c: c.update(model_type="qwen2")),
            "model_type is 'qwen2'",
        ),
        (lambda folder: edit_json(folder / "config.json", lambda c: c.update(auto_map=[])), "auto_map is list"),
        (lambda folder: (folder / "xrope.py").mkdir(), "is a folder, expected a file"),
    ],
)
def test_errors_name_the_problem_and_change_nothing(downloaded, damage, message, capsys):
    damage(downloaded)
    before = snapshot(downloaded)
    assert installer.main([str(downloaded)]) == 1
    assert message in capsys.readouterr().err
    assert snapshot(downloaded) == before


def test_the_project_folder_is_an_error(capsys):
    assert installer.main([str(ROOT)]) == 1
    assert "the project's own folder" in capsys.readouterr().err


def test_help_and_usage(tmp_path):
    """From another folder, without the package on the path."""
    command = [sys.executable, str(ROOT / "tools/install_into.py"), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    for word in ("CHECKPOINT", "--dry-run", "--link", "--no-check", "Exit codes"):
        assert word in shown.stdout
    assert run_script().returncode == 2
