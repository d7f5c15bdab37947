"""The command line of `moe_jax.interop.hf`: import, export, verify."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moe_jax import runtime
from moe_jax.errors import UserError
from moe_jax.interop import formats, programs, tensor_writer


def main(doc: str) -> NoReturn:
  """Parses the command line, runs the command and exits.

  A user's mistake becomes one line on stderr and exit status 2.
  """
  try:
    arguments = vars(_parser(doc).parse_args())
    run = arguments.pop('run')
    runtime.silence_libtpu()
    print(run(**arguments))
  except UserError as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    sys.exit(2)
  sys.exit(0)


class _Parser(argparse.ArgumentParser):
  """Reports mistakes as all programs of this library do."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; --help says more')


def _parser(doc: str) -> argparse.ArgumentParser:
  parser = _Parser(
    'python -m moe_jax.interop.hf',
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name: str, run: Callable[..., str], *paths: str) -> Any:
    about = (run.__doc__ or '').split(';')[0]
    made = commands.add_parser(name, help=about, allow_abbrev=False)
    made.set_defaults(run=run)
    for path in paths:
      made.add_argument(path, type=Path)
    return made

  made = command('import', programs.import_, 'checkpoint', 'workdir')
  made.add_argument(
    '--tokenizer',
    default='bytes',
    help="data.tokenizer of the workdir's config (%(default)s)",
  )
  made = command('export', programs.export, 'workdir', 'checkpoint')
  made.add_argument(
    '--format',
    choices=tuple(formats.FORMATS),
    help='the first that fits, but never mixtral, if left out',
  )
  _add_dtype(made)
  made.add_argument(
    '--max-shard-bytes',
    type=_size,
    default=0,
    help='begin another file when one is so large; 0, one file',
  )
  _add_step(made)
  made = command('verify', programs.verify, 'workdir', 'checkpoint')
  _add_dtype(made)
  _add_step(made)
  return parser


def _size(text: str) -> int:
  """A number of bytes."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f'{text!r} is no number of bytes')
  return int(text)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=tuple(tensor_writer.DTYPES),
    help='of the tensors in the checkpoint (%(default)s)',
  )


def _add_step(parser: argparse.ArgumentParser) -> None:
  about = 'of the checkpoint in the workdir; the newest if left out'
  parser.add_argument('--step', type=int, help=about)
