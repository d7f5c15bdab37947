"""The training loop: what happens, in order, on one page."""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax.data.pipeline import Windows, train_batches
from moe_jax.distributed import hosts
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.evaluation import perplexity
from moe_jax.training import origin
from moe_jax.training import state as state_lib
from moe_jax.training.checkpoint import Store, newest_step
from moe_jax.training.interrupt import Interrupt
from moe_jax.training.losses import Metrics
from moe_jax.training.report import Journal, check_finite, describe
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import make_eval_step, make_train_step


class Prepared(NamedTuple):
  """What a config stands for, before anything is compiled or written."""

  setup: Setup
  train_windows: Windows
  eval_windows: Windows | None


def prepare(config: ConfigDict) -> Prepared:
  """Checks the config, and opens the data it names.

  Raises:
    UserError: anything wrong with config or data.
  """
  setup = state_lib.from_config(config)

  def windows(split: str) -> Windows:
    return Windows.open(config.data, split, setup.tokenizer)

  return Prepared(
    setup,
    windows(config.data.train_split),
    windows(config.eval.split) if config.eval.every else None,
  )


def train(config: ConfigDict, workdir: str) -> None:
  """Trains in `workdir`, from its newest checkpoint if it has one.

  SIGINT or SIGTERM saves a checkpoint first (unless `checkpoint.every` is 0);
  the same call goes on from there.

  Args:
    config: see configs/base.py.
    workdir: gets metrics.jsonl, checkpoints/, tensorboard/ and config.json.

  Raises:
    UserError: anything wrong with config, data or workdir, before anything is
      compiled or overwritten; or the loss is no longer finite.
    SystemExit: 128 + the number of the signal that stopped it.
  """
  setup, train_windows, eval_windows = prepare(config)
  batch_size, steps = config.train.batch_size, config.train.steps
  sharding = mesh_lib.batch_sharding(setup.mesh)
  rows = hosts.local_rows(sharding, batch_size)
  # All that can be refused, before the workdir becomes this run's.
  newest = newest_step(workdir, config)
  given = origin.params(setup) if newest is None else None
  start = newest or 0
  batches = train_batches(
    train_windows,
    batch_size=batch_size,
    rows=rows,
    seed=config.seed,
    start=start,
    threads=config.data.threads,
    order=config.data.order,
  )
  with (
    contextlib.closing(batches),
    Store.open(workdir, config, setup.dictionary) as store,
    Interrupt() as interrupt,
  ):
    if newest is None:
      state = setup.init(given)
    else:
      state, _ = store.restore(setup.abstract, newest)
    train_step, eval_step = make_train_step(setup), make_eval_step(setup)
    with Journal(setup, workdir, start) as journal:
      journal.say(describe(setup, train_windows))
      for step in range(start + 1, steps + 1):
        batch = hosts.global_batch(next(batches), sharding, rows, batch_size)
        state, metrics = train_step(state, batch)
        journal.write()  # of the step before, now that this one runs
        if step == start + 1:
          journal.compiled(metrics)

        stopped = interrupt.signal is not None
        last = stopped or step == steps
        if _due(config.train.log_every, step, last):
          journal.note(step, metrics)
        if eval_windows and _due(config.eval.every, step, step == steps):
          _evaluate(setup, eval_step, state, eval_windows, journal, step)
        if _due(config.checkpoint.every, step, last):
          # Last: what is written of a step outlives a kill during the save.
          journal.write()
          check_finite(float(metrics['loss']), step)
          store.save(step, state, batches.state())
        if stopped:
          break
      journal.write()
      journal.say(journal.summary(int(state['step'])))
  if interrupt.signal is not None:
    raise SystemExit(128 + interrupt.signal)


def _evaluate(
  setup: Setup,
  eval_step: Callable[..., Metrics],
  state: TrainState,
  windows: Windows,
  journal: Journal,
  step: int,
) -> None:
  """Evaluates in the midst of training, which pauses."""
  config = setup.config
  journal.write()
  jax.block_until_ready(state)  # or its steps would count as evaluation
  began = time.perf_counter()
  result = perplexity.evaluate_split(
    eval_step,
    state['params'],
    windows,
    config,
    setup.mesh,
    max_batches=config.eval.batches,
  )
  seconds = time.perf_counter() - began
  name = config.eval.split + perplexity.suffix(result)
  journal.evaluation(step, name, result, seconds)


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)
