"""Lists the presets and variants that come with the library.

moe_jax presets           all of them, a line each
moe_jax presets NAME      what the file of that name says about its own
"""

import sys
from collections.abc import Mapping
from types import ModuleType

from moe_jax import cli
from moe_jax.config import loading
from moe_jax.config.user_code import import_file
from moe_jax.errors import UserError, choose


def main() -> None:
  """Prints the list, or the documentation of one file, and exits."""
  cli.exit_with(run)


def run() -> None:
  """Prints what the command line asks for."""
  if len(sys.argv) > 2:
    raise UserError(f'{sys.argv[2]!r} is one name too many')
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  files = loading.preset_files()
  if name in ('-h', '--help'):
    print((__doc__ or '').strip())
  elif name:
    print(_doc(import_file(files[choose('preset file', name, files)])).strip())
  else:
    print('\n\n'.join(_listed(*item) for item in files.items()))


def _listed(name: str, path: str) -> str:
  """Returns a preset file's presets and variants, a line each."""
  module = import_file(path)
  lines = [f'--config={name}  {_first_line(_doc(module))}']
  presets = getattr(module, 'PRESETS', {})
  lines += _lines(f'  {name}:', presets)
  variants = getattr(module, 'VARIANTS', {})
  lines += _lines('    ,' if presets else f'  {name}:', variants)
  return '\n'.join(lines)


def _lines(prefix: str, changes: Mapping[str, object]) -> list[str]:
  return [
    f'{prefix}{name:24} {_first_line(change.__doc__ or "")}'
    for name, change in changes.items()
  ]


def _first_line(doc: str) -> str:
  return doc.strip().split('\n')[0]


def _doc(module: ModuleType) -> str:
  return module.__doc__ or ''
