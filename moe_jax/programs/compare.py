"""Trains variants of a config with several seeds and compares them.

  moe_jax compare --config=quickstart --variants=linear,rmoe --seeds=3 \\
    --workdir=runs/compare

Every run is an ordinary one, in DIR/VARIANT/seed-S, and is evaluated on a whole
split when it is trained. The table at the end, and DIR/compare.json after every
run, have the mean over the seeds and the paired difference to the baseline. The
same command again goes on where it was stopped or killed; with more variants or
seeds it adds them.
"""

import sys

from absl import flags

from moe_jax import cli, runtime


def define_flags(values: flags.FlagValues) -> None:
  """Defines what is compared, and how."""
  values['workdir'].help = 'the directory of the comparison'
  texts = {
    'variants': 'variants of the config file with commas between, + joins'
    ' several in one row, such as linear,rmoe,rmoe+np; base is the config as it'
    ' is, all every single variant; may be left out where --workdir holds a'
    ' comparison',
    'seeds': 'how many seeds, from 0 on, or a list of them, such as 3,7,11',
    'baseline': 'the variant that others are compared with; the first if left'
    ' out',
    'match': 'what is made equal to the baseline by the width of the experts:'
    ' parameters, active (those of a token), flops (of a token) or none, which'
    ' is meant if left out',
    'split': 'the split that is compared; eval.split if left out',
  }
  defaults = {'seeds': '3'}
  for name, about in texts.items():
    flags.DEFINE_string(name, defaults.get(name), about, flag_values=values)
  flags.DEFINE_multi_string(
    'sweep',
    [],
    'KEY:V1,V2,...: the first seed is trained with each value, the others with'
    ' the one that is best on eval.split; may be given for several keys',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'jobs',
    None,
    'how many runs are trained side by side; one for each core or GPU if left'
    ' out',
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'dry_run',
    False,
    'print what would be trained, and stop',
    flag_values=values,
  )


def run() -> None:
  """Compares as the command line says.

  Raises:
    UserError: Anything is wrong with it, before anything is trained.
    SystemExit: 1 if a run failed; 128 + the number of the signal that stopped
      the comparison.
  """
  runtime.silence_plugins()
  options, overrides = cli.read(
    sys.argv, define_flags, workdir=True, about=__doc__ or ''
  )
  # It imports jax, which a mistake on the command line need not wait for.
  from moe_jax.programs import comparing

  comparing.run(overrides=overrides, **options)


def main() -> None:
  """Compares as the command line says, and exits."""
  cli.exit_with(run)
