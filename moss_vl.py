"""Makes the files of this folder importable as the package `moss_vl`: a module with `__path__` is a package."""

from pathlib import Path


__path__ = [str(Path(__file__).resolve().parent)]
