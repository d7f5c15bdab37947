"""Command lines of measurements that need no config."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from moe_jax import exits, runtime
from moe_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
  """Reports mistakes as all programs of this library do."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; --help says more')


def bare(description: str) -> argparse.ArgumentParser:
  """Without flags."""
  return _Parser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def parser(description: str) -> argparse.ArgumentParser:
  """With the flags that measurements have: --json and --rounds."""
  made = bare(description)
  made.add_argument('--json', action='store_true', help='a JSON line per case')
  made.add_argument('--rounds', type=int, default=9, help='that are measured')
  return made


def add_dtype(made: argparse.ArgumentParser) -> None:
  """The flag --dtype; see `timing.dtype_of`."""
  made.add_argument('--dtype', choices=('auto', 'float32', 'bfloat16'),
                    default='auto', help='auto: float32 on CPU')  # fmt: skip


def sizes(names: str) -> Callable[[str], dict[str, int]]:
  """A type of arguments: as many numbers joined by x as there are names."""

  def parse(text: str) -> dict[str, int]:
    numbers = [int(part) for part in text.split('x')]
    if len(numbers) != len(names.split()) or min(numbers) < 1:
      raise ValueError(text)
    return dict(zip(names.split(), numbers, strict=True))

  parse.__name__ = ' x '.join(names.split())  # for argparse's message
  return parse


def main(
  program: Callable[[argparse.Namespace], None],
  made: argparse.ArgumentParser,
  arguments: Sequence[str] | None = None,
) -> None:
  """Runs it with the allocator set, and ends as all programs do."""

  def run() -> None:
    args = made.parse_args(arguments)
    runtime.configure_malloc()
    runtime.configure_gpu()
    if 'rounds' in args and args.rounds < 1:
      raise UserError(f'--rounds = {args.rounds} must be at least 1')
    program(args)

  if status := exits.ended(run):
    sys.exit(status)
