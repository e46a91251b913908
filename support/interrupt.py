"""interrupt.py: Ctrl-C ends a command with one line and exit code 130, also while its imports run.

The commands import this file first, because torch alone takes seconds to import.
"""

import os
import sys


def end(kind, error, trace):
    """In place of Python's own hook for errors that nothing catches."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    try:
        sys.stdout.flush()
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    finally:
        os._exit(130)  # Python would end with the signal itself


sys.excepthook = end
