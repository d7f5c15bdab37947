"""What the recurrent router costs: its training step over the linear router's.

  python -m benchmarks.router_cost --config=configs/rmoe.py:enwik8_medium --json

Steps of both alternate in one process, so that a machine whose speed drifts is
fair to them. RMoE (arXiv 2408.06793, table 1) reports 1.3 % more time.
"""

import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('steps', 10, 'of each, measured', flag_values=values)
  flags.DEFINE_integer('warmup', 3, 'of each before them', flag_values=values)


def run(config: ConfigDict, json: bool, steps: int, warmup: int) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  common.show(measure(config, steps, warmup), json)


def measure(config: ConfigDict, steps: int, warmup: int) -> dict[str, Any]:
  """Times the training step of a config and of the same without recurrence.

  Returns:
    `step_seconds` and `linear_step_seconds` (medians), `ratio` (the median of
    the ratios of steps that ran one after the other), `ratio_min` and
    `ratio_max`, and where it ran.

  Raises:
    UserError: anything wrong with the config or the numbers of steps, or its
      router is not recurrent.
  """
  import jax
  import numpy as np

  from benchmarks import common
  from moe_jax.planning.compiled import train_step as compile_train_step

  common.check_steps(steps, warmup)
  if config.router.recurrent == 'none':
    raise UserError(
      "router.recurrent = 'none' is what the cost is measured against;"
      ' choose a cell'
    )
  programs, states = [], []
  for each in (config, _linear(config)):
    made = common.set_up(each)
    programs.append(compile_train_step(made)[0])
    states.append(jax.block_until_ready(made.init()))
  seconds = []
  for batch in common.random_batches(made, warmup + steps):
    pair = []
    for i, program in enumerate(programs):
      began = time.perf_counter()
      states[i], _ = jax.block_until_ready(program(states[i], batch))
      pair.append(time.perf_counter() - began)
    seconds.append(pair)
  measured = np.array(seconds[warmup:])
  ratios = measured[:, 0] / measured[:, 1]
  return {
    'benchmark': 'router_cost',
    'step_seconds': float(np.median(measured[:, 0])),
    'linear_step_seconds': float(np.median(measured[:, 1])),
    'ratio': float(np.median(ratios)),
    'ratio_min': float(ratios.min()),
    'ratio_max': float(ratios.max()),
    'steps': steps,
  } | common.place()


def _linear(config: ConfigDict) -> ConfigDict:
  """The same with a router without memory."""
  linear = config.copy_and_resolve_references()
  linear.router.recurrent = 'none'
  linear.router.projector = 'layerwise'
  linear.router.passing = 'state'
  return linear


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
