"""How evenly the experts are used: what is counted and what is penalised.

Layers report `Load`s, a few sums over tokens, so that losses and metrics read
the same numbers. They are computed on the whole batch outside `shard_map`:
whatever the mesh, a mean is over the global batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Routing, Select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
  """Sums over the real tokens of one MoE sub-layer, all float32.

  Stacked loads have leading axes: [layers, S] in front of those given here.

  Attributes:
    counts_N: The assignments to each expert, before anything was dropped.
    probability_N: The sum of the router's probabilities.
    tokens: The number of real tokens.
    z: The sum of the squared log-partition of the logits.
    entropy: The sum of the entropy of the router's distribution, in nats.
    dropped: The assignments whose expert had no room (capacity dispatch only).
    overflowed: The assignments that found no room in the buffers between
      devices and took the overflow fallback; None where no buffer can overflow.
    bias_gradient: 0, with the gradient that updates the expert bias; see
      `moe_jax.routing.selection.Select`.
    sequence_balance: `N sum_n f_n P_n` of each sequence, summed over sequences.
    sequences: The number of sequences with a real token.
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
  select: Select,
  overflowed: jax.Array | None = None,
  seq_shards: int = 1,
) -> Load:
  """Returns the sums over one sub-layer's routing.

  Args:
    routing: The routing of T tokens; the assignments of padding are unused.
    padding_mask_BL: Bool; False marks padding.
    dropped: The assignments whose expert had no room.
    select: What made the routing.
    overflowed: The assignments that took the overflow fallback, or None.
    seq_shards: As in `moe_jax.routing.router.Context`.
  """
  num_experts, (batch, length) = routing.num_experts, padding_mask_BL.shape
  real_BL = padding_mask_BL.astype(jnp.float32)
  real_B = _of_sequences(real_BL.sum(-1), seq_shards)
  indices_BLK = routing.indices_TK.reshape(batch, length, -1)
  chosen_BLKN = indices_BLK[..., None] == jnp.arange(num_experts)
  counts_BN = chosen_BLKN.sum((1, 2), dtype=jnp.float32)
  counts_BN = _of_sequences(counts_BN, seq_shards)
  counts_BN = select.balanced_counts(counts_BN)
  probability_BN = jnp.einsum(
    'BLN,BL->BN',
    routing.probabilities_TN.reshape(batch, length, num_experts),
    real_BL,
  )
  probability_BN = _of_sequences(probability_BN, seq_shards)
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
    bias_gradient=select.bias_gradient(counts_N),
    sequence_balance=_balance(counts_BN, probability_BN, real_B).sum(),
    sequences=(real_B > 0).sum(dtype=jnp.float32),
  )


def _of_sequences(sums: jax.Array, shards: int) -> jax.Array:
  """Returns the sums over sequences, [B, ...], of those over their shards."""
  if shards == 1:
    return sums
  return sums.reshape(-1, shards, *sums.shape[1:]).sum(1)


def joined(load: Load) -> Load:
  """Returns the sums over all layers, as if their tokens were one layer's."""
  keep = load.counts_N.ndim - 1
  return jax.tree.map(lambda a: a.sum(tuple(range(keep))), load)


def balance_loss(load: Load, batch: Load | None = None) -> jax.Array:
  """Returns `N sum_n f_n P_n`, summed over layers; K per balanced layer.

  f_n is the share of tokens that chose expert n, counted once per assignment
  (so the f_n sum to K), P_n its mean probability: the form of Switch
  Transformers eq. 4 (arXiv 2101.03961) for top-k. Only P_n has a gradient.

  Args:
    load: The load of the tokens whose probabilities are held to the shares.
    batch: The load of the batch that they are part of, whose shares and number
      of tokens then count, so that the sum over the parts is the loss of the
      batch. None stands for `load`.
  """
  batch = load if batch is None else batch
  return _balance(batch.counts_N, load.probability_N, batch.tokens).sum()


def sequence_balance_loss(load: Load) -> jax.Array:
  """Returns the balance loss within sequences, a mean over them.

  This is DeepSeek-V3's (arXiv 2412.19437) eq. 17-20, here with f_n counted as
  above.
  """
  return (load.sequence_balance / jnp.maximum(load.sequences, 1.0)).sum()


def _balance(
  counts_N: jax.Array, probability_N: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Returns `N sum_n f_n P_n`; leading axes stay."""
  tokens = jnp.maximum(tokens, 1.0)[..., None]
  share_N = jax.lax.stop_gradient(counts_N) / tokens
  return counts_N.shape[-1] * (share_N * probability_N / tokens).sum(-1)


def z_loss(load: Load) -> jax.Array:
  """Returns the mean squared log-partition per token, summed over layers.

  It keeps router logits small (ST-MoE eq. 5, arXiv 2202.08906).
  """
  return (load.z / jnp.maximum(load.tokens, 1.0)).sum()
