"""Three routers from papers, each one class that the library does not know.

A config file of your own may register classes and then train with them:

  moe_jax train --config=examples/routers.py:noisy_top_k --workdir=DIR

The same command resumes, on any mesh, and the run remembers this file, so that
`moe_jax eval --workdir=DIR` finds the classes again.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import presets
from moe_jax.parameter import FIXED, param
from moe_jax.routing.gates import GATES, GateContext, GateOptions, LinearGate
from moe_jax.routing.matmul import matmul
from moe_jax.routing.selection import (
  SELECTIONS,
  Picked,
  Select,
  SelectOptions,
  TopK,
  take,
)


@GATES.register('noisy_top_k')
class NoisyTopK(LinearGate):
  """Adds learned noise to the logits in training.

  `H(x) = x W_g + normal() softplus(x W_noise)` (Shazeer et al., arXiv
  1701.06538, eq. 4); eq. 3 and 5, the softmax of the k best, are
  `router.weights = 'chosen'`.

  Attributes:
    noise_XN: The weights W_noise, which start at 0 as in the paper.
  """

  draws = True

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    super().__init__(options, rngs=rngs)
    self.noise_XN = param(
      jnp.zeros((options.num_features, options.num_experts)), decay=True
    )

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    """Returns H(x), or `x W_g` in evaluation."""
    logits_TN = super().__call__(features_TX, context)
    if context.rng is None:
      return logits_TN
    scale_TN = jax.nn.softplus(matmul(features_TX, self.noise_XN[...]))
    return logits_TN + scale_TN * jax.random.normal(context.rng, scale_TN.shape)


@GATES.register('mask')
class MaskGate(LinearGate):
  """Lets a token of the vocabulary see only some experts (MaskMoE).

  `softmax(x W + m_t)` with m_t 0 for the V_t experts that token t may see and
  -inf for the others (arXiv 2407.09816). The experts are drawn once, uniformly:
  one for a rare token, several for a frequent one. Each layer draws its own.

  Attributes:
    fixed_visible_VN: 1 for the experts that a token sees, 0 for the others.
  """

  masks = True
  frequent = b' etaoinshrdlu'  # ids of the bytes tokenizer
  num_visible = 4

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    super().__init__(options, rngs=rngs)
    shape = options.vocab_size, options.num_experts
    rank_VN = jax.random.uniform(rngs.params(), shape).argsort().argsort()
    frequent_V = jnp.isin(jnp.arange(shape[0]), jnp.array([*self.frequent]))
    count_V1 = jnp.where(frequent_V, self.num_visible, 1)[:, None]
    visible_VN = (rank_VN < count_V1).astype(jnp.float32)
    self.fixed_visible_VN = param(visible_VN, update=FIXED, matmuls=0)

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    """Returns logits_TN, -inf for experts that a token does not see."""
    logits_TN = super().__call__(features_TX, context)
    visible_TN = self.fixed_visible_VN[...][context.token_ids_T]
    return jnp.where(visible_TN > 0, logits_TN, -jnp.inf)


@SELECTIONS.register('null_experts')
class NullExperts(Select):
  """Chooses among true experts and null experts, which compute nothing.

  The gate rates both (AdaMoE, arXiv 2406.13233). Weights are the probabilities
  of the true experts that were chosen, over their sum; a token that chose none
  gets 0. The balance loss counts for each null expert the mean of them all, so
  that no token is asked to tell them apart.
  """

  num_null = 8

  def __init__(self, options: SelectOptions):
    self.num_true = options.num_experts
    options = options._replace(num_experts=self.num_true + self.num_null)
    super().__init__(options, TopK(options.top_k, options.masked))

  def weigh(
    self, scores_TN: jax.Array, logarithms_TN: jax.Array, picked: Picked
  ) -> jax.Array:
    """Returns weights_TK that sum to 1, or to 0 without a true expert."""
    del logarithms_TN
    true_TK = picked.indices_TK < self.num_true
    scores_TK = jnp.where(true_TK, take(scores_TN, picked.indices_TK), 0)
    sum_T1 = scores_TK.sum(-1, keepdims=True)
    return scores_TK / jnp.where(sum_T1 > 0, sum_T1, 1)

  def balanced_counts(self, counts_N: jax.Array) -> jax.Array:
    """Returns the counts with the mean of all null experts for each of them."""
    true_N, null_N = jnp.split(counts_N, [self.num_true], axis=-1)
    mean_N = jnp.broadcast_to(null_N.mean(-1, keepdims=True), null_N.shape)
    return jnp.concatenate([true_N, mean_N], axis=-1)


def noisy_top_k(config: ConfigDict) -> None:
  """Shazeer et al.'s noisy top-k gating."""
  config.router.score = 'noisy_top_k'
  config.router.weights = 'chosen'


def mask(config: ConfigDict) -> None:
  """MaskMoE: rare bytes have one expert, frequent ones a choice of four."""
  config.router.score = 'mask'


def null_experts(config: ConfigDict) -> None:
  """AdaMoE: four of 8 true and 8 null experts, two true ones on average."""
  config.router.selection = 'null_experts'
  config.moe.top_k = 4


VARIANTS = {
  'noisy_top_k': noisy_top_k,
  'mask': mask,
  'null_experts': null_experts,
}


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are variants with commas between."""
  config = config_lib.get_config()
  config.loss.balance_weight = 0.01
  return presets.build(names, config, {}, VARIANTS)
