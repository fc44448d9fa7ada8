"""install_into.py when interrupted, with links instead of copies, with tied weights, and the Auto classes it adds."""

import json
import os
import signal
import threading

import pytest
from conftest import ROOT
from safetensors.torch import save_file
from test_install import (  # noqa: F401 - a fixture among them
    auto_map,
    backups,
    downloaded,
    edit_json,
    installer,
    snapshot,
)
from tiny import make_model


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, even if the tests were started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [0, 11], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_writing_undoes_all_changes(downloaded, monkeypatch, capsys, listening, at, when):  # noqa: F811
    before, put, written = snapshot(downloaded), installer.put, []

    def interrupted(path, content, link):
        if len(written) == at and when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        put(path, content, link)
        written.append(path)
        if len(written) == at + 1 and when == "after":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(installer, "put", interrupted)
    assert installer.main([str(downloaded), "--no-check"]) == 130
    assert capsys.readouterr().err == "install_into.py: interrupted, nothing was changed\n"
    assert snapshot(downloaded) == before and not backups(downloaded) and len(written) >= at


def test_ctrl_c_during_the_check_undoes_all_changes(downloaded, monkeypatch, capsys, listening):  # noqa: F811
    before = snapshot(downloaded)
    monkeypatch.setattr(installer, "check_folder", lambda folder: os.kill(os.getpid(), signal.SIGINT))
    assert installer.main([str(downloaded)]) == 130
    assert "nothing was changed" in capsys.readouterr().err
    assert snapshot(downloaded) == before and not backups(downloaded)


def test_a_second_ctrl_c_does_not_stop_undoing(downloaded, monkeypatch, capsys, listening):  # noqa: F811
    before, replace, undone = snapshot(downloaded), os.replace, []

    def impatient(source, target):
        if undone:
            os.kill(os.getpid(), signal.SIGINT)
        replace(source, target)

    def check(folder):
        undone.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(installer, "check_folder", check)
    monkeypatch.setattr(installer.os, "replace", impatient)
    assert installer.main([str(downloaded)]) == 130
    assert snapshot(downloaded) == before and not backups(downloaded)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_undoing_works_on_another_thread(downloaded, monkeypatch):  # noqa: F811
    before, codes = snapshot(downloaded), []

    def check(folder):
        raise installer.InstallError("does not load")

    monkeypatch.setattr(installer, "check_folder", check)
    thread = threading.Thread(target=lambda: codes.append(installer.main([str(downloaded)])))
    thread.start()
    thread.join(60)
    assert codes == [1] and snapshot(downloaded) == before


def test_links_replace_copies_and_are_kept(downloaded, capsys):  # noqa: F811
    assert installer.main([str(downloaded), "--no-check"]) == 0
    names = installer.code_files()
    assert not any((downloaded / name).is_symlink() for name in names)
    capsys.readouterr()
    assert installer.main([str(downloaded), "--link", "--no-check"]) == 0
    shown = capsys.readouterr().out
    assert all((downloaded / name).is_symlink() and (downloaded / name).resolve() == ROOT / name for name in names)
    assert shown.count("replace ") == len(names) and shown.count("link to") == len(names)
    linked = snapshot(downloaded)
    for options in ([], ["--link"]):
        assert installer.main([str(downloaded), "--no-check", *options]) == 0
        assert snapshot(downloaded) == linked


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_missing(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    if tied:
        assert installer.check_weights(tmp_path, model.config, model) == [
            f"weights: names and shapes of all {len(weights)} tensors match"
        ]
        weights.pop("model.language_model.embed_tokens.weight")
        save_file(weights, tmp_path / "model.safetensors")
    missing = "model.language_model.embed_tokens.weight" if tied else "lm_head.weight"
    with pytest.raises(installer.InstallError, match=f"do not fit this model:\n  missing: {missing}$"):
        installer.check_weights(tmp_path, model.config, model)


def test_all_auto_classes_and_code_files_are_added(downloaded):  # noqa: F811
    edit_json(
        downloaded / "config.json",
        lambda config: config.update(auto_map={"AutoConfig": "configuration_moss_vl.MossVLConfig"}),
    )
    assert installer.main([str(downloaded), "--no-check"]) == 0
    assert auto_map(downloaded, "config.json") == auto_map(ROOT, "config.json")
    assert {"AutoModelForMultimodalLM", "AutoModelForVision2Seq"} <= auto_map(downloaded, "config.json").keys()
    assert {"conversation.py", "options.py"} <= set(installer.code_files())
    assert json.loads((ROOT / "checkpoints/moss-vl-nano/config.json").read_text())["auto_map"] == auto_map(
        ROOT, "config.json"
    )
