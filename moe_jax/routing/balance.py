"""How evenly the experts are used: what is counted and what is penalised.

Layers report `Load`s, a few sums over tokens, so that losses and metrics read
the same numbers. They are computed on the whole batch outside `shard_map`:
whatever the mesh, a mean is over the global batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    overflowed: slots that found no room in the buffers between devices and took
      a slower way; None where no buffer can overflow.
    bias_gradient: 0, with the gradient that steers the bias on the choice; see
      `moe_jax.routing.selection.Select`.
    sequence_balance: `N sum_n f_n P_n` of each sequence, summed over them.
    sequences: those with a real token.
  """

  counts_N: jax.Array
  probability_N: jax.Array
  tokens: jax.Array
  z: jax.Array
  entropy: jax.Array
  dropped: jax.Array
  overflowed: jax.Array | None
  bias_gradient: jax.Array
  sequence_balance: jax.Array
  sequences: jax.Array


def load_of(
  routing: Routing,
  padding_mask_BL: jax.Array,
  dropped: jax.Array,
  bias_gradient: Callable[[jax.Array], jax.Array],
  overflowed: jax.Array | None = None,
) -> Load:
  """Sums up one sub-layer's routing.

  Args:
    routing: of T tokens; the slots of padding are unused.
    padding_mask_BL: bool; False marks padding.
    dropped: a count of slots.
    bias_gradient: of the counts; see `Load`.
    overflowed: another count of slots, or None; see `Load`.
  """
  num_experts, (batch, length) = routing.num_experts, padding_mask_BL.shape
  real_BL = padding_mask_BL.astype(jnp.float32)
  real_B = real_BL.sum(-1)
  indices_BLK = routing.indices_TK.reshape(batch, length, -1)
  chosen_BLKN = indices_BLK[..., None] == jnp.arange(num_experts)
  counts_BN = chosen_BLKN.sum((1, 2), dtype=jnp.float32)
  probability_BN = jnp.einsum(
    'BLN,BL->BN',
    routing.probabilities_TN.reshape(batch, length, num_experts),
    real_BL,
  )
  entropy_T = jax.scipy.special.entr(routing.probabilities_TN).sum(-1)
  z_T = jax.nn.logsumexp(routing.logits_TN, axis=-1) ** 2
  real_T = real_BL.reshape(-1)
  counts_N = counts_BN.sum(0)
  return Load(
    counts_N=counts_N,
    probability_N=probability_BN.sum(0),
    tokens=real_T.sum(),
    z=(z_T * real_T).sum(),
    entropy=(entropy_T * real_T).sum(),
    dropped=dropped.astype(jnp.float32),
    overflowed=overflowed
    if overflowed is None
    else overflowed.astype(jnp.float32),
    bias_gradient=bias_gradient(counts_N),
    sequence_balance=_balance(counts_BN, probability_BN, real_B).sum(),
    sequences=(real_B > 0).sum(dtype=jnp.float32),
  )


def joined(load: Load) -> Load:
  """Every layer's tokens as if they were one layer's: sums over the layers."""
  keep = load.counts_N.ndim - 1
  return jax.tree.map(lambda a: a.sum(tuple(range(keep))), load)


def balance_loss(load: Load, whole: Load | None = None) -> jax.Array:
  """`N sum_n f_n P_n`, summed over layers; K when all is balanced (one layer).

  f_n is the share of tokens that chose expert n, counted once per slot (so the
  f_n sum to K), P_n its mean probability: the form of Switch Transformers eq. 4
  (arXiv 2101.03961) for top-k. Only P_n has a gradient.

  Args:
    load: of the tokens whose probabilities are held to the shares.
    whole: of the batch that they are part of, whose shares and number of tokens
      then count: the sum over the parts is the loss of the whole. None: `load`.
  """
  whole = load if whole is None else whole
  return _balance(whole.counts_N, load.probability_N, whole.tokens).sum()


def sequence_balance_loss(load: Load) -> jax.Array:
  """The balance loss within each sequence, as a mean over sequences.

  DeepSeek-V3 (arXiv 2412.19437) eq. 17-20, here with f_n counted as above.
  """
  return (load.sequence_balance / jnp.maximum(load.sequences, 1.0)).sum()


def _balance(
  counts_N: jax.Array, probability_N: jax.Array, tokens: jax.Array
) -> jax.Array:
  """`N sum_n f_n P_n`; leading axes stay."""
  tokens = jnp.maximum(tokens, 1.0)[..., None]
  share_N = jax.lax.stop_gradient(counts_N) / tokens
  return counts_N.shape[-1] * (share_N * probability_N / tokens).sum(-1)


def z_loss(load: Load) -> jax.Array:
  """Mean squared log-partition per token (ST-MoE eq. 5, arXiv 2202.08906).

  Summed over layers; it keeps router logits small.
  """
  return (load.z / jnp.maximum(load.tokens, 1.0)).sum()
