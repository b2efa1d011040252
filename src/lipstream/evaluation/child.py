"""Run a command and note its wall time and peak memory: `python -m lipstream.evaluation.child REPORT COMMAND...`.

A process of its own, because the operating system reports the peak of *all* children together, and because a child's
peak starts at the size of the process that started it: this one imports the standard library only.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run `arguments[1:]`, write JSON {"seconds", "peak_mib", "status"} to `arguments[0]`; returns the exit status."""
    report, *command = arguments
    began = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak_mib = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # bytes there, KiB on Linux
    Path(report).write_text(json.dumps({"seconds": seconds, "peak_mib": peak_mib, "status": status}))
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
