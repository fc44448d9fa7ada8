"""Scripts of the project as modules, for tests that call their functions."""

import importlib.util
import sys

from conftest import ROOT


def load_script(path):
    """The module of the script at `path`, relative to the project's root."""
    name = (ROOT / path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
