"""The training loop: what happens, in order, on one page."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import evaluation, runtime
from moe_jax.config import evaluations, loading
from moe_jax.data import mixtures
from moe_jax.data.mixtures import Mixture
from moe_jax.errors import UserError
from moe_jax.evaluation import Opened
from moe_jax.parallel import multihost, peers
from moe_jax.training import init_from, trackers
from moe_jax.training import state as state_lib
from moe_jax.training.batches import Batches
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.logger import Logger
from moe_jax.training.profiler import Profiler
from moe_jax.training.record import describe, record
from moe_jax.training.recovery import (
  Recovery,
  Trouble,
  forgetting,
)
from moe_jax.training.router_gradients import (
  ROUTER_GRADIENTS,
  MeasureNorms,
  make_router_norms,
)
from moe_jax.training.run_dir import RunDir
from moe_jax.training.samples import Samples
from moe_jax.training.signals import SignalHandler
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import Batch, TrainStep, make_train_step
from moe_jax.training.watchdog import Watchdog, waits_for


class Prepared(NamedTuple):
  """What a config stands for, before anything is compiled or written."""

  setup: Setup
  mixture: Mixture
  evaluations: list[Opened]
  samples: Samples | None = None


def prepare(config: ConfigDict, workdir: str = '') -> Prepared:
  """Checks the config, and opens the data it names.

  Args:
    config: The config.
    workdir: The directory of the run, which need not exist; '' for none.

  Raises:
    UserError: Anything is wrong with config or data.
  """
  return _opened(state_lib.from_config(config, workdir))


def _opened(setup: Setup) -> Prepared:
  """Opens the splits that a run reads, whose text may be encoded first."""
  config = setup.config
  assert setup.tokenizer is not None  # from_config asks for the data's
  return Prepared(
    setup,
    Mixture.open(config.data, setup.tokenizer, config.train.batch_size),
    evaluation.make(setup, evaluations.during_training(config)),
    Samples(setup) if config.train.sample_every else None,
  )


def _prepare_together(config: ConfigDict, workdir: str) -> Prepared:
  """Returns what `prepare` does, in each process of a run.

  One process prepares the data set, and the vocabulary if it is made of that;
  then all of them encode it.
  """

  setup = state_lib.from_config_together(config, workdir)
  if not multihost.is_single_process():
    multihost.first_process_first(lambda: mixtures.open_documents(config.data))
  return multihost.fail_together(lambda: _opened(setup))


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
      is compiled or overwritten; or a device's memory is too small, or training
      diverges and going back does not help.
    SystemExit: 128 + the number of the signal that stopped it.
  """
  if not loading.holds_run(workdir):
    config_lib.check_given(config)
  multihost.fail_together(lambda: trackers.check(config))
  setup, mixture, opened, samples = _prepare_together(config, workdir)
  run = RunDir.new_or_resumed(workdir, config)
  with (
    Watchdog(config.train.watchdog, config.train.watchdog_exit),
    run.held(),
    SignalHandler() as signals,
    Checkpointer(run, setup.vocabulary, mixture.fingerprint()) as checkpointer,
    _too_large_in_one_line(),
  ):
    peers.set_outlook(checkpointer.outlook)
    # All that can be refused, before the workdir becomes this run's.
    restored = checkpointer.resume(setup.abstract)
    params = None if restored else init_from.params(setup)
    step = restored.step if restored else None  # 0 of a converted checkpoint
    start, position = step or 0, restored.position if restored else 0
    data = restored.data if restored else {}
    with contextlib.closing(Batches(setup, mixture, position)) as batches:
      run.claim(record(setup, workdir, start), setup.kept_files)
      state = restored.state if restored else setup.init(params)
      del restored, params  # the steps will take their memory
      with (
        multihost.fail_together(lambda: Logger(setup, workdir, step)) as logger,
        Profiler(config.train.profile, workdir) as profiler,
      ):
        logger.say(describe(setup, mixture))
        if run.changes:
          logger.say(f'changed  {run.changes}')
        recovery = Recovery(setup, workdir, logger, data)
        if start < config.train.steps:
          logger.compiling()
        parts = _Run(
          setup,
          make_train_step(setup),
          make_router_norms(setup),
          batches,
          opened,
          samples,
          checkpointer,
          recovery,
          logger,
          profiler,
          signals,
        )
        done = _train(parts, state, start)
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
  train_step: TrainStep
  router_norms: MeasureNorms
  batches: Batches
  evaluations: list[Opened]
  samples: Samples | None
  checkpointer: Checkpointer
  recovery: Recovery
  logger: Logger
  profiler: Profiler
  signals: SignalHandler


def _train(run: _Run, state: TrainState, step: int) -> int:
  """Trains from step `step` on, until done or stopped; returns the step."""
  if step and _due_evaluations(run, step) and not run.logger.evaluated():
    _evaluate(run, state, step)  # a signal had cut that evaluation short
  while True:
    state, step, trouble = _steps(run, state, step)
    if trouble is None:
      return step
    del state  # before there is another in memory
    state, step = _go_back(run, trouble)


def _steps(
  run: _Run, state: TrainState, start: int
) -> tuple[TrainState, int, Trouble | None]:
  """Trains until done, stopped or in trouble.

  Returns:
    The state, the step, and why the run has to go back, if it has to.
  """
  train_step, recovery, logger = run.train_step, run.recovery, run.logger
  batches, profiler, signals = run.batches, run.profiler, run.signals
  config, step = run.setup.config, start
  steps = config.train.steps
  stopped = False
  for step in range(start + 1, steps + 1):
    waits_for(f'step {step}')
    profiler.start(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      batch = next(batches)
      measured = _router_gradients(run, state, step, batch)
      state, metrics = train_step(state, batch)
    profiler.stop(step, metrics)
    # Of the step before, now that this one runs.
    if trouble := recovery.trouble():
      return state, step, trouble
    logger.write(recovery.skipped_steps)
    recovery.note(step, batches.position, metrics)
    if logger.compiled(metrics, batches.waited):
      runtime.trim_malloc()  # what compiling took
      signals.catch()  # before this there is nothing to save

    stopped = signals.stops()
    last = stopped or step == steps
    if measured or _due(config.train.log_every, step, last):
      logger.note(step, metrics | measured, batches.waited)
    if _due(config.train.check_replicas_every, step, step == steps):
      multihost.check_replicas(state)
    if not stopped and _due_evaluations(run, step):
      if trouble := recovery.trouble():
        return state, step, trouble
      _evaluate(run, state, step)
      stopped = signals.stops()
      last |= stopped
    if _due(config.train.sample_every, step, step == steps) and not stopped:
      _sample(run, state, step)
    due = last or _due(config.checkpoint.every, step, last)
    if due or run.checkpointer.failed():
      trouble = recovery.trouble() or _save(run, state, step, last)
      if trouble or stopped:
        # A run that is stopped goes back when it is gone on with.
        return state, step, None if stopped else trouble
  return state, step, None


def _router_gradients(
  run: _Run, state: TrainState, step: int, batch: Batch
) -> dict[str, Any]:
  """Returns the norms of the routers' gradients, if they are due."""
  if not _due(run.setup.config.train.router_gradients_every, step, last=False):
    return {}
  with run.logger.paused():  # while it is compiled, the first time
    norms = run.router_norms(state, batch)
  return {ROUTER_GRADIENTS: norms}


def _save(
  run: _Run, state: TrainState, step: int, last: bool
) -> Trouble | None:
  """Saves a checkpoint, if it is to; returns why its numbers forbid it.

  None is saved after a step that changed nothing, unless it is the last: only
  one that did shows that the parameters can be gone on with.
  """
  recovery = run.recovery
  # First: what is written of a step outlives a kill during the save.
  run.logger.write(recovery.skipped_steps)
  if not run.setup.config.checkpoint.every or (
    recovery.is_skipping and not last
  ):
    return None
  position = run.batches.position
  if trouble := recovery.unsound(step, position, state):
    return trouble
  waits_for(f'the save of step {step}')
  run.checkpointer.save(
    step, state, position, recovery.skipped, recovery.saved(), wait=last
  )
  return None


def _go_back(run: _Run, trouble: Trouble) -> tuple[TrainState, int]:
  """Returns the newest checkpoint and its step; other data follows it."""
  setup, checkpointer = run.setup, run.checkpointer
  waits_for('going back to a checkpoint')
  _set_cause_aside(run)
  restored = checkpointer.resume(setup.abstract)
  position = run.recovery.go_back(trouble, restored)
  assert restored is not None  # go_back refuses that
  run.batches.seek(position)
  return forgetting(setup, restored.state), restored.step


def _set_cause_aside(run: _Run) -> None:
  """Sets the newest checkpoint aside where it may be the cause itself."""
  checkpointer = run.checkpointer
  checkpointer.wait()
  if run.recovery.sets_aside(steps := checkpointer.steps()):
    path = checkpointer.set_aside(steps[-1])
    run.logger.say(
      f'no step after checkpoint {steps[-1]} was sound: it is now {path}'
    )


def _due_evaluations(run: _Run, step: int) -> list[Opened]:
  last = step == run.setup.config.train.steps
  return [
    each for each in run.evaluations if _due(each.asked.every, step, last)
  ]


def _evaluate(run: _Run, state: TrainState, step: int) -> None:
  """Evaluates in the midst of training, which pauses; all of it or nothing."""
  logger = run.logger
  logger.write(run.recovery.skipped_steps)
  jax.block_until_ready(state)  # or its steps would count as evaluation
  found = []
  with run.signals.leaving():
    for asked, evaluate in _due_evaluations(run, step):
      began = time.perf_counter()
      results = evaluate(state['params'], asked.batches)
      written = {result.name: result.written for result in results}
      found.append((written, time.perf_counter() - began))
    for written, seconds in found:
      logger.evaluation(step, written, seconds)
  runtime.trim_malloc()  # the first time, evaluation is compiled


def _sample(run: _Run, state: TrainState, step: int) -> None:
  """Prints what the model writes, while training pauses."""
  assert run.samples is not None  # made where `train.sample_every` is not 0
  run.logger.write(run.recovery.skipped_steps)
  jax.block_until_ready(state)  # or its steps would count as sampling
  waits_for(f'the sample of step {step}')
  with run.logger.paused():
    text = run.samples(state['params'])
  run.logger.sample(step, text)
  runtime.trim_malloc()  # the first time, it is compiled


def _due(every: int, step: int, last: bool) -> bool:
  return bool(every) and (last or step % every == 0)
