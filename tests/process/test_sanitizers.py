"""The compiled library under the compiler's sanitizers, over the tests of the native backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SOURCES = CHECKOUT / "nnunet_xattnres" / "ops" / "native"
RUN = """
import sys
from pathlib import Path
import pytest
from nnunet_xattnres.ops import native_library
native_library.FILE = Path(sys.argv[1])
if sys.argv[2] == "thread":
    # The sanitizer knows threads of the system, and not those of PyTorch's OpenMP runtime.
    native_library.parallel_runner = lambda: None
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", "TestValues", sys.argv[3]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="there is no gcc here")
@pytest.mark.parametrize("kernels", ["-DONLY_BASELINE", "-O2"], ids=["baseline", "avx2"])
@pytest.mark.parametrize("sanitizer, runtime", [("address,undefined", "libasan.so"), ("thread", "libtsan.so")])
def test_no_sanitizer_complains(tmp_path, sanitizer, runtime, kernels):
    library = tmp_path / "native_attention.so"
    flags = [
        "-O2",
        "-g",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-DCACHE_BYTES=4096",  # tiles of eight voxels, or a few more
        "-DHALO_BYTES=1",  # one batch item at a time
        kernels,
    ]
    subprocess.run(["gcc", *flags, *SOURCES.glob("*.c"), "-o", library, "-lm", "-lpthread"], check=True)
    # The C++ library too: the sanitizer looks for its exceptions at the start.
    preloaded = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (runtime, "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
        "OMP_NUM_THREADS": "3",
    }
    tests = CHECKOUT / "tests" / "unit" / "test_native.py"
    command = [sys.executable, "-c", RUN, library, sanitizer, tests]
    done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
