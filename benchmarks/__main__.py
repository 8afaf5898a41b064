"""`python -m benchmarks`."""

import os
import sys


def run() -> int:
    """Run the command line; the profiler that reads peak memory would otherwise announce itself on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported
    from benchmarks.command import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
