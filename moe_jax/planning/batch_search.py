"""Searches, by compiling, for the batch and the rematerialisation that fit.

Two things are taken for granted: more sequences need more memory, and of the
values of `model.remat` a later one needs no more than an earlier one. So one
program tells of all that are smaller, or larger.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moe_jax.config import BATCH_AXES, mesh_shape, validate
from moe_jax.errors import UserError
from moe_jax.planning import abstract_setup, compiled
from moe_jax.planning.memory import Estimate, estimate
from moe_jax.planning.topologies import Target

POLICIES = ('none', 'dots', 'full')  # from the lightest
# To so much of itself the largest batch is found.
_PRECISION = 1 / 8
# What is estimated to come to this share of the memory is tried.
_MARGIN = 0.95


class Trial(NamedTuple):
  """A program that was compiled, or refused for its size.

  Attributes:
    batch_size: The number of sequences, over all devices.
    remat: The policy, one of `POLICIES`.
    needed: The bytes per device; at least so many if it was refused.
    available: The bytes per device that programs may use.
  """

  batch_size: int
  remat: str
  needed: int
  available: int

  @property
  def fits(self) -> bool:
    """Whether as many bytes are there as are needed."""
    return self.needed <= self.available


Attempt = Callable[[int, str], Trial]


def find(
  config: ConfigDict, target: Target, report: Callable[[Trial], None]
) -> dict[str, Any]:
  """Finds the largest batch under the lightest policy that fits; see `search`.

  Args:
    config: The config, whose batch is the one that a policy should hold.
    target: The devices to compile for.
    report: Called with every trial, as it is made.

  Returns:
    `overrides` of the config, the bytes per device that they need and spare,
    and all `trials`.

  Raises:
    UserError: Something is wrong with the config, nothing fits, or the devices
      do not say what they hold.
  """

  def attempt(batch_size: int, remat: str) -> Trial:
    changed = _changed(config, batch_size, remat)
    trial = Trial(batch_size, remat, *_need(changed, target))
    report(trial)
    return trial

  validate(config, len(target.devices))
  available, wanted = _available(target), config.train.batch_size
  estimates = _estimates(config, target)
  start = _start(estimates, wanted, available)
  trials = search(wanted, unit(config, target), estimates, start, attempt)
  largest = best(trials)
  if largest is None:
    raise UserError(
      'nothing fits, not even one sequence per device and micro-batch with'
      " model.remat = 'full'; take more devices, or split the model over more"
      ' of them: mesh.fsdp, mesh.expert, mesh.context, mesh.tensor'
    )
  return {
    'overrides': {
      'train.batch_size': largest.batch_size,
      'model.remat': largest.remat,
    },
    'needed_bytes': largest.needed,
    'spare_bytes': largest.available - largest.needed,
    'trials': [each._asdict() | {'fits': each.fits} for each in trials],
  }


def search(
  wanted: int,
  unit: int,
  estimates: dict[str, Estimate],
  start: str,
  attempt: Attempt,
) -> list[Trial]:
  """Tries until the largest batch under the lightest policy is known.

  The policy is the lightest that holds the wanted batch, and the batch then
  grows as far as that policy holds it. If none holds the wanted batch, the
  batch shrinks under the last policy.

  Args:
    wanted: The number of sequences that a policy should hold.
    unit: The number of which batches are multiples.
    estimates: The estimated memory of every policy, from the lightest.
    start: The policy to try first.
    attempt: Compiles with a batch and a policy.

  Returns:
    All trials, in order.
  """
  trials: list[Trial] = []

  def tried(batch_size: int, remat: str) -> Trial:
    trials.append(attempt(batch_size, remat))
    return trials[-1]

  policies = list(estimates)
  at = policies.index(start)
  held = tried(wanted, start)
  if held.fits:
    for remat in reversed(policies[:at]):
      lighter = tried(wanted, remat)
      if not lighter.fits:
        break
      held = lighter
  else:
    for remat in policies[at + 1 :]:
      held = tried(wanted, remat)
      if held.fits:
        break

  low, high = (wanted, None) if held.fits else (0, wanted)
  last = held
  while high is None or high - low > max(unit, _PRECISION * low):
    guess = _guess(low, high, unit, estimates[held.remat], last)
    last = tried(guess, held.remat)
    low, high = (guess, high) if last.fits else (low, guess)
  return trials


def best(trials: list[Trial]) -> Trial | None:
  """Returns the trial of the lightest policy that fits, with its largest batch.

  A search tries more than one policy at the wanted batch only, so a lighter
  one that fits is always as good there. None stands for nothing that fits.
  """
  fitting = [trial for trial in trials if trial.fits]
  order = {remat: -at for at, remat in enumerate(POLICIES)}
  return max(
    fitting,
    key=lambda trial: (order[trial.remat], trial.batch_size),
    default=None,
  )


def _guess(
  low: int, high: int | None, unit: int, estimated: Estimate, last: Trial
) -> int:
  """Returns a batch above one that fits and below one that does not, if known.

  Estimates are corrected by how much they missed the last trial.
  """
  missed = last.needed / estimated.at(last.batch_size)
  near = estimated.largest_batch(_MARGIN * last.available / missed)
  if high is None:
    near = max(near, math.ceil(low * (1 + _PRECISION)))
  else:
    middle = (low + high) // 2
    near = middle if low else min(near, middle)
  return max(near // unit * unit, low + unit)


def unit(config: ConfigDict, target: Target) -> int:
  """Returns what batches are multiples of, so that all devices share evenly."""
  mesh = mesh_shape(config, len(target.devices))
  shards = math.prod(mesh[axis] for axis in BATCH_AXES)
  return shards * config.train.accumulation


def advice(
  config: ConfigDict, target: Target, refused: compiled.DoesNotFitError
) -> str:
  """Says what would fit instead, by estimates that the refusal corrects."""
  estimates, batch_size = _estimates(config, target), config.train.batch_size
  missed = refused.needed / estimates[config.model.remat].at(batch_size)
  room, smallest = refused.available / missed, unit(config, target)
  heavier = POLICIES[POLICIES.index(config.model.remat) :]
  for remat in heavier:
    if estimates[remat].at(batch_size) <= room:
      return f"by estimate model.remat = '{remat}' would; --fit compiles it"
  batch_size = estimates['full'].largest_batch(room) // smallest * smallest
  if batch_size:
    return (
      f"by estimate train.batch_size = {batch_size} with model.remat = 'full'"
      ' would; --fit compiles it'
    )
  return (
    'by estimate no batch would; take more devices, or split the model over'
    ' more of them: mesh.fsdp, mesh.expert, mesh.context, mesh.tensor'
  )


def _estimates(config: ConfigDict, target: Target) -> dict[str, Estimate]:
  mesh = mesh_shape(config, len(target.devices))

  def of_policy(remat: str) -> Estimate:
    changed = _changed(config, config.train.batch_size, remat)
    setup = abstract_setup.on_one_device(changed, target.devices[0])
    return estimate(setup, mesh)

  return {remat: of_policy(remat) for remat in POLICIES}


def _start(estimates: dict[str, Estimate], wanted: int, available: int) -> str:
  """Returns the lightest policy that is estimated to hold the wanted batch."""
  fitting = (p for p, each in estimates.items() if each.at(wanted) <= available)
  return next(fitting, POLICIES[-1])


def _available(target: Target) -> int:
  available = compiled.available_bytes(target)
  if available is None:
    raise UserError(
      '--fit needs devices that say what they hold, and a'
      f' {target.devices[0].device_kind} does not; name a --topology'
    )
  return available


def _need(config: ConfigDict, target: Target) -> tuple[int, int]:
  try:
    report = compiled.compile_and_report(config, target)
  except compiled.DoesNotFitError as refused:
    return refused.needed, refused.available
  return report['memory_bytes']['total'], report['available_bytes']


def _changed(config: ConfigDict, batch_size: int, remat: str) -> ConfigDict:
  changed = copy.deepcopy(config)
  changed.train.batch_size = batch_size
  changed.model.remat = remat
  return changed
