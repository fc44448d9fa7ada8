"""Imports the project as a package in place, and keeps every test off the network and out of the user's caches."""

import os
import sys
import tempfile
import types
from pathlib import Path


os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="moss-vl-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

ROOT = Path(__file__).resolve().parent.parent
SHARED_GOLDEN = ROOT.parent / "shared" / "golden"
GOLDEN = SHARED_GOLDEN if SHARED_GOLDEN.is_dir() else ROOT / "tests" / "golden"

package = types.ModuleType("moss_vl")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("moss_vl", package)
sys.path.insert(0, str(Path(__file__).resolve().parent))
