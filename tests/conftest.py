"""Checks that the tests import this checkout, and keeps them off the network and out of the user's caches.

pyproject.toml puts the root and tests/ on the path of this process. PYTHONPATH puts the root on that of its children.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest


SCRATCH = Path(tempfile.mkdtemp(prefix="moss-vl-tests-"))  # of this process, removed at its exit
(SCRATCH / "tmp").mkdir()
os.environ["HF_HOME"] = str(SCRATCH / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with several threads

ROOT = Path(__file__).resolve().parent.parent
SHARED_GOLDEN = ROOT.parent / "shared" / "golden"
GOLDEN = SHARED_GOLDEN if SHARED_GOLDEN.is_dir() else ROOT / "tests" / "golden"

os.environ["PYTHONPATH"] = str(ROOT)


def pytest_configure(config):
    """Stops if `moss_vl` is another checkout, undoes what its import registers, and makes exceptions in threads
    failures instead of warnings."""
    import moss_vl

    (imported,) = moss_vl.__path__
    if Path(imported).resolve() != ROOT:
        raise pytest.UsageError(
            f"the tests of {ROOT} import moss_vl from {imported}; unset PYTHONPATH, or uninstall the other checkout"
        )
    unregister(moss_vl.configuration_moss_vl)
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


def unregister(configuration):
    """Makes the Auto classes forget `moss_vl`, so that they load the code of the folders that tests make, which
    transformers 5 would ignore. test_package.py tests the registration in other processes."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    models = [name for name in configuration.AUTO_MODELS if hasattr(transformers, name)]
    mappings = [getattr(transformers, name)._model_mapping for name in models]
    for config in (configuration.MossVLConfig, configuration.MossVLTextConfig, configuration.MossVLVisionConfig):
        CONFIG_MAPPING._extra_content.pop(config.model_type)
        for mapping in (*mappings, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING):
            mapping._extra_content.pop(config, None)


@atexit.register
def remove_scratch(process=os.getpid()):
    if os.getpid() == process:  # not in forked processes
        shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def empty_temporary_directory(monkeypatch, tmp_path_factory):
    """Gives each test an empty temporary directory; files that are left in it are a failure."""
    tmp_path_factory.getbasetemp()  # created now, outside of this directory
    folder = SCRATCH / "tmp"
    monkeypatch.setenv("TMPDIR", str(folder))  # of child processes
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    # except for caches and logs of torch
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith(("torch", "pytorch")))
    for name in left:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
    assert not left, f"left in the temporary directory: {', '.join(left)}"
