"""The training loop: what happens, in order, on one page."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import runtime
from moe_jax.data.pipeline import TokenSequences
from moe_jax.errors import UserError
from moe_jax.evaluation import perplexity
from moe_jax.parallel import multihost
from moe_jax.training import init_from
from moe_jax.training import state as state_lib
from moe_jax.training.batches import Batches
from moe_jax.training.checkpoint import Checkpointer, newest_step
from moe_jax.training.logger import Logger
from moe_jax.training.losses import Metrics
from moe_jax.training.metrics import check_finite
from moe_jax.training.record import describe
from moe_jax.training.signals import SignalHandler
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import make_eval_step, make_train_step


class Prepared(NamedTuple):
  """What a config stands for, before anything is compiled or written."""

  setup: Setup
  train_sequences: TokenSequences
  eval_sequences: TokenSequences | None


def prepare(config: ConfigDict) -> Prepared:
  """Checks the config, and opens the data it names.

  Raises:
    UserError: anything wrong with config or data.
  """
  setup = state_lib.from_config(config)

  def sequences(split: str) -> TokenSequences:
    return TokenSequences.open(config.data, split, setup.tokenizer)

  return Prepared(
    setup,
    sequences(config.data.train_split),
    sequences(config.eval.split) if config.eval.every else None,
  )


def train(config: ConfigDict, workdir: str) -> None:
  """Trains in `workdir`, from its newest checkpoint if it has one.

  SIGINT, SIGTERM or SIGHUP saves a checkpoint first (unless `checkpoint.every`
  is 0); the same call goes on from there. All processes of a run call this
  alike; a signal to one of them stops all.

  Args:
    config: see configs/base.py.
    workdir: gets metrics.jsonl, checkpoints/, tensorboard/ and config.json.

  Raises:
    UserError: anything wrong with config, data or workdir, before anything is
      compiled or overwritten; or a device's memory is too small, or the loss is
      no longer finite.
    SystemExit: 128 + the number of the signal that stopped it.
  """
  setup, train_sequences, eval_sequences = multihost.first_process_first(
    lambda: prepare(config)
  )
  # All that can be refused, before the workdir becomes this run's.
  newest = newest_step(workdir, config)
  given = init_from.params(setup) if newest is None else None
  start = newest or 0
  batches = Batches(setup, train_sequences, start)
  with (
    contextlib.closing(batches),
    Checkpointer.open(workdir, config, setup.dictionary) as store,
    SignalHandler() as signals,
    _too_large_in_one_line(),
  ):
    if newest is None:
      state = setup.init(given)
    else:
      state, _ = store.restore(setup.abstract, newest)
    with multihost.fail_together(
      lambda: Logger(setup, workdir, start)
    ) as logger:
      logger.say(describe(setup, train_sequences))
      run = _Run(setup, batches, eval_sequences, store, logger, signals)
      done = _steps(run, state, start)
      logger.say(logger.summary(done))
  if signals.signal is not None:
    raise SystemExit(128 + signals.signal)


@contextlib.contextmanager
def _too_large_in_one_line() -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    said = ' '.join(str(error).split())
    if not said.startswith('RESOURCE_EXHAUSTED'):
      raise
    raise UserError(
      f'memory is too small ({said[:200]}); less is needed with a smaller'
      ' train.batch_size or a larger train.accumulation, with model.remat ='
      " 'full', or with more devices along mesh.*: python -m moe_jax.plan"
      ' says how much'
    ) from error


class _Run(NamedTuple):
  """What the steps of a run read from and write to."""

  setup: Setup
  batches: Batches
  eval_sequences: TokenSequences | None
  store: Checkpointer
  logger: Logger
  signals: SignalHandler


def _steps(run: _Run, state: TrainState, start: int) -> int:
  """Trains from step `start` on, until it is done or stopped, and when."""
  setup, batches, _, store, logger, signals = run
  config, steps = setup.config, setup.config.train.steps
  train_step, eval_step = make_train_step(setup), make_eval_step(setup)
  for step in range(start + 1, steps + 1):
    state, metrics = train_step(state, next(batches))
    logger.write()  # of the step before, now that this one runs
    if step == start + 1:
      logger.compiled(metrics)
      runtime.trim_malloc()  # what compiling took

    stopped = signals.stops(step)
    last = stopped or step == steps
    if _due(config.train.log_every, step, last):
      logger.note(step, metrics)
    if _due(config.train.check_replicas_every, step, step == steps):
      multihost.check_replicas(state)
    if run.eval_sequences and _due(config.eval.every, step, step == steps):
      _evaluate(run, eval_step, state, step)
    if _due(config.checkpoint.every, step, last):
      # Last: what is written of a step outlives a kill during the save.
      logger.write()
      check_finite(float(metrics['loss']), step)
      store.save(step, state, batches.state())
    if stopped:
      break
  logger.write()
  return int(state['step'])


def _evaluate(
  run: _Run,
  eval_step: Callable[..., Metrics],
  state: TrainState,
  step: int,
) -> None:
  """Evaluates in the midst of training, which pauses."""
  config, logger = run.setup.config, run.logger
  logger.write()
  jax.block_until_ready(state)  # or its steps would count as evaluation
  began = time.perf_counter()
  result = perplexity.evaluate_split(
    eval_step,
    state['params'],
    run.eval_sequences,
    config,
    run.setup.mesh,
    max_batches=config.eval.batches,
  )
  seconds = time.perf_counter() - began
  runtime.trim_malloc()  # the first time, evaluation is compiled
  name = config.eval.split + perplexity.suffix(result)
  logger.evaluation(step, name, result, seconds)


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)
