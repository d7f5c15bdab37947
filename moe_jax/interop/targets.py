"""The place a command writes to: free before it begins, whole when it is there.

Each error of the disk is reported for the path that it is of, so what is read
meanwhile stays outside `writing`.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.errors import UserError


def check(path: Path) -> None:
  """Refuses a place before anything is read or computed for it.

  Raises:
    UserError: there is something at `path`, or nothing can be written there.
  """
  with writing(path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise UserError(f'{path} is there already; name a new folder')
    above = next(p for p in path.absolute().parents if p.exists())
    with tempfile.TemporaryFile(dir=above):
      pass


@contextmanager
def appears(path: Path) -> Iterator[Path]:
  """A place beside `path` to write to; it becomes `path` if all goes well.

  Raises:
    UserError: nothing can be written there.
  """
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f'.{path.name}.'
    )
  with aside as folder:
    made = Path(folder) / path.name
    yield made
    with writing(path):
      os.replace(made, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
  """Reports what the disk refuses inside as `path` that cannot be written."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error
