"""Times what a checkpoint of a config costs, and its digests in it.

  python -m benchmarks.checkpoints --config=quickstart --json

Saving and digests are measured in turn, so a machine whose speed drifts is fair
to both. The checkpoints go to a folder that is removed.
"""

import os
import statistics
import tempfile
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('rounds', 5, 'that are measured', flag_values=values)
  flags.DEFINE_string(
    'folder', None, 'where checkpoints are written', flag_values=values
  )


def run(
  config: ConfigDict, json: bool, rounds: int, folder: str | None
) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  from benchmarks import common

  common.show(measure(config, rounds, folder), json)


def measure(
  config: ConfigDict, rounds: int, folder: str | None = None
) -> dict[str, Any]:
  """Saves and restores the first state of a config.

  Args:
    config: The config of a run.
    rounds: How often, after once that is not timed.
    folder: Where the checkpoints are written; None is the usual place of
      temporary files.

  Returns:
    Medians over the rounds, in seconds: `digest` of the whole state,
    `save_blocking` until the next step can run and `save` until it is on disk,
    both with the digests, `restore` with verifying. Shares of digests in the
    two of saving; `state_bytes`, `arrays`, and where it ran.

  Raises:
    UserError: anything wrong with the config.
  """
  import jax

  from benchmarks import common
  from moe_jax.training import digests
  from moe_jax.training.checkpoint import Checkpointer
  from moe_jax.training.run_dir import RunDir

  made = common.set_up(config)
  state = jax.block_until_ready(made.init())
  seconds: dict[str, list[float]] = {}

  def timed(name: str, began: float) -> None:
    seconds.setdefault(name, []).append(time.perf_counter() - began)

  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    run_dir = RunDir.new_or_resumed(os.path.join(workdir, 'run'), config)
    with Checkpointer(run_dir) as checkpointer:
      run_dir.claim()
      for step in range(rounds + 1):
        state = state | {'step': state['step'] * 0 + step}
        began = time.perf_counter()
        digests.of_tree(state)
        timed('digest', began)
        began = time.perf_counter()
        checkpointer.save(step, state)
        timed('save_blocking', began)
        checkpointer.wait()
        timed('save', began)
        began = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(made.abstract).state)
        timed('restore', began)
  medians = {
    name: statistics.median(times[1:]) for name, times in seconds.items()
  }
  leaves = jax.tree.leaves(state)
  return {
    'benchmark': 'checkpoints',
    **{f'{name}_seconds': median for name, median in medians.items()},
    'digest_share_of_blocking': medians['digest'] / medians['save_blocking'],
    'digest_share_of_save': medians['digest'] / medians['save'],
    'state_bytes': sum(leaf.nbytes for leaf in leaves),
    'arrays': len(leaves),
    'rounds': rounds,
  } | common.place()


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
