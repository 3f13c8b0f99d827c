"""Compiles the library of the native backend. Everything else is in setup.cfg."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "nnunet_xattnres/ops/native"
# No -ffast-math: it forgets infinities, and linking with it sets flush-to-zero for the whole process.
FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


class BuildLibrary(build_ext):
    """A library that Python loads with ctypes, and not an extension module of one Python version."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "nnunet_xattnres.ops.native_attention",
            [f"{SOURCES}/{file}" for file in ("attention.c", "kernels_baseline.c", "kernels_avx2.c")],
            depends=[f"{SOURCES}/{file}" for file in ("attention.h", "kernel.h", "kernels.h")],
            extra_compile_args=FLAGS,
            libraries=["m", "pthread"],
            # Without a compiler, the installation goes on, and the backend "streaming" computes.
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
