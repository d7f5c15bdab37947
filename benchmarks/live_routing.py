"""What watching the routers costs: steps with it over steps without it.

  python -m benchmarks.live_routing --config=quickstart --json

Both train and log as a run does, every `train.log_every` steps, a round of one
after a round of the other in one process. Without it the step returns no sums
over the routing and nothing is written of them. Every logged step has a picture
of the load, which in a run of more than 100 logged steps some have not. How
long `train.router_gradients_every` takes is measured beside them, in steps.
"""

import contextlib
import io
import tempfile
import time
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.errors import UserError

if TYPE_CHECKING:
  from moe_jax.training.logger import Logger
  from moe_jax.training.state import Setup


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('rounds', 10, 'of each, measured', flag_values=values)
  flags.DEFINE_integer('warmup', 2, 'of each before them', flag_values=values)


def run(config: ConfigDict, json: bool, rounds: int, warmup: int) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  common.show(measure(config, rounds, warmup), json)


def measure(config: ConfigDict, rounds: int, warmup: int) -> dict[str, Any]:
  """Times rounds of `train.log_every` steps and what is logged of them.

  Returns:
    `seconds` and `seconds_without` of a round (medians), `ratio` (the median of
    the ratios of rounds that ran one after the other), its quartiles
    `ratio_low` and `ratio_high`, `write_seconds` and `write_seconds_without`
    (medians, of the host, for a logged step), `router_gradients` (the time to
    measure them over that of a step), and where it ran.

  Raises:
    UserError: Anything is wrong with the config or the numbers of rounds, or it
      has no experts or logs nothing.
  """
  import jax
  import numpy as np

  from benchmarks import common
  from moe_jax.training.logger import Logger

  if rounds < 1 or warmup < 1:
    raise UserError(
      f'--rounds = {rounds} and --warmup = {warmup} must be at least 1'
    )
  if not config.moe.num_experts or not config.train.log_every:
    raise UserError(
      f'moe.num_experts = {config.moe.num_experts} and train.log_every ='
      f' {config.train.log_every} must be at least 1: there is nothing to watch'
    )
  config = config.copy_and_resolve_references()
  steps = config.train.log_every
  config.train.steps = (warmup + rounds) * steps
  made = common.set_up(config)
  batches = common.random_batches(made, steps)
  sides, seconds, written = [], [], []
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    for program in _programs(made):
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      logger = stack.enter_context(Logger(made, folder, None))
      sides.append(_Side(program, logger, jax.block_until_ready(made.init())))
    for n in range(warmup + rounds):
      # Who goes first changes, as who goes second finds the caches warm.
      order = sides if n % 2 else sides[::-1]
      for side in order:
        side.round(batches)
      seconds.append([side.seconds for side in sides])
      written.append([side.write_seconds for side in sides])
    gradients = _gradients(made, sides[0].state, batches[0], rounds)
  measured, writes = np.array(seconds[warmup:]), np.array(written[warmup:])
  ratios = measured[:, 0] / measured[:, 1]
  on, off = np.median(measured, axis=0)
  return {
    'benchmark': 'live_routing',
    'seconds': float(on),
    'seconds_without': float(off),
    'ratio': float(np.median(ratios)),
    'ratio_low': float(np.quantile(ratios, 0.25)),
    'ratio_high': float(np.quantile(ratios, 0.75)),
    'write_seconds': float(np.median(writes[:, 0])),
    'write_seconds_without': float(np.median(writes[:, 1])),
    'router_gradients': gradients / (off / steps),
    'rounds': rounds,
    'steps_of_a_round': steps,
  } | common.place()


class _Side:
  """A run that trains and logs, in rounds."""

  def __init__(self, program: Any, logger: 'Logger', state: Any) -> None:
    self._program = program
    self._logger = logger
    self._step = 0
    self.state = state
    self.seconds = self.write_seconds = 0.0

  def round(self, batches: list[Any]) -> None:
    """Does a step for each batch, and logs the last as the loop does."""
    import jax

    began, self.write_seconds = time.perf_counter(), 0.0
    for batch in batches:
      self._step += 1
      self.state, metrics = self._program(self.state, batch)
      self._write(metrics)
    self._logger.note(self._step, metrics, 0.0)
    jax.block_until_ready(self.state)
    self.seconds = time.perf_counter() - began

  def _write(self, metrics: dict[str, Any]) -> None:
    """Writes what was noted of the step before, and times the host alone."""
    if self._logger.compiled(metrics, 0.0):
      return
    began = time.perf_counter()
    self._logger.write(0)
    self.write_seconds += time.perf_counter() - began


def _programs(made: 'Setup') -> tuple[Any, Any]:
  """Returns the training step with and without sums over the routing."""
  import jax

  from moe_jax.training.step import make_train_step

  train_step = make_train_step(made)

  def without(state: Any, batch: Any) -> Any:
    state, metrics = train_step(state, batch)
    return state, metrics | {'load': None}

  return train_step, jax.jit(without, donate_argnums=0)


def _gradients(made: 'Setup', state: Any, batch: Any, rounds: int) -> float:
  """Returns the median seconds to measure the routers' gradients."""
  import jax
  import numpy as np

  from moe_jax.training.router_gradients import make_router_norms

  norms, seconds = make_router_norms(made), []
  for _ in range(1 + rounds):
    began = time.perf_counter()
    jax.block_until_ready(norms(state, batch))
    seconds.append(time.perf_counter() - began)
  return float(np.median(seconds[1:]))


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
