"""Ctrl-C and the jobs of a run that a script has put into the background."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def children_heed_interrupts() -> Iterator[None]:
    """Let the processes that are started in the block end by SIGINT, by which submitit ends a local job.

    A command that a script puts into the background ignores SIGINT, and so does all that it starts.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    # Ctrl-C in the script's terminal must still not reach the children: they get a process group of their own. This
    # process returns to the script's group: whoever ends that group ends the run, and the run ends its children.
    group = os.getpgrp()
    if group != os.getpid():
        os.setpgrp()
    # Children inherit SIG_IGN, but no handler.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The script, and its group with it, may be gone.
        with suppress(PermissionError):
            os.setpgid(0, group)
