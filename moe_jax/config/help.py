"""Tells the keys of a config, for --help and for `docs/configs.md`.

python -m moe_jax.config.help > docs/configs.md
"""

import textwrap

from moe_jax.config.keys import Key
from moe_jax.config.schema import KEYS, SECTIONS
from moe_jax.errors import choose

_HEAD = """\
# The keys of a config

Generated from `moe_jax/config/schema.py` by `python -m moe_jax.config.help`.
`--config.KEY=VALUE` changes a key; `--help=SECTION` tells the same in a
terminal. A key that an older run does not have means its default. Keys with
**r** may change when a run is resumed; those with **f** are part of the
function that a model computes, so evaluating a run with another value is
refused. Whole numbers are at most 2**31 - 1 where nothing else is said.
"""


def sections() -> str:
  """Returns the sections of the config, a line each."""
  lines = [
    textwrap.fill(
      about,
      width=80,
      initial_indent=f'  --help={name}'.ljust(22),
      subsequent_indent=' ' * 22,
    )
    for name, about in SECTIONS.items()
  ]
  return '\n'.join(['The keys of the config, by section:', *lines])


def section(name: str) -> str:
  """Returns the keys of a section, with what they mean and may be.

  Raises:
    UserError: There is no such section; a key stands for itself.
  """
  if name in KEYS:
    return _told(name, KEYS[name])
  choose('--help', name, SECTIONS)
  keys = [
    _told(each, key)
    for each, key in KEYS.items()
    if each.startswith(f'{name}.')
  ]
  return '\n'.join([f'{name}: {SECTIONS[name]}', *keys])


def table() -> str:
  """Returns `docs/configs.md`: every key in tables of Markdown."""
  parts = [_HEAD, _rows('')]
  for name, about in SECTIONS.items():
    parts.append(f'\n## {name}\n\n{about}\n\n{_rows(name)}')
  return '\n'.join(parts)


def _told(name: str, key: Key) -> str:
  """Returns what a key is, in some lines."""
  about = f'{key.meaning}{_only(key)} ({key.wanted()})'
  resume = ' May change on resume.' if key.resume else ''
  lines = textwrap.wrap(
    about + resume,
    width=80,
    initial_indent='      ',
    subsequent_indent='      ',
    break_on_hyphens=False,
  )
  return '\n'.join([f'  --config.{name}={key.default}', *lines])


def _only(key: Key) -> str:
  """Returns with which values of another key a key has a meaning."""
  return f' Only with {key.only}.' if key.only else ''


def _rows(section: str) -> str:
  """Returns the table of the keys right in a section."""
  rows = ['| key | default | | what it means | values |', '|-|-|-|-|-|']
  for name, key in KEYS.items():
    if name.rpartition('.')[0] == section:
      marks = ' '.join('r' * key.resume + 'f' * key.function)
      about = f'{key.meaning}{_only(key)}'
      rows.append(
        f'| `{name}` | `{key.default!r}` | {marks} | {about} | {key.wanted()} |'
      )
  return '\n'.join(rows)


if __name__ == '__main__':
  print(table())
