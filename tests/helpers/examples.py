"""The files in examples/, as a user's own: imported by path."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from moe_jax import registry

FOLDER = Path(__file__).parents[2] / 'examples'


def routers() -> ModuleType:
  """Returns examples/routers.py; importing it registers its classes."""
  path = str(FOLDER / 'routers.py')
  spec = importlib.util.spec_from_file_location('routers', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@contextlib.contextmanager
def registered_here() -> Iterator[None]:
  """Forgets afterwards what is registered meanwhile."""
  registries = [
    each
    for each in vars(registry).values()
    if isinstance(each, registry.Registry)
  ]
  before = [(dict(each._entries), dict(each._files)) for each in registries]
  yield
  for each, (entries, files) in zip(registries, before, strict=True):
    each._entries, each._files = entries, files
