"""How compile time grows with depth: the training step of 4 and of 24 layers.

  python -m benchmarks.compile_depth --config=configs/quickstart.py --json

The layers are scanned, so it should hardly grow: the goal is a ratio of 1.3.
Whatever the config says, every second layer is MoE and the others are dense.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError

DEPTHS = (4, 24)
GOAL = 1.3


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('repeats', 3, 'per depth', flag_values=values)


def run(config: ConfigDict, json: bool, repeats: int) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  row = measure(config, DEPTHS, repeats)
  common.show(row, json)


def measure(
  config: ConfigDict, depths: Sequence[int], repeats: int
) -> dict[str, Any]:
  """Compiles the training step of every depth `repeats` times, in turn.

  Returns:
    `compile_seconds`, the median of every depth; `ratio`, the last depth's to
    the first's; its `goal`; and where it ran.

  Raises:
    UserError: anything wrong with the config or the number of repeats.
  """
  import numpy as np

  from benchmarks import common
  from moe_jax.planning.compiled import train_step as compile_train_step

  if repeats < 1:
    raise UserError(f'--repeats = {repeats} must be at least 1')
  setups = {depth: common.set_up(_of_depth(config, depth)) for depth in depths}
  compile_train_step(setups[depths[0]])  # the first one starts XLA up
  seconds = {depth: [] for depth in depths}
  for _ in range(repeats):
    for depth, setup in setups.items():
      seconds[depth].append(compile_train_step(setup)[1])
  medians = {depth: float(np.median(seconds[depth])) for depth in depths}
  return {
    'benchmark': 'compile_depth',
    'compile_seconds': {str(depth): medians[depth] for depth in depths},
    'ratio': medians[depths[-1]] / medians[depths[0]],
    'goal': GOAL,
    'repeats': repeats,
  } | common.place()


def _of_depth(config: ConfigDict, num_layers: int) -> ConfigDict:
  """The same with so many layers, MoE and dense in turn."""
  changed = config.copy_and_resolve_references()
  changed.model.num_layers = num_layers
  changed.moe.every = 2
  changed.moe.offset = 0
  changed.moe.first_dense = 0
  return changed


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
