"""The files in examples/, as a user's own: imported by path."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / 'examples'


@functools.cache
def routers() -> ModuleType:
  """Returns examples/routers.py; importing it registers its classes."""
  path = str(FOLDER / 'routers.py')
  spec = importlib.util.spec_from_file_location('routers', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
