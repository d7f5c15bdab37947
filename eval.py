"""Evaluates a checkpoint of a run.

python eval.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli


def define_flags(values: flags.FlagValues) -> None:
  """The flags of train.py and more."""
  cli.define_process_flags(values)
  flags.DEFINE_integer(
    'step',
    None,
    'of the checkpoint; the newest if left out',
    flag_values=values,
  )
  flags.DEFINE_string(
    'split', None, 'of the data; eval.split if left out', flag_values=values
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
  from moe_jax.evaluation import perplexity
  from moe_jax.parallel import launch

  launch.initialize(**place)
  perplexity.evaluate(config, workdir, step=step, split=split)


if __name__ == '__main__':
  cli.main(run, define_flags)
