"""Tokens as a terminal shows them, coloured by their experts."""

import colorsys
import os
import sys

# Hues of experts in turn go round by this part of a circle: neighbours differ.
_GOLDEN = 0.618
_RESET = '\x1b[0m'


def wanted() -> bool:
  """Returns whether stdout takes colours (no-color.org)."""
  if os.environ.get('NO_COLOR'):
    return False
  return sys.stdout.isatty() or bool(os.environ.get('FORCE_COLOR'))


def coloured(text: str, expert: int | None) -> str:
  """Returns a text on the background of an expert, line by line.

  Args:
    text: What may be shown.
    expert: Its number; None for a token without one.
  """
  if expert is None:
    return text
  style = f'\x1b[38;5;16m\x1b[48;5;{_colour(expert)}m'
  # A background that is open at the end of a line fills the whole of it.
  return '\n'.join(
    f'{style}{part}{_RESET}' if part else '' for part in text.split('\n')
  )


def numbered(text: str, expert: int | None) -> str:
  """Returns a text with the number of its expert behind it."""
  return text if expert is None or not text else f'{text}[{expert}]'


def visible(text: str) -> str:
  """Returns a text in which control characters do nothing.

  A model may write what moves a cursor, or changes the title of a window.
  """
  return ''.join(
    c if c.isprintable() or c in '\n\t' else f'\\x{ord(c):02x}' for c in text
  )


def _colour(expert: int) -> int:
  """Returns one of the light ones of a terminal's 256 colours."""
  shade = (1.0, 0.8)[expert // 12 % 2]
  rgb = colorsys.hsv_to_rgb(expert * _GOLDEN % 1, 0.55, shade)
  red, green, blue = (round(5 * part) for part in rgb)
  return 16 + 36 * red + 6 * green + blue
