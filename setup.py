"""Builds libvmm.so with make and the Cython extensions beside it. Metadata: pyproject.toml."""

import sys

if not sys.platform.startswith("linux"):
    raise SystemExit(f"pyvmm builds and runs on Linux only; this is {sys.platform}")

import os
import shutil
import subprocess
import sysconfig
from glob import glob

try:
    from setuptools import Command, Distribution, Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError:
    raise SystemExit("missing: setuptools (pip install setuptools 'Cython>=3')") from None

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)  # the paths below are relative, as setuptools wants them
sys.path.insert(0, HERE)
from _build_backend import find_nvcc

LIBRARY = "libvmm.so.0"  # the SONAME, the name the extensions look for beside themselves
PREREQUISITES = "apt install python3-venv python3-dev gcc g++ make"


def check_prerequisites():
    missing = [tool for tool in ("make", "gcc") if not shutil.which(tool)]
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing.append("Python.h")
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}. On Debian and Ubuntu:\n{PREREQUISITES}")
    try:
        import Cython
    except ImportError:
        raise SystemExit("missing: Cython 3 (pip install 'Cython>=3')") from None
    if int(Cython.__version__.split(".")[0]) < 3:
        raise SystemExit(f"Cython 3 or newer is needed; this is {Cython.__version__}")


class build_libvmm(Command):
    """build/libvmm.so, by the Makefile."""

    description = "build libvmm.so with make"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        # A compiler newer than ours may know warnings that ours does not: no -Werror for
        # users. Variables given to a make above us are in the environment; its flags name
        # a jobserver that this process does not have.
        environment = {"WERROR": "", **os.environ}
        environment.pop("MAKEFLAGS", None)
        options = ["--no-print-directory", f"-j{os.cpu_count()}", f"NVCC={find_nvcc() or ''}"]
        if self.verbose < 1:
            options.append("--quiet")
        if subprocess.call(["make", *options, "build/libvmm.so"], env=environment):
            raise SystemExit("libvmm.so could not be built; make has said why")


class build_extensions(build_ext):
    """The extensions, linked to the library that is put beside them."""

    def initialize_options(self):
        super().initialize_options()
        self.parallel = True

    def run(self):
        check_prerequisites()
        self.run_command("build_libvmm")
        super().run()
        package = "pyvmm" if self.inplace else os.path.join(self.build_lib, "pyvmm")
        # Renamed into place: a process that has the old one loaded keeps it whole.
        target = os.path.join(package, LIBRARY)
        shutil.copyfile("build/libvmm.so", target + ".new")
        os.replace(target + ".new", target)
        if not self.inplace:
            # For those who compile against the library: get_include().
            self.mkpath(os.path.join(package, "include"))
            shutil.copyfile("libvmm/include/vmm.h", os.path.join(package, "include", "vmm.h"))

    def build_extensions(self):
        from Cython.Build import cythonize

        # The generated C goes where the objects go, not among the sources.
        generated = cythonize(
            self.extensions,
            build_dir=os.path.join(self.build_temp, "cython"),
            compiler_directives={"language_level": 3},
            force=bool(self.force),
            quiet=self.verbose < 1,
        )
        sources = {extension.name: extension.sources for extension in generated}
        for extension in self.extensions:
            extension.sources = sources[extension.name]
            # Neither setuptools nor the compiler tells that these have changed.
            extension.depends = ["libvmm/include/vmm.h", *glob("pyvmm/*.pxd")]
        super().build_extensions()


class WithoutMetadata(Distribution):
    """Building in place needs none, so that older setuptools do too, which cannot read ours."""

    def parse_config_files(self, *args, **kwargs):
        pass


setup(
    distclass=WithoutMetadata if "--inplace" in sys.argv else Distribution,
    packages=["pyvmm", "pyvmm.paddle_op"],
    package_data={"pyvmm": ["*.pyi", "py.typed"], "pyvmm.paddle_op": ["*.cc"]},
    include_package_data=False,
    cmdclass={"build_libvmm": build_libvmm, "build_ext": build_extensions},
    ext_modules=[
        Extension(
            "pyvmm." + os.path.splitext(os.path.basename(path))[0],
            [path],
            include_dirs=["libvmm/include"],
            library_dirs=["build"],
            libraries=["vmm"],
            runtime_library_dirs=["$ORIGIN"],
            extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"],
        )
        for path in sorted(glob("pyvmm/_*.pyx"))
    ],
)
