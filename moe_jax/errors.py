"""What ends a program with one line: a mistake, or a fault of the world."""

import difflib
import sys
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


def printable(text: str, most: int = sys.maxsize) -> str:
  """Returns a text as a terminal may show it: control characters escaped.

  What a message quotes may be a stranger's: the name of a file or a tensor.

  Args:
    text: The text.
    most: The characters of it that are shown.
  """
  if len(text) > most:
    text = f'{text[:most]}...'
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def said(error: BaseException) -> str:
  """Returns what an error says, in one line that a terminal may show.

  It is '' if even that fails.
  """
  try:
    return printable(' '.join(str(error).split()))
  except Exception:  # a user's class may raise in __str__
    return ''


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
