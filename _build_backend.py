"""The build backend: setuptools, and nvcc from PyPI where this machine has none.

Without nvcc the library is built with a checked-in PTX, which works; with it, it carries
native code for each GPU generation.
"""

import os
import shutil
import subprocess
import sys
import tempfile

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403 (the hooks that stay as they are)

_HERE = os.path.dirname(os.path.abspath(__file__))


def find_nvcc():
    """The real path of nvcc, or None: the Makefile's rule, for the running interpreter.

    A symlink to nvcc fails, since nvcc finds its parts relative to itself. NVCC in the
    environment decides; empty, it says that there is none.
    """
    if "NVCC" in os.environ:
        return os.environ["NVCC"] or None
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates += [os.path.join(path, "nvidia", "cu13", "bin", "nvcc") for path in sys.path]
    return next((os.path.realpath(c) for c in candidates if c and os.path.isfile(c)), None)


def nvcc_requirements():
    """nvcc's packages: none where an nvcc is found, or where pip cannot have them."""
    if "NVCC" in os.environ or find_nvcc():
        return []
    path = os.path.join(_HERE, "tests", "requirements-nvcc.txt")
    if not _pip_has(path):
        print("no nvcc from PyPI: the library carries the checked-in PTX alone")
        return []
    with open(path) as lines:
        return [line.strip() for line in lines if "==" in line]


def _pip_has(requirements):
    """Whether pip can have them: a build must not fail for want of what it can do without."""
    # pip hides itself from the builds that it isolates, by PYTHONPATH.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], env=environment, capture_output=True).returncode:
        return True  # another front end without pip: it will say
    with tempfile.TemporaryDirectory() as target:
        options = ["--dry-run", "--no-deps", "--quiet", "--target", target]
        command = [*pip, "install", *options, "-r", requirements]
        return subprocess.run(command, env=environment).returncode == 0


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + nvcc_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + nvcc_requirements()
