"""The command line. Importing this imports click and nothing heavy; torch waits for a verb."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from lora_tools import interruption
from lora_tools.cli.commands import VerbCommand
from lora_tools.cli.groups import OrderedGroup, variable
from lora_tools.cli.pages import is_page, page
from lora_tools.errors import LoraToolsError, QualityGateError, next_step
from lora_tools.interruption import Course
from lora_tools.printable import printable
from lora_tools.verbs import VERBS

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# glibc's mallopt (malloc.h): from which size on a block is memory of its own, given back with it;
# how much free memory a heap keeps; and how many heaps there are.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_STOPPED = {int(signal.SIGINT): "Interrupted", int(signal.SIGTERM): "Terminated"}


@click.group(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check found a difference (verify, "
    "check, export, --max-error).\n\nYou can set each option with an environment variable: "
    "LORATOOLS_JOBS for all commands, LORATOOLS_MERGE_JOBS for merge.\n\nDocumentation: "
    "loratools help docs lists the pages, and loratools help docs/tour.md shows one.",
)
@click.version_option(None, "-V", "--version", package_name="loratools", prog_name="loratools")
def main() -> None:
    """Surgery on model weights, from file to file: extract LoRA adapters from fine-tunes, merge
    them into checkpoints, quantize, and export to ONNX; inspect, compare and verify the results.

    A model or an adapter is a folder, a file, a hub id (org/name[@revision]) or an address
    (s3://, gs://, az://, https://, hf://). Each command has its own --help.
    """


for verb in VERBS.values():
    main.add_command(VerbCommand(verb))


@main.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL. Put it into the shell's startup file:

    \b
    bash, zsh:  eval "$(loratools completion bash)"
    fish:       loratools completion fish | source
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "loratools", "_LORATOOLS_COMPLETE").source())


@main.command("help", short_help="Print the help of a command, or a page of the documentation.")
@click.argument("command", metavar="[COMMAND|PAGE]", required=False)
@click.pass_context
def help_(ctx: click.Context, command: str | None) -> None:
    """Print the help of COMMAND, like COMMAND --help, or a PAGE of the documentation, such as
    docs/tour.md. "docs" lists the pages.
    """
    above = ctx.parent
    assert above is not None
    if command is None:
        click.echo(above.get_help())
        return
    if is_page(command):
        click.echo_via_pager(page(command).rstrip("\n"))
        return
    _, found, _ = main.resolve_command(above, [command])  # raises, with what it may have been
    assert found is not None
    with click.Context(found, info_name=command, parent=above) as its:
        click.echo(found.get_help(its))


def run(args: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    before = {number: signal.getsignal(number) for number in _STOPPED}
    hook = sys.unraisablehook
    try:
        return _run(args)
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: list[str] | None) -> int:
    """The same, and signals remain ignored after the end."""
    course = interruption.begin()
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    try:
        try:
            for number in _STOPPED:
                if signal.getsignal(number) != signal.SIG_IGN:  # a job's in the background is
                    signal.signal(number, course.stop)
            code = main.main(args, prog_name="loratools", standalone_mode=False)
            course.go_on()
        finally:
            course.ended = True  # no call here, in which a signal could be raised
            course.clear()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | click.Abort):
            course.signal = course.signal or signal.SIGINT
        # Whatever comes out after a signal is what the signal has made.
        if course.signal:
            code = _stopped(course)
        else:
            code = _failed(error, _asks_for_json(sys.argv[1:] if args is None else args))
        for said in course.kept:
            click.echo(printable(said), err=True)
        return code
    return code if isinstance(code, int) else 0


def _unraisable(before: Callable[[UnraisableHookArgs], object], what: UnraisableHookArgs) -> None:
    """What is raised within a finalizer is printed, and forgotten. A signal that fell into one ends
    the run at the next step (``Course.go_on``), without a traceback."""
    if not issubclass(what.exc_type, interruption.Stopped):
        before(what)


def _asks_for_json(args: Sequence[str]) -> bool:
    """Whether errors are wanted as JSON, also of a command line that was not understood."""
    command = next((word for word in args if word in main.commands), "")
    value = os.environ.get(variable(command, "--json"), "")
    with contextlib.suppress(click.BadParameter):
        return "--json" in args or bool(value and click.BOOL.convert(value, None, None))
    return False


def _stopped(course: Course) -> int:
    placed = course.placed or ["nothing"]
    was = "was" if len(placed) == 1 else "were"
    click.echo(f"{_STOPPED[course.signal]}; {', '.join(placed)} {was} written.", err=True)
    return 128 + course.signal


def _failed(failure: BaseException, as_json: bool) -> int:
    """Say what went wrong. Returns the exit code; raises what nobody has foreseen."""
    try:
        raise failure
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        _say("UsageError", " ".join(error.format_message().split()) + hint, as_json)
        return error.exit_code
    except click.ClickException as error:
        _say(type(error).__name__, error.format_message(), as_json)
        return error.exit_code
    except LoraToolsError as error:
        told = isinstance(error, QualityGateError) and error.report is not None  # by its report
        _say(type(error).__name__, str(error), as_json and not told, error.tensor)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except OSError as error:  # a file that cannot be opened, a disk that fails
        _say("OSError", str(error), as_json)
        return 1
    except MemoryError:
        _say("MemoryError", "out of memory; try --jobs 1", as_json)
        return 1


def _say(kind: str, message: str, as_json: bool, tensor: str | None = None) -> None:
    """An error for people on stderr; with --json for programs on stdout as well."""
    click.echo(f"Error: {printable(message)}", err=True)
    if as_json:
        said = {"kind": kind, "message": message, "tensor": tensor, "next": next_step(message)}
        click.echo(json.dumps({"error": said}))


def _keep_freed_memory() -> None:
    """Have glibc keep runs of rows that were freed, for the next ones.

    It gives those back to the system, which takes as long to hand out fresh pages as a run takes to
    compute, until a block of 32 MiB was freed; then it sets these sizes by itself. One heap serves
    all threads, since each would keep what it once took; blocks are few and large, so that none
    waits for another. Where the user chose others, or the C library is another one, all stays as it
    is.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_ARENA_MAX, 1)


def entry() -> NoReturn:
    """The console script.

    Collecting garbage while torch is imported, and tearing down all it built at the end, costs a
    third of a short command's time; the process ends here anyway. (mypy does the same.)
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before the command has its own
    gc.disable()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # threads run over tensors here, not within operations
    _keep_freed_memory()
    code = _run(None)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)
