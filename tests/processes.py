"""Starting the program as a terminal would."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """For preexec_fn: a runner in the background passes an ignored SIGINT on, which no child could see."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
