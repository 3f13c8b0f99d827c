"""The program `nnunet_xattnres.overhead.measurement`, except that it times every step once."""

from nnunet_xattnres.overhead import measurement

if __name__ == "__main__":
    measurement.STEP_SECONDS = measurement.INFERENCE_SECONDS = 0
    measurement.main()
