"""What the user did wrong, apart from what went wrong."""

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """What the user asked for makes no sense; nothing was changed."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Around what looks at the user's input only: its ValueErrors are bad usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
