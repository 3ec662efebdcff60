"""Build step: models.toml lives at the repository's root and travels in the wheel as edgemed/models.toml.

Everything else about the package is in pyproject.toml. A copy made while building needs no symbolic link (which Windows
checkouts lack) and leaves one source file; core/registry.py finds either.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRegistry(build_py):
    """build_py that also copies models.toml into the package. An editable install reads the file at the root instead."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "edgemed" / "models.toml"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile("models.toml", target)


setup(cmdclass={"build_py": BuildWithRegistry})
