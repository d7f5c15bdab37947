"""What a run does where its numbers are no longer sound.

The training step itself leaves everything as it was where the loss or the norm
of the gradient is not finite (`moe_jax.training.step`). Here such steps are
counted, and spikes of the loss found; after too many in a row, or a spike, the
run goes back to its newest checkpoint and leaves out the data from there to
behind the bad step, as was done by hand for PaLM (arXiv 2204.02311, section
5.1); after too many of those it stops.

Everything follows from the losses, which all processes of a run have alike, and
from what the checkpoint holds. So a run that was killed meanwhile, and the same
run if it was not, read the same data.
"""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.config.saved import SKIPPED_STEP
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.logger import Logger
from moe_jax.training.saved_step import Restored
from moe_jax.training.state import Setup, TrainState

# The standard deviation of a normal distribution over its MAD.
_DEVIATION_PER_MAD = 1.4826


class Trouble(NamedTuple):
  """Why a run cannot go on as it is.

  Attributes:
    step: The step that showed it.
    position: The batches read up to that step, with its own.
    reason: What is wrong, in words.
  """

  step: int
  position: int
  reason: str


class Policy:
  """Counts bad steps and finds spikes, from the numbers of step after step.

  Attributes:
    bad_steps: The steps in a row, up to now, that were not finite.
    skipped_steps: All steps of the run that were not finite.
  """

  def __init__(
    self, config: ConfigDict, saved: Mapping[str, Any] | None = None
  ) -> None:
    """Begins, or goes on from what `saved` returned.

    Args:
      config: The whole config; reads `recovery`.
      saved: What a checkpoint holds; None for nothing.
    """
    saved = saved or {}
    self._config = config.recovery
    self.bad_steps = int(saved.get('bad_steps', 0))
    self.skipped_steps = int(saved.get('skipped_steps', 0))
    self._losses = collections.deque(
      map(float, saved.get('losses', ())), maxlen=config.recovery.window
    )

  def saved(self) -> dict[str, Any]:
    """Returns what a checkpoint has to hold, as JSON can."""
    found: dict[str, Any] = {
      'bad_steps': self.bad_steps,
      'skipped_steps': self.skipped_steps,
      'losses': list(self._losses),
    }
    return {name: value for name, value in found.items() if value}

  def judge(self, loss: float, gradient_norm: float) -> str | None:
    """Takes in the numbers of a step.

    Returns:
      Why the run has to go back; None if it may go on.
    """
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
      self.bad_steps += 1
      self.skipped_steps += 1
      if self.bad_steps < self._config.bad_steps:
        return None
      return (
        f'{described(loss, gradient_norm)}, {self.bad_steps} times in a row'
      )
    self.bad_steps = 0
    if not self._config.spike:
      return None
    if spike := self._spike(loss):
      return spike
    self._losses.append(loss)
    return None

  def _spike(self, loss: float) -> str | None:
    """Returns how far a loss is above the others, if that is too far."""
    losses = self._losses
    if len(losses) < self._config.window:
      return None
    median = statistics.median(losses)
    mad = statistics.median(abs(each - median) for each in losses)
    deviations = (loss - median) / max(_DEVIATION_PER_MAD * mad, 1e-12)
    if deviations <= self._config.spike:
      return None
    return (
      f'the loss is {loss:.4f}, {deviations:.1f} robust deviations above'
      f' {median:.4f}, the median of the last {len(losses)}'
    )


class Recovery:
  """Watches the steps of a run, and says where it goes on after trouble.

  The numbers of a step are read once the next one has been dispatched, so that
  the device never waits; whatever is logged or saved, they are read.

  Attributes:
    skipped: The stretches of data left out up to now: the position of the
      first batch, and how many.
    policy: What counts the bad steps.
    rollbacks: How often the run has gone back.
  """

  def __init__(
    self,
    setup: Setup,
    workdir: str,
    logger: Logger,
    data: Mapping[str, Any],
  ) -> None:
    """Begins a new run, or goes on from a checkpoint.

    Args:
      setup: The run's setup.
      workdir: The directory of the run, for messages.
      logger: Where is told what happens.
      data: What is saved of the run beside its arrays; nothing for a new run.
    """
    self._config = setup.config
    self._workdir = workdir
    self._logger = logger
    # A checkpoint that a sound step has followed is not doubted, though this
    # start has not seen that step.
    saved_step = int(data.get('step', 0))
    bad_steps = int(data.get('recovery', {}).get('bad_steps', 0))
    self._last_sound_step = saved_step - bad_steps
    self._resumed_step = saved_step if data else None
    self._all_finite = jax.jit(
      _all_finite, out_shardings=mesh_lib.replicated(setup.mesh)
    )
    self.rollbacks = int(data.get('recovery', {}).get('rollbacks', 0))
    self.begin(data)

  def saved(self) -> dict[str, Any]:
    """Returns what a checkpoint has to hold of this, as JSON can."""
    rollbacks = {'rollbacks': self.rollbacks} if self.rollbacks else {}
    return self.policy.saved() | rollbacks

  def begin(self, data: Mapping[str, Any]) -> None:
    """Goes on from a checkpoint.

    Args:
      data: What is saved of the run beside its arrays; nothing for a new run.
    """
    self.skipped = [(first, count) for first, count in data.get('skipped', ())]
    self.policy = Policy(self._config, data.get('recovery'))
    self._noted: tuple[int, int, list[jax.Array]] | None = None

  @property
  def skipped_steps(self) -> int:
    """The steps of the run that changed nothing, of those read up to now."""
    return self.policy.skipped_steps

  @property
  def is_skipping(self) -> bool:
    """Whether the step read last changed nothing."""
    return self.policy.bad_steps > 0

  def note(self, step: int, position: int, metrics: Mapping[str, Any]) -> None:
    """Keeps the numbers of a step that has just been dispatched."""
    numbers = [metrics['loss'], metrics['gradient_norm']]
    for number in numbers:
      number.copy_to_host_async()
    self._noted = step, position, numbers

  def trouble(self) -> Trouble | None:
    """Reads what was noted, if anything; waits for that step to end.

    Returns:
      Why the run has to go back; None if it may go on.
    """
    if self._noted is None:
      return None
    (step, position, numbers), self._noted = self._noted, None
    loss, gradient_norm = map(float, jax.device_get(numbers))
    reason = self.policy.judge(loss, gradient_norm)
    if self.policy.bad_steps:
      self._tell(step, position, loss, gradient_norm)
    elif not reason:
      self._last_sound_step = step
    return Trouble(step, position, reason) if reason else None

  def unsound(self, step: int, position: int, state: Any) -> Trouble | None:
    """Returns what forbids to save a state; None if every number is finite.

    An update may be infinite though loss and gradient are not.
    """
    if self._all_finite(state):
      return None
    return Trouble(step, position, 'the parameters are not finite any more')

  def sets_aside(self, steps: Sequence[int]) -> bool:
    """Returns whether the newest of these checkpoints may be the cause.

    It may if no sound step has followed it: then one before it is better, and
    none at all is if nothing else is left to try, unless this start began from
    it: what it was made of would be lost.

    Args:
      steps: The steps that there are checkpoints of, ascending.
    """
    if not steps or self._last_sound_step > steps[-1]:
      return False
    if len(steps) > 1:
      return True
    return self._is_exhausted and steps[-1] != self._resumed_step

  @property
  def _is_exhausted(self) -> bool:
    return self.rollbacks >= self._config.recovery.rollbacks

  def go_back(self, trouble: Trouble, restored: Restored | None) -> int:
    """Goes back to a checkpoint, and leaves out data.

    Args:
      trouble: Why.
      restored: The checkpoint; None where there is none.

    Returns:
      The position of the next batch to read.

    Raises:
      UserError: The run has gone back too often, or cannot.
    """
    if restored is None or self._is_exhausted:
      step = restored.step if restored else None
      raise UserError(self._report(trouble, step))
    step, first = restored.step, restored.position
    # A checkpoint once followed by a sound step is not doubted again.
    self._last_sound_step = min(self._last_sound_step, step + 1)
    position = trouble.position + self._config.recovery.skip_batches
    rollbacks = self.rollbacks + 1
    self.begin(restored.data)
    self.rollbacks = rollbacks
    self.skipped.append((first, position - first))
    self._logger.went_back(
      step,
      {
        'reason': trouble.reason,
        'bad_step': trouble.step,
        'bad_position': trouble.position,
        'rollbacks': rollbacks,
        'position': position,
        'skipped': self.skipped,
      },
      f'step {trouble.step}: {trouble.reason} (data position'
      f' {trouble.position}); going back to step {step} and leaving out'
      f' {position - first} batches, rollback {rollbacks} of'
      f' {self._config.recovery.rollbacks}',
    )
    return position

  def _tell(
    self, step: int, position: int, loss: float, gradient_norm: float
  ) -> None:
    count, limit = self.policy.bad_steps, self._config.recovery.bad_steps
    self._logger.event(
      step,
      SKIPPED_STEP,
      {'loss': loss, 'gradient_norm': gradient_norm, 'position': position},
      f'step {step}: {described(loss, gradient_norm)} (data position'
      f' {position}); the step changes nothing, {count} of {limit} in a row',
    )

  def _report(self, trouble: Trouble, step: int | None) -> str:
    """Returns why a run stops, and what to do."""
    workdir, rate = self._workdir, self._config.optimizer.learning_rate
    told = (
      f'training has diverged at step {trouble.step} (data position'
      f' {trouble.position}): {trouble.reason}'
    )
    lower = f'a lower --config.optimizer.learning_rate (it is {rate:g})'
    if step is None:
      return (
        f'{told}; there is no checkpoint to go back to: the same command begins'
        f' anew, with {lower}, or begin in another --workdir with what else is'
        ' to change'
      )
    return (
      f'{told}; the run has gone back {self.rollbacks} times to'
      f' {workdir}/checkpoints; the same command goes on from step {step} with'
      f' {lower}, or with more than --config.recovery.rollbacks ='
      f' {self._config.recovery.rollbacks}; `moe_jax doctor --workdir={workdir}'
      f' --replay --step={trouble.step}` says where it begins'
    )


def forgetting(setup: Setup, state: TrainState) -> TrainState:
  """Returns a state whose attention remembers nothing.

  What it remembers is not what comes before the data that a run goes on with
  once it has left some out.
  """
  if 'memory' not in state:
    return state
  return state | {'memory': setup.start(setup.config.train.batch_size)}


def described(loss: float, gradient_norm: float) -> str:
  """Returns which of the two is not finite, in words."""
  if not math.isfinite(loss):
    return f'the loss is {loss}'
  return f'the gradient norm is {gradient_norm}'


def _all_finite(tree: Any) -> jax.Array:
  """Returns whether every number of the tree is finite."""
  floats = [
    leaf
    for leaf in jax.tree.leaves(mesh_lib.in_device_memory(tree))
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
