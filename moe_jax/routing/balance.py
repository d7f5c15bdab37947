"""How evenly the experts are used: what is counted and what is penalised.

Layers report `Load`s, a few sums over tokens, so that losses and metrics read
the same numbers. They are computed on the whole batch outside `shard_map`:
whatever the mesh, a mean is over the global batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.router import Tokens
from moe_jax.routing.selection import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
  """Sums over the real tokens of one MoE sub-layer, all float32.

  Stacked loads have leading axes: [layers, S] in front of those given here.

  Attributes:
    counts_N: slots that chose each expert, before anything was dropped.
    probability_N: summed router probabilities.
    tokens: real tokens.
    z: summed squared log-partition of the logits.
    entropy: summed entropy of the router's distribution, in nats.
    dropped: slots whose expert had no room (capacity dispatch only).
  """

  counts_N: jax.Array
  probability_N: jax.Array
  tokens: jax.Array
  z: jax.Array
  entropy: jax.Array
  dropped: jax.Array


def load_of(routing: Routing, tokens: Tokens, dropped: jax.Array) -> Load:
  """Sums up one sub-layer's routing; `dropped` is a count of slots."""
  real_T = tokens.real_T.astype(jnp.float32)
  chosen_TKN = routing.indices_TK[..., None] == jnp.arange(routing.num_experts)
  log_TN = jax.nn.log_softmax(routing.logits_TN)
  entropy_T = -(routing.probabilities_TN * log_TN).sum(-1)
  z_T = jax.nn.logsumexp(routing.logits_TN, axis=-1) ** 2
  return Load(
    counts_N=chosen_TKN.sum((0, 1), dtype=jnp.float32),
    probability_N=jnp.einsum('TN,T->N', routing.probabilities_TN, real_T),
    tokens=real_T.sum(),
    z=(z_T * real_T).sum(),
    entropy=(entropy_T * real_T).sum(),
    dropped=dropped.astype(jnp.float32),
  )


def joined(load: Load) -> Load:
  """Every layer's tokens as if they were one layer's: sums over the layers."""
  keep = load.counts_N.ndim - 1
  return jax.tree.map(lambda a: a.sum(tuple(range(keep))), load)


def balance_loss(load: Load) -> jax.Array:
  """`N sum_n f_n P_n`, summed over layers; K when all is balanced (one layer).

  f_n is the share of tokens that chose expert n, counted once per slot (so the
  f_n sum to K), P_n its mean probability: the form of Switch Transformers eq. 4
  (arXiv 2101.03961) for top-k. Only P_n has a gradient.
  """
  tokens = jnp.maximum(load.tokens, 1.0)[..., None]
  share_N = jax.lax.stop_gradient(load.counts_N) / tokens
  mean_N = load.probability_N / tokens
  return load.counts_N.shape[-1] * (share_N * mean_N).sum()


def z_loss(load: Load) -> jax.Array:
  """Mean squared log-partition per token (ST-MoE eq. 5, arXiv 2202.08906).

  Summed over layers; it keeps router logits small.
  """
  return (load.z / jnp.maximum(load.tokens, 1.0)).sum()
