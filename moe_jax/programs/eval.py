"""Evaluates a checkpoint of a run.

  moe_jax eval --workdir=runs/quickstart

The config is the run's own; --config.KEY=VALUE changes what may be changed. In
a clone, `python eval.py` is the same program.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of training, and which checkpoint and data to take."""
  cli.define_process_flags(values)
  flags.DEFINE_integer(
    'step',
    None,
    'the step of the checkpoint; the newest if left out',
    flag_values=values,
  )
  flags.DEFINE_string(
    'split',
    None,
    'the split of the data; eval.split if left out',
    flag_values=values,
  )


def run(
  config: ConfigDict,
  workdir: str,
  step: int | None,
  split: str | None,
  **place: Any,
) -> None:
  """Evaluates the checkpoint of `step` in `workdir` on `split`."""
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.evaluation import checkpoints
  from moe_jax.parallel import launch

  with launch.joined(**place):
    checkpoints.evaluate(config, workdir, step=step, split=split)


def main() -> None:
  """Evaluates as the command line says, and exits."""
  cli.main(run, define_flags)
