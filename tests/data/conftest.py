"""Small sources for the tests of moe_jax.data."""

import functools
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data import folders, sources


def _config(**keys: object) -> ConfigDict:
  """Returns what `open_documents` reads of `config.data`."""
  defaults = {'name': 'text_folder', 'path': '', 'text_key': 'text'}
  return ConfigDict(defaults | {'format': 'text', 'mixture': ''} | keys)


def _names_of(split: str, count: int) -> list[str]:
  """Returns the first file names `0.txt`, `1.txt`, ... of a split."""
  names = (f'{i}.txt' for i in range(1000))
  return [name for name in names if folders.split_of(name) == split][:count]


@pytest.fixture
def data_config(tmp_path: pathlib.Path) -> Callable[..., ConfigDict]:
  """Returns a function from keys to a `config.data` of this test's own."""
  return functools.partial(_config, dir=str(tmp_path / 'prepared'))


@pytest.fixture
def names_of() -> Callable[[str, int], list[str]]:
  """Returns the function from a split and n to n file names in it."""
  return _names_of


@pytest.fixture
def make_data(
  tmp_path: pathlib.Path, data_config: Callable[..., ConfigDict]
) -> Callable[[dict[str, bytes]], ConfigDict]:
  """Returns a function that writes files and returns the config of them."""

  def make(files: dict[str, bytes]) -> ConfigDict:
    root = tmp_path / 'texts'
    for name, text in files.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(text)
    return data_config(path=str(root))

  return make


@pytest.fixture
def documents(
  make_data: Callable[[dict[str, bytes]], ConfigDict],
) -> sources.Documents:
  """Forty training documents of 0 to 60 characters, some beyond ASCII."""
  rng = np.random.default_rng(0)
  letters = list('abc def\nαβ→')
  texts = [''.join(rng.choice(letters, rng.integers(1, 60))) for _ in range(40)]
  names = _names_of('train', 40)
  files = dict(zip(names, (text.encode() for text in texts), strict=True))
  return sources.open_documents(make_data(files), 'train')


@pytest.fixture(scope='session')
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  """The real `python_stdlib`, in a folder of this test session."""
  folder = tmp_path_factory.mktemp('stdlib')
  return _config(name='python_stdlib', dir=str(folder))
