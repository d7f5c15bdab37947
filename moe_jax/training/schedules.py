"""The learning rate over the steps: a warm-up, and what comes after it.

A schedule is a function of the whole config that returns an `optax.Schedule`,
from the number of steps done to the learning rate. `SCHEDULES` has those of the
library; a user's own is registered in a config file:

  @SCHEDULES.register('mine')
  def mine(config): return lambda step: config.optimizer.learning_rate
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.registry import SCHEDULES


@SCHEDULES.register('cosine')
def cosine(config: ConfigDict) -> optax.Schedule:
  """Returns a linear warm-up, then half a cosine down to the final value."""
  optimizer = config.optimizer
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=optimizer.learning_rate,
    warmup_steps=optimizer.warmup_steps,
    decay_steps=config_lib.decay_end(config),
    end_value=_final(config),
  )


@SCHEDULES.register('linear')
def linear(config: ConfigDict) -> optax.Schedule:
  """Returns a linear warm-up, then a straight line down to the final value."""
  steps = config_lib.decay_end(config) - config.optimizer.warmup_steps
  peak = config.optimizer.learning_rate
  return _after_warmup(
    config, optax.linear_schedule(peak, _final(config), steps)
  )


@SCHEDULES.register('constant')
def constant(config: ConfigDict) -> optax.Schedule:
  """Returns a linear warm-up, then the peak for ever."""
  return _after_warmup(
    config, optax.constant_schedule(config.optimizer.learning_rate)
  )


@SCHEDULES.register('wsd')
def wsd(config: ConfigDict) -> optax.Schedule:
  """Returns warm-up, stable, decay (MiniCPM, arXiv 2404.06395).

  Of the steps between the warm-up and the end of the decay a share of
  `optimizer.stable_fraction` stays at the peak; the others are a straight line
  down to the final value.
  """
  optimizer = config.optimizer
  steps = config_lib.decay_end(config) - optimizer.warmup_steps
  stable = min(round(optimizer.stable_fraction * steps), steps - 1)
  peak = optimizer.learning_rate
  decay = optax.linear_schedule(peak, _final(config), steps - stable)
  return _after_warmup(
    config,
    optax.join_schedules([optax.constant_schedule(peak), decay], [stable]),
  )


@SCHEDULES.register('inverse_sqrt')
def inverse_sqrt(config: ConfigDict) -> optax.Schedule:
  """Returns a linear warm-up of w steps, then `peak * sqrt(w / step)`.

  It never ends (Vaswani et al., arXiv 1706.03762, section 5.3). Without a
  warm-up w is 1.
  """
  peak = config.optimizer.learning_rate
  warmup = max(config.optimizer.warmup_steps, 1)

  def decay(step: ArrayLike) -> ArrayLike:
    # What is joined counts its steps from the end of the warm-up.
    return peak * jnp.sqrt(warmup / (warmup + step))

  return _after_warmup(config, decay)


def _final(config: ConfigDict) -> float:
  """Returns the learning rate at the end of a decay."""
  optimizer = config.optimizer
  return optimizer.learning_rate * optimizer.final_fraction


def _after_warmup(
  config: ConfigDict, schedule: optax.Schedule
) -> optax.Schedule:
  """Returns a linear rise from 0 to the peak, and then `schedule`."""
  warmup = config.optimizer.warmup_steps
  if not warmup:
    return schedule
  rise = optax.linear_schedule(0.0, config.optimizer.learning_rate, warmup)
  return optax.join_schedules([rise, schedule], [warmup])
