"""One command for all programs: `moe_jax PROGRAM`, or `python -m moe_jax`."""

import importlib
import sys
from typing import NamedTuple

from moe_jax import exits
from moe_jax.errors import UserError, nearest


class Program(NamedTuple):
  """A program; its module has a function `main` that reads sys.argv.

  Attributes:
    module: The module, imported only where it is run.
    about: What the program does, in a line.
  """

  module: str
  about: str


PROGRAMS = {
  'train': Program('programs.train', 'trains a model, or goes on with a run'),
  'eval': Program('programs.eval', 'evaluates a checkpoint of a run'),
  'generate': Program('programs.generate', 'goes on with prompts'),
  'plan': Program('plan', 'what a config builds and costs, before it runs'),
  'presets': Program('programs.presets', 'lists the presets and variants'),
  'convert': Program(
    'interop.cli',
    'import, export, verify: released checkpoints; upcycle: dense ones',
  ),
  'tokenizer': Program(
    'programs.tokenizer', 'makes a sub-word vocabulary, shows tokens'
  ),
  'analyze': Program('programs.analyze', 'measures the routing of runs'),
  'compare': Program(
    'programs.compare', 'trains variants x seeds and compares them'
  ),
  'doctor': Program(
    'programs.doctor',
    'checks checkpoints, says what the next start would do; does a step again',
  ),
  'plots': Program('analysis.plots', 'draws the curves of runs'),
  'report': Program('analysis.report', 'makes an HTML page of runs'),
}


def main() -> None:
  """Runs the program that the command line names, and exits."""
  exits.exit_with(run)


def run() -> None:
  """Runs the program that the command line names.

  Raises:
    UserError: There is no such program.
  """
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in ('-h', '--help', 'help'):
    print(listed())
    return
  if name not in PROGRAMS:
    raise UserError(
      f"there is no program '{name}'{nearest(name, PROGRAMS)}"
      f' (known: {", ".join(PROGRAMS)})'
    )
  module = importlib.import_module(f'moe_jax.{PROGRAMS[name].module}')
  sys.argv = [f'moe_jax {name}', *sys.argv[2:]]
  sys.exit(module.main())


def listed() -> str:
  """Returns how the command is used, the programs a line each."""
  lines = [f'  {name:10}{program.about}' for name, program in PROGRAMS.items()]
  return '\n'.join(
    [
      'usage: moe_jax PROGRAM [--config=NAME] [--workdir=DIR] ...',
      '',
      *lines,
      '',
      '`moe_jax PROGRAM --help` tells the flags of a program, and',
      '`moe_jax train --help=SECTION` the keys of a section of the config.',
    ]
  )


if __name__ == '__main__':
  main()
