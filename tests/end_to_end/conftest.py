"""A small text folder, and configs that read it."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from moe_jax.data import folders
from tests.helpers import tiny

# Real text at hand: files of Python's library.
_TRAIN = ('heapq.py', 'shlex.py', 'textwrap.py', 'queue.py', 'bisect.py')
_VALIDATION = ('keyword.py', 'this.py')


def _names(split: str) -> list[str]:
  """Names of files that belong to `split`."""
  names = (f'part-{i}.txt' for i in range(200))
  return [name for name in names if folders.split_of(name) == split]


@pytest.fixture(scope='session')
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with a train and a validation split; the test split is empty."""
  folder = tmp_path_factory.mktemp('texts')
  library = Path(sysconfig.get_path('stdlib'))
  for split, files in (('train', _TRAIN), ('validation', _VALIDATION)):
    for name, file in zip(_names(split), files, strict=False):
      # Not all ASCII, so that bytes and characters are not the same number.
      text = (library / file).read_text(encoding='utf-8')[:5000] + 'naïve →\n'
      (folder / name).write_text(text, encoding='utf-8')
  return folder


@pytest.fixture(scope='session')
def make_config(
  texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ConfigDict]:
  """Returns a function from overrides to a tiny config on `texts`."""
  prepared = tmp_path_factory.mktemp('prepared')

  def make(**overrides: Any) -> ConfigDict:
    data = {
      'data.name': 'text_folder',
      'data.path': str(texts),
      'data.dir': str(prepared),
    }
    return tiny.config(**data, **overrides)

  return make
