"""Tokens drawn from logits, against probabilities in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.generation.sampling import Sampling, sample

LOGITS = np.array([0.3, 2.0, -1.0, 1.6, 0.9, -3.0, 1.1])
DRAWS = 20_000


def probabilities(
  temperature: float, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
  """What the three flags leave of `LOGITS`, one after the other."""
  best = np.argsort(-LOGITS)[: top_k or None]
  share = np.exp(LOGITS[best] / temperature)
  share /= share.sum()
  kept = 1
  while share[:kept].sum() < top_p and kept < len(share):
    kept += 1
  found = np.zeros(len(LOGITS))
  found[best[:kept]] = share[:kept] / share[:kept].sum()
  return found


@pytest.mark.parametrize(
  'flags',
  [
    {'temperature': 1.0},
    {'temperature': 0.5},
    {'temperature': 1.3, 'top_k': 3},
    {'temperature': 0.9, 'top_p': 0.6},
    {'temperature': 2.0, 'top_k': 5, 'top_p': 0.7},
    {'temperature': 1.0, 'top_k': 1},
    {'temperature': 1.0, 'top_k': 100},
    {'temperature': 1.0, 'top_p': 1e-6},
  ],
  ids=str,
)
def test_frequencies_are_the_probabilities(flags: dict) -> None:
  keys_B = jax.random.split(jax.random.key(1), DRAWS)
  logits_BV = jnp.tile(jnp.float32(LOGITS), (DRAWS, 1))
  drawn = jax.jit(sample)(logits_BV, keys_B, Sampling.of(**flags))
  assert drawn.dtype == jnp.int32
  expected = probabilities(**flags)
  counts = np.bincount(drawn, minlength=len(LOGITS))
  assert not counts[expected == 0].any()
  deviation = np.sqrt(DRAWS * expected * (1 - expected))
  assert (np.abs(counts - DRAWS * expected) <= 4.5 * deviation).all()


def test_temperature_0_takes_the_likeliest() -> None:
  logits_BV = np.random.default_rng(0).standard_normal((9, 50))
  keys_B = jax.random.split(jax.random.key(0), 9)
  for temperature in (0.0, 1e-9):
    greedy = Sampling.of(temperature, top_k=7, top_p=0.5)
    found = sample(jnp.float32(logits_BV), keys_B, greedy)
    np.testing.assert_array_equal(found, logits_BV.argmax(-1))


@pytest.mark.parametrize(
  'flags, message',
  [
    ({'temperature': -0.1}, 'temperature = -0.1 must be 0 or more'),
    ({'temperature': float('nan')}, 'temperature = nan must be'),
    ({'temperature': float('inf')}, 'temperature = inf must be'),
    ({'top_k': -1}, 'top_k = -1 must be 0, for all tokens, or more'),
    ({'top_p': 0.0}, 'top_p = 0.0 must be above 0 and at most 1'),
    ({'top_p': 1.5}, 'top_p = 1.5 must be'),
  ],
)
def test_what_is_refused(flags: dict, message: str) -> None:
  with pytest.raises(UserError, match=message):
    Sampling.of(**flags)
