"""The package files import each other in one direction, and models stay apart from processors."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

from moss_vl.tools.install_into import code_files


def used_imports(name: str) -> set[str]:
    """The package files whose names a file uses. Imports that only make transformers copy a file do not count."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {f"{node.module}.py" for node in imports if used & {alias.asname or alias.name for alias in node.names}}


IMPORTS = {name: used_imports(name) for name in code_files()}


def reached(name: str) -> set[str]:
    files, queue = set(), [name]
    while queue:
        queue += sorted(IMPORTS[queue.pop()] - files)
        files |= set(queue)
    return files


def test_imports_have_no_cycle():
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert set(order) == set(IMPORTS) and "checks.py" in order[: len(order) // 2]


def test_models_import_no_processor_and_processors_no_model():
    pixels = {name for name in IMPORTS if name.startswith(("image_", "video_", "processing", "processor", "clip"))}
    layers = {"modeling_moss_vl.py", "decoder.py", "vision_encoder.py", "attention.py", "cache_layers.py", "xrope.py"}
    assert len(pixels) >= 8 and layers < set(IMPORTS)
    assert reached("modeling_moss_vl.py") & pixels == set()
    assert reached("processing_moss_vl.py") & layers == set()
    assert reached("processing_moss_vl.py") >= {"image_reading.py", "video_files.py", "options.py"}


def test_the_configuration_imports_nothing_at_run_time():
    assert IMPORTS["configuration_moss_vl.py"] == set()
