"""Paths and files that a user names, or that came with somebody's checkpoint.

Whatever is wrong with a file is an OSError or a ValueError here, which the
callers report with its path.
"""

import contextlib
import errno
import glob
import json
import os
import stat
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError, said

# What a preset says of a path that it needs and does not know.
REQUIRED = '?'

# Far more than any file of ours or of a release has; Python's own limit lies
# above it, and what walks through the values has none.
_DEEPEST = 100


def expand(path: str) -> str:
  """Returns a path of the user's with ~ expanded.

  No shell does it after `--flag=`.

  Raises:
    UserError: There is no such user.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    raise UserError(
      f'{path}: there is no home of {path.split("/")[0]}; write ./{path} for a'
      ' folder of that name'
    )
  return expanded


def tokenizer_file(name: str) -> str:
  """Returns what a copy of the file that a `data.tokenizer` names is called.

  Args:
    name: The value of the key.

  Returns:
    `tokenizer.json` for a path of Hugging Face's kind, `tokenizer.model` for
    one of SentencePiece's; '' where the value names no file.
  """
  ending = os.path.splitext(name)[1]
  return f'tokenizer{ending}' if ending in ('.json', '.model') else ''


def refuse_pattern(what: str, path: str) -> None:
  """Refuses a path which, made absolute, Orbax would take for a pattern.

  Orbax finds by glob what the processes wrote, to merge it: in `a[1]` nothing
  is found, which makes the checkpoint worthless without an error, and `a*` also
  finds what belongs to other runs.

  Args:
    what: What the path is of, for the message.
    path: The path.

  Raises:
    UserError: It has one of the characters.
  """
  path = os.path.abspath(path)
  if glob.escape(path) != path:
    raise UserError(
      f'{what} {path} has one of the characters * ? [ in its path, with which'
      f' no checkpoint can be written; choose another {what}'
    )


def refuse_ambiguous(what: str, path: str) -> None:
  """Refuses a path which libraries that read there by glob cannot tell apart.

  Args:
    what: What the path is of, for the message.
    path: The path.

  Raises:
    UserError: As a pattern it means other folders that there are, or any depth,
      which is not implemented.
  """
  path = os.path.abspath(path)
  if '**' in path or set(glob.glob(path)) - {path}:
    raise UserError(
      f'{what} {path} is also a pattern for other folders, which may be read in'
      ' its stead; rename the part with * ? or ['
    )


def check_output(flag: str, path: str, name: str) -> None:
  """Refuses a folder where a file is to be written; makes the one it lies in.

  Args:
    flag: The flag that names it.
    path: The path of the file.
    name: The name that a file in the folder could have.

  Raises:
    UserError: It is a folder, or what it lies in can be none.
  """
  if os.path.isdir(path):
    raise UserError(
      f'{flag}: {path} is a folder; name a file, such as'
      f' {os.path.join(path, name)}'
    )
  try:
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  except OSError as error:
    raise UserError(
      f'{flag}: {path} cannot be written: {said(error)}; name another file'
    ) from error


def check_regular(path: str | Path) -> None:
  """Refuses what is no file with an end: a pipe, a device, a socket.

  Reading a pipe waits for a writer, maybe for ever.

  Raises:
    OSError: There is no such file, or it is something else.
  """
  mode = os.stat(path).st_mode
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(
      errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path)
    )
  if not stat.S_ISREG(mode):
    raise OSError(errno.EINVAL, 'Not a regular file', os.fspath(path))


def replace(path: str, content: str | bytes) -> None:
  """Writes a file at once: a crash leaves the old content or the new one."""
  temporary = f'{path}.tmp'
  try:
    with open(temporary, 'wb') as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):  # a part of it, on a full disk
      os.remove(temporary)
    raise


def irregular(folder: str | Path) -> list[str]:
  """Returns the paths below a folder that are neither files nor folders.

  What links lead to counts; a link to nowhere is none of either.
  """
  found = []
  for parent, _, names in os.walk(folder):
    paths = [os.path.join(parent, name) for name in names]
    found += [path for path in paths if not os.path.isfile(path)]
  return sorted(found)


def read_text(path: str | Path) -> str:
  """Returns the text of a file in UTF-8, without a byte order mark.

  Raises:
    OSError: It cannot be read, or is no regular file.
    ValueError: It is not UTF-8.
  """
  check_regular(path)
  return Path(path).read_text('utf-8-sig')


def read_json(path: str | Path) -> Any:
  """Returns what a file of JSON holds.

  Raises:
    OSError: It cannot be read, or is no regular file.
    ValueError: As `parse_json`.
  """
  return parse_json(read_text(path))


def parse_json(text: str) -> Any:
  """Returns what a text of JSON says.

  Raises:
    ValueError: It is not JSON, an object has a name twice, or it is nested so
      deeply that it is no file of ours.
  """
  too_deep = ValueError(f'its values are nested more than {_DEEPEST} deep')
  try:
    value = json.loads(text, object_pairs_hook=_once)
  except RecursionError as error:
    raise too_deep from error
  level = [value]
  for _ in range(_DEEPEST):
    level = [child for each in level for child in _children(each)]
    if not level:
      return value
  raise too_deep


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns an object of JSON, none of whose values another one hides."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'it has {twice!r} twice')
  return found


def _children(value: Any) -> list[Any]:
  """Returns what an object or an array of JSON holds."""
  if isinstance(value, dict):
    return list(value.values())
  return value if isinstance(value, list) else []
