"""The `lohp` command: parsing, and what becomes of errors; each command is in a module of its own."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

import tyro

from lohp_jax.cli.errors import UsageError, usage_errors
from lohp_jax.cli.lohp import evaluate, generate, prepare, report, run, tasks, train
from lohp_jax.cli.meta import meta_train
from lohp_jax.cli.output import errors
from lohp_jax.cli.solve import solve, with_defaults
from lohp_jax.training.engine import DivergedError

COMMANDS = {
    command.__name__.replace("_", "-"): command
    for command in (run, prepare, train, generate, evaluate, report, tasks, meta_train, solve)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns: 0; 1 if the command failed or was interrupted; 2 for bad usage.
    """
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        command()
    except SystemExit as stop:  # of the parser: 0 after --help, 2 after a bad flag
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _fail(
            "interrupted; what was finished is saved. Go on with the same command "
            "(run, prepare, train, meta-train and solve: with --resume).",
            1,
        )
        if arguments is None:  # a compilation cut off runs on in XLA; Python's shutdown would crash
            sys.stdout.flush()
            os._exit(1)
        return 1
    except BrokenPipeError:  # whoever read our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(str(error), 2)
    except (ValueError, OSError, DivergedError) as error:
        return _fail(str(error), 1)
    return 0


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The command that the arguments ask for, not yet run.

    A command is parsed on its own where it is known: messages then name only what belongs to it.
    """
    commands = {name: _deferred(command) for name, command in COMMANDS.items()}
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    with usage_errors():
        if arguments and arguments[0] in commands:
            name, *rest = arguments
            if name == "solve":
                commands[name] = _deferred(with_defaults(rest))
            return tyro.cli(commands[name], prog=f"lohp {name}", args=rest, config=markers)
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="lohp",
            description="Generate the weights of neural networks instead of training them.",
            args=arguments,
            config=markers,
        )


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """`command` that only remembers its arguments, so that parsing and running fail apart."""

    @functools.wraps(command)
    def remember(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    return remember


def _fail(message: str, code: int) -> int:
    errors.print(f"lohp: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code
