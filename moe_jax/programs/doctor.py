"""Says what is in the directory of a run, and what its next start would do.

  moe_jax doctor --workdir=runs/mine

It reads every checkpoint whole and holds it to its digests, looks for steps
that metrics.jsonl lacks, and says what the same command would do. It writes
nothing, also where the run is damaged or still trains.
"""

import json as json_lib
import sys

from absl import flags

from moe_jax import cli, runtime


def define_flags(values: flags.FlagValues) -> None:
  """Defines how it is told."""
  flags.DEFINE_boolean(
    'json', False, 'print one JSON object', flag_values=values
  )


def run() -> None:
  """Examines the workdir that the command line names, and prints it.

  Raises:
    UserError: There is no such directory.
    SystemExit: 1 if a checkpoint, or the config, is damaged.
  """
  options, _ = cli.read(
    sys.argv, define_flags, workdir=True, about=__doc__ or ''
  )
  # A run that trains may have the accelerators, and nothing here needs one.
  runtime.silence_libtpu()
  import jax

  jax.config.update('jax_platforms', 'cpu')
  from moe_jax.training import health

  as_json = options['json']
  found = health.examine(
    options['workdir'],
    lambda line: print(line, file=sys.stderr) if not as_json else None,
  )
  print(json_lib.dumps(found) if as_json else health.text(found))
  if found['config'] or any(each['reason'] for each in found['checkpoints']):
    raise SystemExit(1)


def main() -> None:
  """Examines what the command line names, and exits."""
  cli.exit_with(run)
