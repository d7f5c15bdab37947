"""The decoder: embedding, blocks scanned by period, output head."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.layer import Aux, Norm
from moe_jax.experts.mlp import HIDDEN
from moe_jax.model.block import Carry, Past, Period
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import Context, start

# Cheap to keep, and recomputing it could route a rounded token elsewhere.
_ROUTING = 'routing'
_keep = jax.checkpoint_policies.save_only_these_names

# What the backward pass keeps of a period; the rest it computes again.
REMAT_POLICIES = {
  'none': None,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    _keep(_ROUTING, HIDDEN),
  ),
  'full': _keep(_ROUTING),
}


def load_only(aux: Aux) -> Any:
  """Of each MoE layer, keep the sums that loss and metrics need."""
  return aux.load


class Hidden(NamedTuple):
  """What a decoder computes of a batch before its head.

  Attributes:
    x_BLD: what the head reads, in the dtype of the arithmetic.
    aux: of every MoE layer what was asked for, each array with leading axes
      [MoE layers, S]; None for a model without MoE layers.
    memory: [layers, B, W, D], to be given back with the tokens that follow;
      None for a model that sees nothing before its sequence.
  """

  x_BLD: jax.Array
  aux: Any
  memory: jax.Array | None


class Output(NamedTuple):
  """What a decoder computes of a batch.

  Attributes:
    logits_BLV: float32.
    aux, memory: as in `Hidden`.
  """

  logits_BLV: jax.Array
  aux: Any
  memory: jax.Array | None


class Head(NamedTuple):
  """An output head, in float32.

  Attributes:
    weight_DV: its matrix.
    bias_V: or None.
  """

  weight_DV: jax.Array
  bias_V: jax.Array | None


class Decoder(nnx.Module):
  """A causal language model of `Block`s.

  Attributes:
    embed_VD: token embedding.
    cell: the router's recurrent cell, shared by all layers.
    prefix: blocks before the pattern repeats, unscanned.
    periods: the repeating blocks, every parameter with a leading axis [P].
    norm: before the head; None if the blocks end with one.
    head_DV: the output head; None if tied to the embedding.
    head_bias_V: of the output head, or None.
    key_pe_AW: keys of relative positions, shared by all layers and heads; None
      for other kinds of positions.
  """

  def __init__(
    self,
    embed_VD: nnx.Param,
    cell: Cell,
    prefix: Period,
    periods: Period | None,
    norm: Norm | None,
    head_DV: nnx.Param | None,
    *,
    head_bias_V: nnx.Param | None,
    key_pe_AW: nnx.Param | None,
    repeats: int,
    num_residual_logits: int,
    dtype: jnp.dtype,
    remat: str,
    unroll: int,
    shard_tokens: Callable[..., jax.Array],
    look_up: Callable[[jax.Array, jax.Array], jax.Array],
  ):
    """Puts the parts together; see `moe_jax.model.build`.

    Args:
      embed_VD: parameter.
      cell: part.
      prefix: part, possibly without blocks.
      periods: part; None where the prefix is all there is.
      norm: part or None.
      head_DV: parameter or None.
      head_bias_V: parameter or None.
      key_pe_AW: parameter or None.
      repeats: P.
      num_residual_logits: N where routers add up their logits, else 0.
      dtype: of the arithmetic outside routers and norms.
      remat: a key of `REMAT_POLICIES`.
      unroll: periods per step of the scan.
      shard_tokens: constrains an array's axis of B or T to the mesh; it is the
        leading one, or `axis`.
      look_up: `embed_VD[token_ids_BL]`, wherever they are.
    """
    self.embed_VD = embed_VD
    self.cell = cell
    self.prefix = prefix
    self.periods = periods
    self.norm = norm
    self.head_DV = head_DV
    self.head_bias_V = head_bias_V
    self.key_pe_AW = key_pe_AW
    self.repeats = repeats
    self.num_residual_logits = num_residual_logits
    self.dtype = dtype
    self.remat = remat
    self.unroll = unroll
    self.shard_tokens = shard_tokens
    self.look_up = look_up

  def __call__(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    keep: Callable[[Aux], Any] = load_only,
    *,
    memory: jax.Array | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Output:
    """Runs the model; see `hidden`."""
    x_BLD, *made = self.hidden(
      token_ids_BL, padding_mask_BL, keep, memory=memory, step=step, rng=rng
    )
    return Output(self._logits(x_BLD), *made)

  def hidden(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    keep: Callable[[Aux], Any] = load_only,
    *,
    memory: jax.Array | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Hidden:
    """Runs the model up to its head.

    Args:
      token_ids_BL: int32 vocabulary indices.
      padding_mask_BL: bool; False marks padding, at the end of a sequence.
      keep: what to return of each MoE layer's `Aux`.
      memory: of the call whose tokens came right before; None for zeros. Only
        for a model with a span.
      step: the training step, int32; None in evaluation.
      rng: of the random numbers of training; None, as in evaluation, for none.
    """
    x_BLD = self.look_up(self.embed_VD[...].astype(self.dtype), token_ids_BL)
    context = Context(self.cell, token_ids_BL, padding_mask_BL, step, rng)
    for_prefix, for_periods = context.split(2)
    state = start(self.cell, token_ids_BL.size, self.num_residual_logits)
    carry = self._shard(Carry(x_BLD, state))
    first, remembered = self._memories(memory, x_BLD)

    def run_period(
      carry: Carry,
      cell: Cell,
      token_ids_BL: jax.Array,
      padding_mask_BL: jax.Array,
      key_pe_AW: jax.Array | None,
      period: Period,
      memory: jax.Array | None,
      rng: jax.Array | None,
    ) -> tuple[Carry, tuple[Any, jax.Array | None]]:
      past = _past(memory, key_pe_AW, len(period.blocks))
      context = Context(cell, token_ids_BL, padding_mask_BL, step, rng)
      carry, auxes, memory = period(carry, context, past)
      kept = _stack([keep(aux) for aux in auxes])
      return self._shard(carry), (kept, self._stack_memory(memory))

    shared = self.cell, token_ids_BL, padding_mask_BL, self._key_pe()
    carry, made = run_period(carry, *shared, self.prefix, first, for_prefix.rng)
    if self.periods is not None:
      scan = nnx.scan(
        self._rematerialized(run_period),
        in_axes=(nnx.Carry, None, None, None, None, 0, 0, 0),
        out_axes=(nnx.Carry, 0),
        unroll=self.unroll,
      )
      rngs = for_periods.rng
      if rngs is not None:
        rngs = jax.random.split(rngs, self.repeats)
      carry, scanned = scan(carry, *shared, self.periods, remembered, rngs)
      made = tuple(map(_in_depth_order, made, scanned))
    x_BLD = carry.x_BLD if self.norm is None else self.norm(carry.x_BLD)
    return Hidden(x_BLD, *made)

  def head(self) -> Head:
    """What makes logits of the last hidden states."""
    bias_V = None if self.head_bias_V is None else self.head_bias_V[...]
    if self.head_DV is None:
      return Head(self.embed_VD[...].T, bias_V)
    return Head(self.head_DV[...], bias_V)

  def _key_pe(self) -> jax.Array | None:
    return None if self.key_pe_AW is None else self.key_pe_AW[...]

  def _memories(
    self, memory: jax.Array | None, x_BLD: jax.Array
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """The memory [blocks, B, W, D] of the prefix, and of the periods [P, ...].

    Zeros at the beginning of a text.
    """
    if self.key_pe_AW is None:
      return None, None
    first = len(self.prefix.blocks)
    period = len(self.periods.blocks) if self.periods is not None else 0
    if memory is None:
      batch, _, size = x_BLD.shape
      layers, span = first + self.repeats * period, self.key_pe_AW.shape[-1]
      memory = jnp.zeros((layers, batch, span, size), x_BLD.dtype)
    repeating = memory[first:].reshape(-1, max(period, 1), *memory.shape[1:])
    return memory[:first], repeating

  def _stack_memory(
    self, memory: Sequence[jax.Array | None]
  ) -> jax.Array | None:
    if not memory or memory[0] is None:
      return None
    return self.shard_tokens(jnp.stack(memory), axis=1)

  def _rematerialized(self, step: Callable) -> Callable:
    if self.remat == 'none':
      return step
    return nnx.remat(step, policy=REMAT_POLICIES[self.remat])

  def _logits(self, x_BLD: jax.Array) -> jax.Array:
    weight_DV, bias_V = self.head()
    logits_BLV = jnp.einsum(
      'BLD,DV->BLV',
      x_BLD,
      weight_DV.astype(x_BLD.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits_BLV if bias_V is None else logits_BLV + bias_V

  def _shard(self, carry: Carry) -> Carry:
    return jax.tree.map(self.shard_tokens, carry)


def _past(
  memory: jax.Array | None, key_pe_AW: jax.Array | None, num_blocks: int
) -> list[Past | None]:
  """What each of a period's blocks sees beside its sequence."""
  if memory is None:
    return [None] * num_blocks
  return [Past(memory[i], key_pe_AW) for i in range(num_blocks)]


def _stack(auxes: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *a: jnp.stack(a), *auxes) if auxes else None


def _in_depth_order(prefix: Any, scanned: Any) -> Any:
  """Joins the prefix's [layers, ...] and the scan's [P, layers, ...]."""
  flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scanned)
  if prefix is None:
    return flat
  return jax.tree.map(lambda *a: jnp.concatenate(a), prefix, flat)
