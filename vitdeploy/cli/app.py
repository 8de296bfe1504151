"""The commands together, and what becomes of their errors: one line, a hint, an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO, get_args, get_type_hints

import typer

from vitdeploy._version import __version__
from vitdeploy.cli import output
from vitdeploy.cli.interruption import Interrupted, interruptible
from vitdeploy.errors import UsageError, VitdeployError, did_you_mean

# ClickException, of the click that typer depends on or carries inside, as its version will have it.
_ParserError: type[Any] = typer.BadParameter.__mro__[2]

_VERBS = (
    *("export", "optimize", "engine", "verify", "bench", "inspect", "predict", "explain", "serve"),
    *("package", "tune", "list", "doctor"),
)
"""Each is a module of this package, which is imported where it is asked for."""
_SUMMARY = "Carry a Vision Transformer checkpoint to production, and prove each step."
_CODES = "Exit codes: 0 ok, 2 bad input, 3 something is missing, 4 export failed, 5 parity failed, 6 slower."


def build(verbs: Sequence[str] = _VERBS) -> typer.Typer:
    """The command line as typer has it, with some verbs or all of them."""
    app = typer.Typer(
        name="vitdeploy",
        help=_SUMMARY,
        epilog=f"\b\n{_CODES}",
        add_completion=False,
        rich_markup_mode=None,  # plain help: twice as fast
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_root)
    for name in verbs:
        verb = _verb(name)
        app.command(name, short_help=verb.SUMMARY, epilog=_examples(verb.EXAMPLES))(verb.command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, ``sys.argv`` by default; print what goes wrong; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a label or path in an alphabet that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    with interruptible() as caught:
        try:
            code = _run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough: `| head`
            _discard(sys.stdout)
            return 128 + signal.SIGPIPE
        except Interrupted:
            return _interrupted(caught[0])
        except VitdeployError as error:
            # A library may have turned an interruption into an error of its own.
            return _interrupted(caught[0]) if caught else _report(error, arguments)
    return code


def _run(arguments: list[str]) -> int:
    """Run a command; whatever goes wrong is a VitdeployError."""
    command = typer.main.get_command(build(_asked_for(arguments)))
    try:
        # make_context and invoke, not main(): that one swallows Ctrl-C and prints for itself.
        with command.make_context("vitdeploy", list(arguments)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as end:
        return end.exit_code
    except (VitdeployError, BrokenPipeError):
        raise
    except _ParserError as error:
        raise _usage_error(error) from error
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, FileNotFoundError) and error.filename is None:  # as Python's tempfile has it
            from vitdeploy.machine.temporary import temporary_folder

            temporary_folder()
        what = " ".join(str(error).split())
        raise VitdeployError(
            f"this is a bug in vitdeploy: {type(error).__name__}: {what}",
            hint="run `vitdeploy --debug ...` and report the traceback",
        ) from error


def _asked_for(arguments: Sequence[str]) -> Sequence[str]:
    """The verb that a command line begins with; all of them where it begins with something else."""
    first = next((word for word in arguments if word != "--debug"), "")
    return (first,) if first in _VERBS else _VERBS


def _verb(name: str) -> Any:
    """A verb's module: SUMMARY, EXAMPLES and command."""
    return importlib.import_module(f"vitdeploy.cli.{name}")


def _version(wanted: bool) -> None:
    if wanted:
        output.line(f"vitdeploy {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when vitdeploy has a bug.")
    ] = False,
) -> None:
    pass


def _interrupted(number: int) -> int:
    output.error(f"interrupted by {signal.Signals(number).name}")
    return 128 + number


def _report(error: VitdeployError, arguments: Sequence[str]) -> int:
    if "--json" in arguments:
        output.json_document({"ok": False, "error": error.as_dict()})
    output.error(error.message, error.hint)
    return error.exit_code


def _usage_error(error: Any) -> UsageError:
    """What typer objects to, in our words: one suggestion, no capital letter, no final full stop."""
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if context and context.info_name == "export" and option in _options("engine"):
        # `export` builds engines with the defaults; what can be chosen about them is asked of `engine`.
        hint = f"vitdeploy export writes the bundle, then: vitdeploy engine BUNDLE {option} ..."
        return UsageError(f"{option} is an option of `vitdeploy engine`", hint=hint)
    if value := _value_error(error):
        message = value
    elif known := getattr(error, "possibilities", None):
        message = f"no such option: {option}{did_you_mean(option or '', known)}"
    else:
        message = error.format_message().replace(". Did you mean", "; did you mean").rstrip(".")
    hint = f"{context.command_path if context else 'vitdeploy'} --help shows what there is"
    return UsageError(message[:1].lower() + message[1:], hint=hint)


def _value_error(error: Any) -> str:
    """What a number should have been; empty where the error is about something else.

    typer's words change with its version, and with the library that it checks with.
    """
    parameter: Any = getattr(error, "param", None)
    context: Any = getattr(error, "ctx", None)
    verb = None if parameter is None or context is None else context.info_name
    if verb not in _VERBS:
        return ""
    declared = get_type_hints(_verb(verb).command, include_extras=True)[parameter.name]
    kind, stated = declared.__origin__, declared.__metadata__[0]
    kinds = {kind, *get_args(kind)}
    noun = "a whole number" if int in kinds else "a number" if float in kinds else ""
    given = _given(error)
    if not noun or given is None:
        return ""
    if stated.min is not None and stated.max is not None:
        noun += f" from {stated.min} to {stated.max}"
    elif stated.min is not None:
        noun += f" of at least {stated.min:g}"
    return f"{max(parameter.opts, key=len)} takes {noun}, not {given!r}"


def _given(error: Any) -> str | None:
    """The value that typer objects to; None where it objects to something else."""
    if problems := getattr(error.__cause__, "errors", None):  # pydantic's
        return str(problems()[0]["input"])
    value, found, _ = str(error.message).partition(" is not ")
    return value.strip("'") if found else None


def _options(verb: str) -> set[str]:
    """The options of a verb, as they are typed."""
    commands: Any = typer.main.get_command(build((verb,)))
    parameters = commands.commands[verb].params
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


def _examples(lines: Sequence[str]) -> str:
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def _discard(stream: TextIO) -> None:
    """Keep the interpreter from flushing into a closed pipe once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
