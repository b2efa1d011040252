"""The command line: one module per command, each with `add_parser(subparsers)` and `run(args) -> exit status`.

Arguments, progress and messages live here and nothing else does. Start reading at `lipstream.cli.main`.
"""

import os

# Before numpy is loaded: its matrix products here are small, and OpenBLAS's other threads would wait for the next one
# busily, on the cores that the other stages need (measured: a quarter of the speed of `sync` on two cores).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
