"""Tells what a config will build and cost, before anything runs.

  moe_jax plan --config=cartesian_moe:large --devices=16

Everything follows from shapes: no array is made, whatever the model's size.
With --json it prints one JSON object instead of a table.

  moe_jax plan --config=... --compile --topology=v5e:16x16 --slices=2

also compiles the training step, for TPUs or (--topology=h100:1x8, hosts x GPUs)
NVIDIA's GPUs that need not be here, and tells what their compiler says; without
--topology, for the devices of this machine. --fit searches, by compiling, for
the batch and the rematerialisation that fit.
`python -m moe_jax.plan` is the same program.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean(
    'json', False, 'print one JSON object', flag_values=values
  )
  flags.DEFINE_integer(
    'devices',
    None,
    'the devices of all hosts together; those of this machine if left out',
    flag_values=values,
  )
  flags.DEFINE_string(
    'topology',
    None,
    'plan for a slice of TPUs, such as v5e:16x16, or hosts of GPUs, such as'
    ' h100:2x8; they need not be here',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'slices',
    1,
    'how many slices of that topology a slower network joins',
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'compile', False, 'compile the training step', flag_values=values
  )
  flags.DEFINE_boolean(
    'fit',
    False,
    'search for the largest batch and the lightest model.remat that fit; the'
    ' plan is then of these',
    flag_values=values,
  )


def run(config: ConfigDict, **options: Any) -> None:
  """Prints the plan of `config`; `options` are the flags by their names."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.planning import plan

  plan.run(config, **options)


def main() -> None:
  """Plans as the command line says, and exits."""
  cli.main(run, define_flags, workdir=False)


if __name__ == '__main__':
  main()
