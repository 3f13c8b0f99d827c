"""The program `nnunet_xattnres.overhead.measurement`, except that it times every step once."""

import sys

from nnunet_xattnres.overhead import measurement, runner

if __name__ == "__main__":
    # Without a GPU but with CUDA_HOME, this module prints a warning. The command must not import it before it measures.
    if "torch.utils.cpp_extension" in sys.modules:
        raise ImportError(f"{runner.__name__} imports torch.utils.cpp_extension")
    measurement.STEP_SECONDS = measurement.INFERENCE_SECONDS = 0
    measurement.main()
