"""`python -m cli.bound_to_parent PARENT COMMAND...`: becomes COMMAND, which the kernel kills when its parent dies.

Linux keeps this setting across exec, so it needs no help from COMMAND, and no code between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
