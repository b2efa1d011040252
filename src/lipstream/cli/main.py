"""The `lipstream` command: finds the sub-command, runs it, and turns every failure into one line and an exit status.

Exit status: 0 done, 1 a check failed or a bug, 2 wrong arguments or files, 130 Ctrl-C, 143 terminated.

    $ lipstream sync talk.mp4 speech.wav -o out.mp4
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from lipstream import __version__
from lipstream.cli import (
    ablate,
    analyze,
    batch,
    bench,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    personalize,
    prepare,
    pull,
    sync,
)
from lipstream.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Parser,
    print_error,
    set_logging,
)
from lipstream.options import OptionError

DESCRIPTION = "Give a talking video other words: the lips follow any speech, everything else stays as it is."
EPILOG = "Try `lipstream demo` first, then `lipstream sync VIDEO AUDIO -o OUT`. `lipstream doctor` checks this machine."


def build_parser() -> Parser:
    """The parser with all sub-commands."""
    parser = Parser(prog="lipstream", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"lipstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in (
        sync, batch, personalize, demo, doctor, evaluate, bench, data, prepare, pull, convert, analyze, ablate,
    ):  # fmt: skip
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and wrong arguments: already said what there is to say
        return int(stop.code or 0)
    verbose = bool(getattr(args, "verbose", False))
    set_logging(verbose)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print_error("stopped by Ctrl-C; no half-written file is left")
        return EXIT_INTERRUPTED
    except _TerminatedError:
        return EXIT_TERMINATED
    except OptionError as error:
        return _fail(f"--{error.option} {error.value}: {error.problem}", EXIT_USAGE, verbose)
    except (ValueError, OSError) as error:  # what the rooms below raise for callers: files and values
        return _fail(_text(error), EXIT_USAGE, verbose)
    except Exception as error:
        hint = "" if verbose else " (a bug: run again with -v and report it)"
        return _fail(f"{type(error).__name__}: {error}{hint}", EXIT_FAILED, verbose)
    finally:
        signal.signal(signal.SIGTERM, before)


class _TerminatedError(BaseException):
    """SIGTERM as an exception, so that half-written files are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(message: str, status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc(file=sys.stderr)
    print_error(message)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
