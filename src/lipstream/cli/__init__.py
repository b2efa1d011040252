"""The command line: one module per command, each with `add_parser(subparsers)` and `run(args) -> exit status`.

Arguments, progress and messages live here and nothing else does. Start reading at `lipstream.cli.main`.
"""
