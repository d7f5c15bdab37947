"""The command line of `moe_jax convert`: import, export, verify, upcycle."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, files, runtime
from moe_jax.errors import UserError
from moe_jax.interop import formats, safetensors

_UPCYCLE = 'upcycle'
_ABOUT = """\
Released PyTorch checkpoints of RMoE and CartesianMoE, Mixtral's and Llama's:

  moe_jax convert import CHECKPOINT WORKDIR
  moe_jax convert export WORKDIR CHECKPOINT --format=mixtral
  moe_jax convert verify WORKDIR CHECKPOINT
  moe_jax convert upcycle --dense=DIR --config=FILE --workdir=DIR
"""
_ABOUT_UPCYCLE = """\
Begins a Mixture-of-Experts model as a trained dense one.

  moe_jax convert upcycle --dense=DIR --config=FILE --workdir=DIR

--dense is the workdir of a dense run, or the folder of a Llama in safetensors.
The workdir gets a checkpoint of step 0, from which `moe_jax train` goes on. The
command says whether the start is exactly the dense model, and by how much the
logits differ.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
  """Parses the command line, runs the command and exits.

  Args:
    argv: The arguments after the name of the program; None for those of this
      process.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if arguments[:1] == [_UPCYCLE]:
    _upcycle(arguments[1:])
  cli.exit_with(lambda: _run(vars(_parser().parse_args(arguments))))


def _upcycle(argv: Sequence[str]) -> NoReturn:
  """Parses the command line of `upcycle`, runs it and exits."""
  sys.argv[1:] = argv
  cli.main(_run_upcycle, _define_upcycle_flags, about=_ABOUT_UPCYCLE)


def _define_upcycle_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_string(
    'dense',
    '',
    'the dense model: a workdir or a checkpoint',
    flag_values=values,
  )


def _run_upcycle(config: ConfigDict, workdir: str, dense: str) -> None:
  """Writes a checkpoint of step 0 into `workdir`."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.interop import convert

  if not dense:
    raise UserError('--dense is missing: a workdir or the folder of a Llama')
  print(convert.upcycle(_path(dense), config, Path(workdir)))


def _run(arguments: dict[str, Any]) -> None:
  """Runs a command and prints its report."""
  runtime.silence_plugins()
  # Training's packages and jax, which a mistake on the command line needs not.
  from moe_jax.interop import convert

  command = getattr(convert, arguments.pop('command'))
  print(command(**arguments))


def _parser() -> argparse.ArgumentParser:
  """Returns the parser of all commands but `upcycle`, which has a config."""
  parser = cli.Parser(
    'moe_jax convert',
    description=_ABOUT,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def add(name: str, function: str, about: str, *paths: str) -> Any:
    command = commands.add_parser(name, help=about, allow_abbrev=False)
    command.set_defaults(command=function)
    for path in paths:
      command.add_argument(path, type=_path)
    return command

  about = 'makes a workdir of a released checkpoint'
  command = add('import', 'import_', about, 'checkpoint', 'workdir')
  command.add_argument(
    '--tokenizer',
    help="data.tokenizer of the workdir's config, a name or a file; that in the"
    " checkpoint's folder if left out, or bytes without one",
  )
  about = 'makes a released checkpoint of a workdir'
  command = add('export', 'export', about, 'workdir', 'checkpoint')
  command.add_argument(
    '--format',
    choices=tuple(formats.FORMATS),
    help='the first that fits, but never mixtral, if left out',
  )
  command.add_argument(
    '--max-shard-bytes',
    type=_size,
    default=0,
    help='begin another file when one is so large; 0, one file',
  )
  _add_dtype_and_step(command)
  about = 'holds a workdir to a released checkpoint'
  command = add('verify', 'verify', about, 'workdir', 'checkpoint')
  _add_dtype_and_step(command)
  about = 'begins a workdir from a dense model; see upcycle --help'
  add(_UPCYCLE, _UPCYCLE, about)
  return parser


def _path(text: str) -> Path:
  """Returns a path with ~ expanded."""
  return Path(files.expand(text))


def _size(text: str) -> int:
  """Returns a number of bytes."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f'{text!r} is no number of bytes')
  return int(text)


def _add_dtype_and_step(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=tuple(safetensors.DTYPES),
    help='dtype of the tensors in the checkpoint (%(default)s)',
  )
  parser.add_argument(
    '--step',
    type=int,
    help='step of the checkpoint in the workdir; the newest if left out',
  )
