#!/usr/bin/env python3
"""Installs the MOSS-VL code files into a checkpoint folder: python tools/install_into.py CHECKPOINT

Code files are added or replaced, missing `auto_map` entries are added to the JSON files, and replaced files are kept
in a backup folder. Weights, tokenizer and settings are not changed. Then the folder is loaded, with the model on the
meta device: the weights, 22 GB for the 11B model, are not read. If loading fails, all changes are undone.
"""

import argparse
import ast
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


PROJECT = Path(__file__).resolve().parents[1]
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")


class InstallError(Exception):
    """An error that the user can fix. Only its message is printed."""


@dataclass(frozen=True)
class Change:
    """One file to write: either its new `content`, or the target of a `link`."""

    name: str
    verb: str  # "add", "replace" or "edit"
    remark: str
    content: bytes = b""
    link: Path | None = None


def code_files() -> list[str]:
    """The project's .py files that a checkpoint needs: those that auto_map names, and all that they import relatively.

    Imports for type checkers count as well, because transformers copies these files too.
    """
    files = sorted(
        {
            reference.split(".")[0] + ".py"
            for name in ("config.json", *PROCESSOR_FILES)
            for reference in read_json(PROJECT / name)["auto_map"].values()
        }
    )
    for name in files:  # the loop appends the imports that it finds
        if not (PROJECT / name).is_file():
            raise InstallError(f"{PROJECT}: incomplete, {name} is missing")
        for node in ast.walk(ast.parse((PROJECT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and f"{node.module}.py" not in files:
                files.append(f"{node.module}.py")
    return files


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InstallError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InstallError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def verify_checkpoint(folder: Path) -> None:
    """Raises InstallError unless `folder` is the folder of a MOSS-VL checkpoint."""
    if not folder.is_dir():
        raise InstallError(
            f"{folder}: not a folder. Expected the folder of a checkpoint; download a released one first, for example "
            "with: hf download NAME --local-dir FOLDER"
        )
    if folder.resolve() == PROJECT:
        raise InstallError(f"{folder}: this is the project's own folder, where the code files already are")
    if not (folder / "config.json").is_file():
        raise InstallError(f"{folder}: holds no config.json, so it is not a checkpoint's folder")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "moss_vl":
        raise InstallError(f"{folder / 'config.json'}: model_type is {model_type!r}, expected 'moss_vl'")


# planning; nothing is written here


def plan_changes(folder: Path, link: bool) -> list[Change]:
    """The changes after which `folder` uses this project's code."""
    changes = [plan_code_file(folder, name, link) for name in code_files()]
    changes += [plan_auto_map(folder, "config.json", read_json(PROJECT / "config.json")["auto_map"])]
    if (folder / "processor_config.json").is_file():  # transformers 5 saves both processors in one file
        changes.append(plan_processor_config(folder))
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            changes.append(plan_auto_map(folder, name, read_json(PROJECT / name)["auto_map"]))
        elif not (folder / "processor_config.json").is_file():
            changes.append(Change(name, "add", "the released settings", content=(PROJECT / name).read_bytes()))
    return [change for change in changes if change is not None]


def plan_code_file(folder: Path, name: str, link: bool) -> Change | None:
    source, target = PROJECT / name, folder / name
    if target.is_dir():
        raise InstallError(f"{target}: is a folder, expected a file")
    content = source.read_bytes()
    if target.is_file():
        if target.resolve() == source or (not link and target.read_bytes() == content):
            return None
    verb = "replace" if os.path.lexists(target) else "add"
    old = f"{target.stat().st_size:,} bytes before, " if target.is_file() else ""
    remark = f"{old}link to {source}" if link else f"{old}{len(content):,} bytes"
    return Change(name, verb, remark, content=b"" if link else content, link=source if link else None)


def plan_auto_map(folder: Path, name: str, wanted: dict) -> Change | None:
    config = read_json(folder / name)
    remarks = complete_auto_map(config, wanted, folder / name)
    return edit(name, config, remarks)


def plan_processor_config(folder: Path) -> Change | None:
    name = "processor_config.json"
    config = read_json(folder / name)
    image_map, video_map = (read_json(PROJECT / file)["auto_map"] for file in PROCESSOR_FILES)
    parts = [(config, {"AutoProcessor": image_map["AutoProcessor"]})]
    parts += [
        (config[key], {auto: mapping[auto]})
        for key, auto, mapping in (
            ("image_processor", "AutoImageProcessor", image_map),
            ("video_processor", "AutoVideoProcessor", video_map),
        )
        if key in config
    ]
    remarks = [remark for part, wanted in parts for remark in complete_auto_map(part, wanted, folder / name)]
    return edit(name, config, remarks)


def edit(name: str, config: dict, remarks: list[str]) -> Change | None:
    if not remarks:
        return None
    content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return Change(name, "edit", f"auto_map {', '.join(remarks)}", content=content.encode("utf-8"))


def complete_auto_map(config: dict, wanted: dict, path: Path) -> list[str]:
    """Adds the missing entries of `wanted` to the auto_map of `config`; returns a remark for each.

    An existing entry is kept if the code files define the class that it names. An entry that names another class, or
    code of another repository ("owner/name--module.Class"), is replaced.
    """
    auto_map = config.setdefault("auto_map", {})
    if not isinstance(auto_map, dict):
        raise InstallError(f"{path}: auto_map is {type(auto_map).__name__}, expected an object")
    remarks = []
    for auto_class, reference in wanted.items():
        present = auto_map.get(auto_class)
        if present is None:
            remarks.append(f"gains {auto_class}")
        elif not is_provided(present):
            remarks.append(f"{auto_class} is {reference}, not {present}")
        else:
            continue
        auto_map[auto_class] = reference
    return remarks


def is_provided(reference) -> bool:
    """Whether one of the code files defines or imports the `module.Class` of the reference."""
    if not isinstance(reference, str) or reference.count(".") != 1 or "--" in reference:
        return False
    module, name = reference.split(".")
    if not (PROJECT / f"{module}.py").is_file():
        return False
    names = set()
    for node in ast.parse((PROJECT / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return name in names


# writing


class Transaction:
    """Writes changes into a folder. `undo` restores its previous files and links."""

    def __init__(self, folder):
        self.folder = folder
        self.backup = None
        self.done = []  # (name, whether it existed, its link target or None)

    def apply(self, changes):
        replaced = [change.name for change in changes if os.path.lexists(self.folder / change.name)]
        if replaced:
            self.backup = Path(
                tempfile.mkdtemp(prefix=time.strftime(".moss-vl-backup-%Y%m%d-%H%M%S-"), dir=self.folder)
            )
        for name in replaced:
            old = self.folder / name
            shutil.copy2(old, self.backup / name, follow_symlinks=old.exists())  # a broken link is kept as a link
        for change in changes:
            path = self.folder / change.name
            existed = os.path.lexists(path)
            self.done.append((change.name, existed, os.readlink(path) if path.is_symlink() else None))
            put(path, change.content, change.link)

    def undo(self):
        with uninterrupted():
            self._undo()

    def _undo(self):
        for name, existed, link in reversed(self.done):
            path = self.folder / name
            if not existed:
                path.unlink(missing_ok=True)
            elif link is not None:
                put(path, b"", link)
            else:
                os.replace(self.backup / name, path)
        if self.backup is not None:
            shutil.rmtree(self.backup)


@contextmanager
def uninterrupted():
    """Ignores Ctrl-C within the context: a second one would leave the folder half restored."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler if handler is not None else signal.SIG_DFL)


def put(path: Path, content: bytes, link) -> None:
    """Writes a temporary file and moves it to `path` in one step.

    A link at `path` is replaced, and its target is not changed: in the cache of huggingface_hub, revisions share it.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        if link is not None:
            fresh.symlink_to(link)
        else:
            fresh.write_bytes(content)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


# checking


def check_folder(folder: Path) -> list[str]:
    """Loads configuration, processor and, on the meta device, model of the folder; returns lines of findings.

    Raises InstallError if something does not load or does not fit the weights.
    """
    with tempfile.TemporaryDirectory() as cache:
        # transformers reads the variable when it is imported. The user's cache is not changed.
        os.environ["HF_MODULES_CACHE"] = cache
        try:
            import torch
            import transformers
            from transformers.dynamic_module_utils import get_class_from_dynamic_module
        except ImportError as error:
            raise InstallError(
                f"cannot check the folder: {error}. Install what requirements.txt lists, or use --no-check"
            ) from error
        transformers.logging.set_verbosity_error()
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
            for name, reference in config.auto_map.items():
                if name.startswith("AutoModel"):
                    get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        except Exception as error:  # depends on the files of the folder
            raise InstallError(f"{folder}: the model does not load: {error}") from error
        parameters = sum(parameter.numel() for parameter in model.parameters())
        line = f"model: {type(model).__name__}, {len(model.state_dict())} tensors, {parameters:,} parameters"
        return [line, *check_processor(folder, config), *check_weights(folder, config, model)]


def check_processor(folder: Path, config) -> list[str]:
    from transformers import AutoProcessor

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return ["processor: not checked, the folder holds no tokenizer"]
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except Exception as error:  # depends on the files of the folder
        raise InstallError(f"{folder}: the processor does not load: {error}") from error
    lines = [f"processor: {type(processor).__name__}, {len(processor.tokenizer)} tokens"]
    vision = config.vision_config
    pairs = [
        (type(part).__name__, name, getattr(part, name), expected)
        for part in (processor.image_processor, processor.video_processor)
        for name, expected in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        )
    ]
    pairs += [
        ("the tokenizer", name, getattr(processor, name), getattr(config, name))
        for name in ("image_token_id", "video_token_id")
    ]
    lines += [
        f"warning: {name} is {got} in {owner}, {expected} in config.json; they belong to different models"
        for owner, name, got, expected in pairs
        if got != expected
    ]
    return lines


def check_weights(folder: Path, config, model) -> list[str]:
    """Compares names and shapes in the safetensors headers with the model's. Additional tensors are a warning."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, absent = read_weight_shapes(folder)
    if not found:
        return ["weights: not checked, the folder holds no safetensors file"]
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys() - tied)]
    problems += [
        f"{name}: {shape} in the file, {expected[name]} in the model"
        for name, shape in sorted(found.items())
        if shape is not None and expected.get(name, shape) != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InstallError(f"{folder}: the weights do not fit this model:\n  " + "\n  ".join(problems[:10]) + more)
    lines = [f"weights: names and shapes of all {len(found)} tensors match"]
    if absent:
        lines = [f"weights: names match; {len(absent)} files are missing, first {absent[0]}"]
    if found.keys() - expected.keys():
        lines.append(
            f"warning: the model has none of these tensors: {', '.join(sorted(found.keys() - expected.keys()))}"
        )
    return lines


def read_weight_shapes(folder: Path) -> tuple[dict[str, tuple | None], list[str]]:
    """({tensor name: shape, None if its file is absent}, names of absent files), from the headers alone."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    file_of = read_json(index).get("weight_map", {}) if index.is_file() else {}
    files = sorted(set(file_of.values())) or ["model.safetensors"]
    absent = [name for name in files if not (folder / name).is_file()]
    found = {name: None for name, file in file_of.items() if file in absent}
    for name in files:
        if name in absent:
            continue
        try:
            with safe_open(str(folder / name), framework="numpy") as weights:
                found.update((key, tuple(weights.get_slice(key).get_shape())) for key in weights.keys())
        except SafetensorError as error:
            raise InstallError(f"{folder / name}: cannot be read: {error}") from error
    return found, absent


# the command


def install(folder: Path, link: bool = False, dry_run: bool = False, check: bool = True) -> None:
    verify_checkpoint(folder)
    changes = plan_changes(folder, link)
    print(f"{folder}:" + ("" if changes else " already has these code files and entries"))
    for change in changes:
        print(f"  {change.verb:8}{change.name:34}{change.remark}")
    if dry_run:
        print("dry run: nothing was changed")
        return
    transaction = Transaction(folder)
    try:
        transaction.apply(changes)
        lines = check_folder(folder) if check else ["not checked"]
    except BaseException as error:
        transaction.undo()
        if isinstance(error, (InstallError, OSError)) and changes:
            raise InstallError(f"{error}\nall changes to {folder} were undone") from error
        raise
    if transaction.backup is not None:
        print(f"the replaced files are kept in {transaction.backup}")
    print("\n".join(lines))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Install the MOSS-VL code files into a checkpoint folder and check that it loads. Weights, "
        "tokenizer and settings are not changed; replaced files are kept in a backup folder inside the checkpoint.",
        epilog="Exit codes: 0 done, 1 failed and nothing changed, 2 wrong usage, 130 interrupted and nothing changed.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder that holds a MOSS-VL config.json")
    parser.add_argument("--dry-run", action="store_true", help="show what would be changed and stop")
    parser.add_argument(
        "--link", action="store_true", help="make symbolic links to the project's files instead of copies"
    )
    parser.add_argument("--no-check", action="store_true", help="do not load the folder after the changes")
    arguments = parser.parse_args(argv)
    try:
        install(arguments.checkpoint, link=arguments.link, dry_run=arguments.dry_run, check=not arguments.no_check)
    except (InstallError, OSError) as error:
        print(f"install_into.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_into.py: interrupted, nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
