"""What ends a program with one line: a mistake, or a fault of the world."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in the input: a config, a flag, a file or a checkpoint.

  The message is one line that names the key or file, says what is wrong and
  what would be right. Programs print it without a traceback and exit with 2.
  """


class RetryableError(RuntimeError):
  """A fault of the world after which the same command goes on.

  A full disk, or another process of the run that has gone. The message is one
  line that says so. Programs print it without a traceback and exit with 75,
  `EX_TEMPFAIL` of sysexits.h, for a scheduler to start the command again.
  """


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest known name, or ''."""
  matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
  return f"; did you mean '{matches[0]}'?" if matches else ''


def choose(kind: str, name: str, known: Iterable[str]) -> str:
  """Returns `name` if it is one of `known`.

  Args:
    kind: What is being chosen, normally the config key, for the message.
    name: The name that was given.
    known: The names that there are.

  Raises:
    UserError: `name` is not among them; the message lists them.
  """
  known = list(known)
  if name not in known:
    raise UserError(
      f'{kind} = {name!r} is not known{nearest(name, known)}'
      f' (known: {", ".join(known)})'
    )
  return name
