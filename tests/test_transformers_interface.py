"""The table of docs/transformers.md: its names exist in the installed transformers, and it is complete."""

import ast
import importlib.util
import inspect
import re

import pytest
import transformers
from conftest import ROOT
from packaging.version import Version

from moss_vl.tools.install_into import code_files


INSTALLED = Version(transformers.__version__)
NOT_OURS = {"_abc_impl"}  # set by Python on subclasses of abstract classes
EXISTS = {
    "4 and 5": lambda: True,
    "4 only": lambda: INSTALLED < Version("5.0"),
    "5 only": lambda: INSTALLED >= Version("5.0"),
    "from 5.24": lambda: INSTALLED >= Version("5.24"),
}


def read_table() -> list[tuple[str, str, str]]:
    """(name, versions, files) of each name."""
    lines = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return [(name, row[1], row[2]) for row in rows for name in re.findall(r"`([\w.]+)`", row[0])]


TABLE = read_table()
NAMES = {name for name, _, _ in TABLE}


def parent_of(name: str):
    """The module or class of a name, and its last part.

    Raises:
        AttributeError: if there is no such module or class.
    """
    *parts, last = name.split(".")
    found = transformers
    for part in parts:
        if hasattr(found, "__path__") and importlib.util.find_spec(f"{found.__name__}.{part}"):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    return found, last


def exists(name: str) -> bool:
    try:
        parent, last = parent_of(name)
    except AttributeError:
        return False
    if hasattr(parent, last):
        return True
    # Attributes of instances are set in the source of the class.
    return inspect.isclass(parent) and re.search(rf"\bself\.{last}\b", inspect.getsource(parent)) is not None


@pytest.mark.parametrize("name, versions, _", TABLE)
def test_a_name_exists_in_its_versions_alone(name, versions, _):
    assert exists(name) == EXISTS[versions]()


@pytest.mark.parametrize("name, _, files", TABLE)
def test_the_files_of_a_row_exist(name, _, files):
    for file in re.findall(r"`([\w.]+)`", files):
        assert (ROOT / file).is_file()


def package_modules() -> list:
    return [importlib.import_module(f"moss_vl.{name.removesuffix('.py')}") for name in sorted(code_files())]


def overrides(private: bool) -> set[tuple[type, str]]:
    """(class of transformers, name) of what classes of the package override."""
    found = set()
    classes = {value for module in package_modules() for value in vars(module).values() if inspect.isclass(value)}
    for final in classes:
        for index, ours in enumerate(final.__mro__):
            if not ours.__module__.startswith("moss_vl"):
                continue
            for name in vars(ours).keys() - NOT_OURS:
                if name.startswith("__") or name.startswith("_") != private:
                    continue
                bases = [base for base in final.__mro__[index + 1 :] if base.__module__.startswith("transformers")]
                found |= {(base, name) for base in bases[::-1] if name in vars(base)}
    return found


def test_every_override_of_a_private_name_is_in_the_table():
    found = overrides(private=True)
    assert {name for _, name in found} >= {"_init_weights", "_expand_inputs_for_generation"}
    listed = [parent_of(name) for name in NAMES if exists(name)]
    missing = [
        f"{base.__name__}.{name}"
        for base, name in found
        if not any(name == known and issubclass(parent, base) for parent, known in listed)
    ]
    assert not missing


def imports_of_submodules() -> set[str]:
    found = set()
    for file in code_files():
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                found |= {f"{node.module.removeprefix('transformers.')}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("transformers.")}
    return found


def test_every_import_from_a_submodule_is_in_the_table():
    found = imports_of_submodules()
    assert "modeling_utils.ALL_ATTENTION_FUNCTIONS" in found
    assert not found - NAMES
