"""The commands of ``python -m inception_ext``.

Every module of this package without a leading underscore is a command. Its docstring's first line
is its help; ``add_arguments(parser)`` declares its options, and ``run(args)`` does the work and
returns the exit status.
"""

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from inception_ext._console import CommandError

__all__ = ["main"]


def _commands() -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: import_module(f"{__name__}.{name}") for name in names if not name.startswith("_")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 1 where it failed, 2 for wrong usage."""
    from inception_ext import __version__

    parser = argparse.ArgumentParser(
        prog="python -m inception_ext", description="GoogLeNet in a few fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"inception_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = _commands()
    for name, module in commands.items():
        summary = (module.__doc__ or name).splitlines()[0]
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)

    args = parser.parse_args(argv)
    try:
        return int(commands[args.command].run(args))
    except CommandError as error:
        print(f"inception_ext {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"inception_ext {args.command}: interrupted", file=sys.stderr)
        return 130
