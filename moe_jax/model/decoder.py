"""The decoder: embedding, blocks scanned by period, output head."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.cartesian import split
from moe_jax.experts.moe import Watched
from moe_jax.model.block import Period
from moe_jax.model.layers import RMSNorm
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import State, Tokens, start

# Cheap to keep, and recomputing it could route a rounded token elsewhere.
_KEEP_ROUTING = jax.checkpoint_policies.save_only_these_names('routing')

# What the backward pass recomputes of a period.
REMAT_POLICIES = {
  'none': None,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KEEP_ROUTING
  ),
  'full': _KEEP_ROUTING,
}


def load_only(watched: Watched) -> Any:
  """Of each MoE layer, keep the sums that loss and metrics need."""
  return watched.load


class Decoder(nnx.Module):
  """A causal language model of `Block`s.

  Attributes:
    embed_VD: token embedding.
    cell: the router's recurrent cell, shared by all layers.
    prefix: blocks before the pattern repeats, unscanned.
    periods: the repeating blocks, every parameter with a leading axis [P].
    norm: before the head.
    head_DV: the output head; None if tied to the embedding.
  """

  def __init__(
    self,
    embed_VD: nnx.Param,
    cell: Cell,
    prefix: Period,
    periods: Period | None,
    norm: RMSNorm,
    head_DV: nnx.Param | None,
    *,
    repeats: int,
    num_residual_logits: int,
    dtype: jnp.dtype,
    remat: str,
    unroll: int,
    shard_tokens: Callable[[jax.Array], jax.Array],
    replicate: Callable[[jax.Array], jax.Array],
  ):
    """Puts the parts together; see `moe_jax.model.build`.

    Args:
      embed_VD: parameter.
      cell: part.
      prefix: part, possibly without blocks.
      periods: part; None where the prefix is all there is.
      norm: part.
      head_DV: parameter or None.
      repeats: P.
      num_residual_logits: N where routers add up their logits, else 0.
      dtype: of the arithmetic outside routers and norms.
      remat: a key of `REMAT_POLICIES`.
      unroll: periods per step of the scan.
      shard_tokens: constrains an array's leading axis (B or T) to the mesh.
      replicate: gives every device the whole array.
    """
    self.embed_VD = embed_VD
    self.cell = cell
    self.prefix = prefix
    self.periods = periods
    self.norm = norm
    self.head_DV = head_DV
    self.repeats = repeats
    self.num_residual_logits = num_residual_logits
    self.dtype = dtype
    self.remat = remat
    self.unroll = unroll
    self.shard_tokens = shard_tokens
    self.replicate = replicate

  def __call__(
    self,
    ids_BL: jax.Array,
    real_BL: jax.Array,
    keep: Callable[[Watched], Any] = load_only,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Runs the model.

    Args:
      ids_BL: int32 vocabulary indices.
      real_BL: bool; False marks padding, at the end of a sequence.
      keep: what to return of each MoE layer's `Watched`.
      key: of the random numbers of training; None, as in evaluation, for none.

    Returns:
      logits_BLV float32, and what `keep` returned, every array with leading
      axes [MoE layers, S]; None for a model without MoE layers.
    """
    # Looked up whole: the partitioner turns a look-up in a table split by D
    # into a copy of the activations on every device.
    embed_VD = self.replicate(self.embed_VD[...].astype(self.dtype))
    x_BLD = embed_VD[ids_BL]
    tokens = Tokens(ids_BL, real_BL)
    prefix_key, periods_key = split(key, 2)
    state = start(self.cell, ids_BL.size, self.num_residual_logits)
    carry = self._shard((x_BLD, state))

    def step(
      carry: tuple[jax.Array, State],
      cell: Cell,
      tokens: Tokens,
      period: Period,
      key: jax.Array | None,
    ) -> tuple[tuple[jax.Array, State], Any]:
      x_BLD, state, watched = period(*carry, cell, tokens, key)
      return self._shard((x_BLD, state)), _stack([keep(w) for w in watched])

    carry, watched = step(carry, self.cell, tokens, self.prefix, prefix_key)
    if self.periods is not None:
      scan = nnx.scan(
        self._rematerialized(step),
        in_axes=(nnx.Carry, None, None, 0, 0),
        out_axes=(nnx.Carry, 0),
        unroll=self.unroll,
      )
      keys = (
        None if key is None else jax.random.split(periods_key, self.repeats)
      )
      carry, scanned = scan(carry, self.cell, tokens, self.periods, keys)
      watched = _in_depth_order(watched, scanned)
    x_BLD, _ = carry
    return self._logits(self.norm(x_BLD)), watched

  def _rematerialized(self, step: Callable) -> Callable:
    if self.remat == 'none':
      return step
    return nnx.remat(step, policy=REMAT_POLICIES[self.remat])

  def _logits(self, x_BLD: jax.Array) -> jax.Array:
    if self.head_DV is None:
      head_DV = self.embed_VD[...].T
    else:
      head_DV = self.head_DV[...]
    return jnp.einsum(
      'BLD,DV->BLV',
      x_BLD,
      head_DV.astype(x_BLD.dtype),
      preferred_element_type=jnp.float32,
    )

  def _shard(self, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    return jax.tree.map(self.shard_tokens, carry)


def _stack(watched: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *a: jnp.stack(a), *watched) if watched else None


def _in_depth_order(prefix: Any, scanned: Any) -> Any:
  """Joins the prefix's [layers, ...] and the scan's [P, layers, ...]."""
  flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scanned)
  if prefix is None:
    return flat
  return jax.tree.map(lambda *a: jnp.concatenate(a), prefix, flat)
