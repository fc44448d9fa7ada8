"""Builds the wheel: the files of the root, which a checkout imports as modules of `moss_vl`, join moss_vl/__init__.py.
All other settings are in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).resolve().parent
SETTINGS = sorted(path.name for path in ROOT.glob("*.json"))
PICTURES = ["data/example_image.jpg", "data/sample_a.jpg"]  # with which tools/quantize.py compares models


class BuildPackage(build_py):
    """Adds the modules and the settings (JSON) of the root to the package. An editable install, which imports the
    checkout, does not run this."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == "moss_vl":
            modules += [(package, path.stem, path.name) for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"]
        return modules

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *SETTINGS, *PICTURES]  # of a source distribution

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in (*SETTINGS, *PICTURES):
                target = Path(self.build_lib, "moss_vl", name)
                self.mkpath(str(target.parent))
                self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildPackage})
