"""Tells whether two models are one: both run in float32 on random tokens."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import released

Model = tuple[ConfigDict, Mapping[str, Any]]  # a config and its parameters

# The share of the largest logit by which two runs of one model may differ: they
# are the same float32 program, or one that sums in another order where layers
# are grouped in another way.
TOLERANCE = 1e-5
_EPSILON = float(np.finfo(np.float32).eps)
_IDS_SHAPE = (2, 48)
_NUM_IDS = 2 * 48
_SMALLEST = 1e-30  # a logit to divide by


def assert_equal(ours: Model, theirs: Model) -> str:
  """Runs both on random ids in float32; returns how close they are.

  Raises:
    UserError: They are not the same model.
  """
  share = difference(ours, theirs)
  if not share <= TOLERANCE:  # nor if it is not a number
    raise UserError(
      f'the models differ: their logits by up to {share:.1e} of the'
      f' largest, above {TOLERANCE:.0e}, on {_NUM_IDS} random tokens'
    )
  return (
    f'logits equal to {share:.1e} of the largest on {_NUM_IDS} random tokens'
  )


def rounding(config: ConfigDict) -> float:
  """Returns by how much one function may differ where it is summed otherwise.

  It is a share of the largest logit, in float32. Each layer adds up products
  along its widest axis; their errors add up at random along it, and at worst
  from layer to layer.
  """
  model, moe = config.model, config.moe
  width = max(model.hidden_size, model.ffn_width, moe.expert_width)
  return max(TOLERANCE, _EPSILON * model.num_layers * math.sqrt(width))


def difference(ours: Model, theirs: Model) -> float:
  """Returns the largest difference of two models' logits, by the largest logit.

  Raises:
    UserError: The models have different vocabularies.
  """
  sizes = [config.model.vocab_size for config, _ in (ours, theirs)]
  if sizes[0] != sizes[1]:
    raise UserError(
      f'the models differ: vocabularies of {sizes[0]} and {sizes[1]}'
    )
  ids_BL = np.random.default_rng(0).integers(sizes[0], size=_IDS_SHAPE)
  a, b = (
    np.asarray(released.run(config, params, ids_BL.astype(np.int32)))
    for config, params in (ours, theirs)
  )
  return float(abs(a - b).max() / max(abs(b).max(), _SMALLEST))
