"""The training loop: what happens, in order, on one page."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import evaluation, runtime
from moe_jax.data.pipeline import TokenSequences
from moe_jax.errors import UserError
from moe_jax.evaluation import Evaluation
from moe_jax.parallel import multihost, peers
from moe_jax.training import init_from
from moe_jax.training import state as state_lib
from moe_jax.training.batches import Batches
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.logger import Logger
from moe_jax.training.metrics import check_finite
from moe_jax.training.profiler import Profiler
from moe_jax.training.record import describe, record
from moe_jax.training.run_dir import RunDir
from moe_jax.training.signals import SignalHandler
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import make_train_step
from moe_jax.training.watchdog import Watchdog, waits_for


class Prepared(NamedTuple):
  """What a config stands for, before anything is compiled or written."""

  setup: Setup
  sequences: TokenSequences
  evaluations: list[Evaluation]


def prepare(config: ConfigDict) -> Prepared:
  """Checks the config, and opens the data it names.

  Raises:
    UserError: Anything is wrong with config or data.
  """
  setup = state_lib.from_config(config)
  assert setup.tokenizer is not None  # from_config asks for the data's
  return Prepared(
    setup,
    TokenSequences.open(config.data, config.data.train_split, setup.tokenizer),
    evaluation.make(setup, config.eval.split) if config.eval.every else [],
  )


def train(config: ConfigDict, workdir: str) -> None:
  """Trains in `workdir`, from its newest checkpoint if it has one.

  SIGINT, SIGTERM or SIGHUP saves a checkpoint first (unless `checkpoint.every`
  is 0); the same call goes on from there. All processes of a run call this
  alike; a signal to one of them stops all.

  Args:
    config: The config, with the keys of `moe_jax.config.schema`.
    workdir: The directory that gets metrics.jsonl, checkpoints/, tensorboard/,
      config.json and run.json.

  Raises:
    UserError: Anything is wrong with config, data or workdir, before anything
      is compiled or overwritten; or a device's memory is too small, or the loss
      is no longer finite.
    SystemExit: 128 + the number of the signal that stopped it.
  """
  setup, sequences, evaluations = multihost.first_process_first(
    lambda: prepare(config)
  )
  run = RunDir.new_or_resumed(workdir, config)
  with (
    Watchdog(config.train.watchdog, config.train.watchdog_exit),
    run.held(),
    SignalHandler() as signals,
    Checkpointer(
      run, setup.vocabulary, sequences.fingerprint()
    ) as checkpointer,
    _too_large_in_one_line(),
  ):
    peers.set_outlook(checkpointer.outlook)
    # All that can be refused, before the workdir becomes this run's.
    restored = checkpointer.resume(setup.abstract)
    params = None if restored else init_from.params(setup)
    start, position = (restored.step, restored.position) if restored else (0, 0)
    with contextlib.closing(Batches(setup, sequences, position)) as batches:
      run.claim(record(setup, workdir, start))
      state = restored.state if restored else setup.init(params)
      del restored, params  # the steps will take their memory
      with (
        multihost.fail_together(
          lambda: Logger(setup, workdir, start)
        ) as logger,
        Profiler(config.train.profile, workdir) as profiler,
      ):
        logger.say(describe(setup, sequences))
        done = _steps(
          _Run(
            setup, batches, evaluations, checkpointer, logger, profiler, signals
          ),
          state,
          start,
        )
        logger.say(logger.summary(done))
        waits_for('the last save')
  if signals.signal is not None:
    raise SystemExit(128 + signals.signal)


@contextlib.contextmanager
def _too_large_in_one_line() -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = ' '.join(str(error).split())
    if not reason.startswith('RESOURCE_EXHAUSTED'):
      raise
    raise UserError(
      f'memory is too small ({reason[:200]}); less is needed with a smaller'
      ' train.batch_size or a larger train.accumulation, with model.remat ='
      " 'full', or with more devices along mesh.*: moe_jax plan says how much"
    ) from error


class _Run(NamedTuple):
  """What the steps of a run read from and write to."""

  setup: Setup
  batches: Batches
  evaluations: list[Evaluation]
  checkpointer: Checkpointer
  logger: Logger
  profiler: Profiler
  signals: SignalHandler


def _steps(run: _Run, state: TrainState, start: int) -> int:
  """Trains from step `start` on, until done or stopped; returns the step."""
  setup, batches, _, checkpointer, logger, profiler, signals = run
  config, steps = setup.config, setup.config.train.steps
  train_step = make_train_step(setup)
  if start and _evaluates(run, start) and not logger.evaluated():
    _evaluate(run, state, start)  # a signal had cut that evaluation short
  if start < steps:
    logger.compiling()
  for step in range(start + 1, steps + 1):
    waits_for(f'step {step}')
    profiler.start(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      state, metrics = train_step(state, next(batches))
    profiler.stop(step, metrics)
    logger.write()  # of the step before, now that this one runs
    if step == start + 1:
      logger.compiled(metrics)
      runtime.trim_malloc()  # what compiling took
      signals.catch()  # before this there is nothing to save

    stopped = signals.stops()
    last = stopped or step == steps
    if _due(config.train.log_every, step, last):
      logger.note(step, metrics)
    if _due(config.train.check_replicas_every, step, step == steps):
      multihost.check_replicas(state)
    if not stopped and _evaluates(run, step):
      _evaluate(run, state, step)
      stopped = signals.stops()
      last |= stopped
    if _due(config.checkpoint.every, step, last) or checkpointer.failed():
      # Last: what is written of a step outlives a kill during the save.
      logger.write()
      check_finite(float(metrics['loss']), step)
      waits_for(f'the save of step {step}')
      checkpointer.save(step, state, batches.position, wait=last)
    if stopped:
      break
  logger.write()
  return int(state['step'])


def _evaluates(run: _Run, step: int) -> bool:
  config = run.setup.config
  last = step == config.train.steps
  return bool(run.evaluations) and _due(config.eval.every, step, last)


def _evaluate(run: _Run, state: TrainState, step: int) -> None:
  """Evaluates in the midst of training, which pauses; all of it or nothing."""
  config, logger = run.setup.config, run.logger
  logger.write()
  jax.block_until_ready(state)  # or its steps would count as evaluation
  found = []
  with run.signals.leaving():
    for evaluate in run.evaluations:
      began = time.perf_counter()
      results = evaluate(state['params'], config.eval.batches)
      metrics = {result.name: result.metrics for result in results}
      found.append((metrics, time.perf_counter() - began))
    for metrics, seconds in found:
      logger.evaluation(step, metrics, seconds)
  runtime.trim_malloc()  # the first time, evaluation is compiled


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)
