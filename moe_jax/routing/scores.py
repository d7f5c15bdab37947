"""Score functions: from a router's features to one logit per expert.

A score is a class with `score(features_TX, ids_T) -> logits_TN`, float32 in and
out, where X is the width of the features it was made for. A new one is a class
here and a line in `SCORES`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.routing.recurrent import Precision


class LinearScore(nnx.Module):
  """`features G` (RMoE eq. 1 and 6), without a bias.

  Attributes:
    weight_XN: G, float32.
  """

  def __init__(
    self,
    num_features: int,
    num_experts: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(init_std)
    self.weight_XN = nnx.Param(
      init(rngs.params(), (num_features, num_experts), jnp.float32)
    )

  def __call__(self, features_TX: jax.Array, ids_T: jax.Array) -> jax.Array:
    del ids_T
    return jnp.einsum(
      'TX,XN->TN', features_TX, self.weight_XN[...], precision=Precision
    )


SCORES = {'linear': LinearScore}
