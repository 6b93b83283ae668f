"""What a user sees when something is wrong: one sentence and an exit code, never a traceback.

Exit codes: 0 done, 1 the work failed (a broken file, a full disk, a parity bound passed), 2 the command was misused
(an unknown preset, a missing option), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


class UserError(click.ClickException):
    """The work cannot be done. The message says what was found, what was expected and what to do next."""

    exit_code = 1


class Misuse(UserError):
    """The command itself is wrong: options that contradict each other, a name that does not exist."""

    exit_code = 2


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the operating system's own failures into a sentence. What we did not foresee keeps its traceback."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            raise UserError(
                f"The disk is full{where}. Free some space and run the same command again; nothing that was complete is lost."
            ) from error
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {(error.strerror or str(error)).lower()}.") from error
    except MemoryError as error:
        raise UserError(f"Not enough memory ({error or 'allocation failed'}). Try a smaller --batchsize.") from error
    except RuntimeError as error:
        asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))  # PyTorch's own
        if not asked:
            raise
        raise UserError(f"Not enough memory ({int(asked[1]):,} bytes were asked for). Try a smaller --batchsize.") from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports of what only an extra installs: turn its absence into a sentence (exit 1)."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"This needs {error.name}, which is not installed. Install it with: pip install -c constraints.txt '.[{name}]'"
        ) from error


class Command(click.Command):
    """A click command whose foreseeable failures end in one sentence on stderr."""

    stopped = "Stopped."  # what Ctrl-C says

    def invoke(self, ctx: click.Context) -> Any:
        with plain_errors():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                click.echo(f"\n{self.stopped}", err=True)
                ctx.exit(130)


class ResumableCommand(Command):
    """A command that goes on where it was stopped."""

    stopped = "Stopped. Run the same command again to go on; what was complete is kept."


class Group(click.Group):
    """A click group of such commands, for a step that has tasks: `blip-pre retrieval`."""

    command_class = Command
