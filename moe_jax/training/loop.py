"""The training loop: what happens, in order, on one page."""

import time
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax.data.pipeline import Windows, train_batches
from moe_jax.distributed import hosts
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.errors import UserError
from moe_jax.evaluation.perplexity import evaluate_split
from moe_jax.training import state as state_lib
from moe_jax.training.checkpoint import Store
from moe_jax.training.interrupt import Interrupt
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
  with (
    Store.open(workdir, config, setup.dictionary) as store,
    Interrupt() as interrupt,
  ):
    state, start = _restore_or_init(store, setup)
    batches = train_batches(
      train_windows,
      batch_size=batch_size,
      rows=rows,
      seed=config.seed,
      start=start,
      threads=config.data.threads,
      order=config.data.order,
    )
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
          journal.write()
          jax.block_until_ready(state)  # or its steps would count as evaluation
          began = time.perf_counter()
          result = evaluate_split(
            eval_step,
            state['params'],
            eval_windows,
            config,
            setup.mesh,
            max_batches=config.eval.batches,
          )
          seconds = time.perf_counter() - began
          journal.evaluation(step, config.eval.split, result, seconds)
        if _due(config.checkpoint.every, step, last):
          # Last: what is written of a step outlives a kill during the save.
          journal.write()
          check_finite(float(metrics['loss']), step)
          store.save(step, state, batches.state())
        if stopped:
          break
      journal.write()
      journal.say(journal.summary(int(state['step'])))
    batches.close()
  if interrupt.signal is not None:
    raise SystemExit(128 + interrupt.signal)


def _restore_or_init(store: Store, setup: Setup) -> tuple[TrainState, int]:
  """The state to go on from, and the steps it has done."""
  if store.latest_step() is None:
    return _start(setup), 0
  state, position = store.restore(setup.abstract)
  return state, position['step']


def _start(setup: Setup) -> TrainState:
  """A new run's state, on the parameters that `train.init_from` names.

  Raises:
    UserError: that is no run, or one of another model.
  """
  origin = setup.config.train.init_from
  if not origin:
    return setup.init()
  try:
    with Store.open(
      origin, setup.config, setup.dictionary, read_only=True
    ) as store:
      found, _ = store.restore({'params': setup.abstract['params']})
  except UserError as error:
    raise UserError(f'train.init_from: {error}') from error
  return setup.init() | found


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)
