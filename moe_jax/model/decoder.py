"""The decoder: embedding, blocks scanned by period, output head."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import head_dim, layer_kinds, vocab_rows
from moe_jax.experts.layer import Aux
from moe_jax.experts.mlp import HIDDEN
from moe_jax.model import build
from moe_jax.model.attention import (
  ATTENDED,
  AttentionState,
  BlockContext,
  Segments,
  Slots,
)
from moe_jax.model.block import Carry, Period
from moe_jax.model.embedding import look_up
from moe_jax.parallel import context as context_lib
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parameter import EXPERT, declaration, param
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import Context, start

# Rows of generation: with more, copies of weights are of no account.
_FEW = 128

# Cheap to keep, and recomputing it could route a rounded token elsewhere.
_ROUTING = 'routing'
_keep = jax.checkpoint_policies.save_only_these_names

# What the backward pass keeps of a period; the rest it computes again.
REMAT_POLICIES = {
  'none': None,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    _keep(_ROUTING, HIDDEN, ATTENDED),
  ),
  'full': _keep(_ROUTING),
}


def load_only(aux: Aux) -> Any:
  """Returns the sums that loss and metrics need of an MoE layer."""
  return aux.load


class Hidden(NamedTuple):
  """What a decoder computes of a batch before its head.

  Attributes:
    x_BLD: What the head reads, in the dtype of the arithmetic; [B n, L / n, D]
      on a mesh whose axis `context` has n devices.
    aux: What was asked for of every MoE layer, each array with leading axes
      [MoE layers, S]; None for a model without MoE layers.
    attention_state: What attention remembers, each array [layers, B, ...], to
      be given back with the tokens that follow; () where that is nothing.
  """

  x_BLD: jax.Array
  aux: Any
  attention_state: AttentionState


class Output(NamedTuple):
  """What a decoder computes of a batch.

  Attributes:
    logits_BLV: The logits of the next token, float32.
    aux: As in `Hidden`.
    attention_state: As in `Hidden`.
  """

  logits_BLV: jax.Array
  aux: Any
  attention_state: AttentionState


class Head(NamedTuple):
  """An output head, in float32; its V has the padding of the vocabulary.

  Attributes:
    weight_DV: Its matrix.
    bias_V: Its bias, -inf at the padding; None where there is neither.
  """

  weight_DV: jax.Array
  bias_V: jax.Array | None


class Decoder(nnx.Module):
  """A causal language model: the one that a config describes.

  Attributes:
    vocab_size: V, of which arrays named so may have more: the padding.
    embed_VD: The token embedding.
    cell: The recurrent cell that the routers of all layers share.
    prefix: The blocks before the pattern repeats, unscanned.
    periods: The repeating blocks, every parameter with a leading axis [P]; None
      where the prefix is all there is.
    norm: The norm before the head; None if the blocks end with one.
    head_DV: The output head; None if tied to the embedding.
    head_bias_V: The bias of the output head, or None.
    key_pe_AW: The keys of relative positions that attention shares between
      layers and heads; None for other kinds of positions.
  """

  def __init__(
    self,
    config: ConfigDict,
    vocab_size: int,
    mesh: jax.sharding.Mesh | None,
    *,
    rngs: nnx.Rngs,
    disable_top: int = 0,
    cached: bool = False,
  ) -> None:
    """Makes the model and, where this runs, every parameter.

    Call it under `jax.jit` or `jax.eval_shape`.

    Args:
      config: A config that `moe_jax.config.validate` has passed.
      vocab_size: V.
      mesh: Where it will run; None for one device of the default platform.
      rngs: Has the stream `params`. The order of what is drawn from it is part
        of what a seed means.
      disable_top: The number of experts left out of every choice; see `Select`.
      cached: Whether attention is that of generation; see `attention_cached`.
    """
    model, kinds = config.model, layer_kinds(config)
    parts = build.make_parts(config, vocab_size, mesh, disable_top, cached)
    first, period = build.repetition(kinds, config.moe.every)
    self.mesh, self.dtype, self.attend = mesh, parts.dtype, parts.attend
    self.remat = model.remat
    self.num_residual_logits = build.num_residual_logits(config)
    self.num_layers = len(kinds)
    # Texts to go on with are of any length, so there the axis splits rows.
    self.seq_shards = 1 if cached else context_lib.size(mesh)
    self.in_place = cached and build.reads_in_place(parts, mesh)
    self.vocab_size = vocab_size
    self.repeats = (len(kinds) - first) // period
    self.unroll = build.unrolled(config, mesh, self.repeats)
    pattern = kinds[first : first + period]
    self.periods = build.make_periods(parts, pattern, self.repeats, rngs)
    self.embed_VD = build.make_embedding(config, vocab_size, rngs)
    self.head_DV = build.make_head(config, vocab_size, rngs)
    self.cell = build.make_cell(config, rngs)
    self.prefix = build.make_period(parts, kinds[:first], rngs)
    self.norm = build.make_norm(config) if model.norm_place == 'pre' else None
    rows = vocab_rows(config, vocab_size)
    self.head_bias_V = param(jnp.zeros(rows)) if model.head_bias else None
    self.key_pe_AW = self.attend.key_pe(head_dim(config), rngs)

  def __call__(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    keep: Callable[[Aux], Any] = load_only,
    *,
    attention_state: AttentionState = None,
    segments: Segments | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Output:
    """Runs the model; see `hidden`."""
    x_BLD, aux, attention_state = self.hidden(
      token_ids_BL,
      padding_mask_BL,
      keep,
      attention_state=attention_state,
      segments=segments,
      step=step,
      rng=rng,
    )
    logits_BLV = self.logits(x_BLD.reshape(*token_ids_BL.shape, -1))
    return Output(logits_BLV, aux, attention_state)

  def hidden(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    keep: Callable[[Aux], Any] = load_only,
    *,
    attention_state: AttentionState = None,
    segments: Segments | None = None,
    slots: Slots | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Hidden:
    """Runs the model up to its head.

    Args:
      token_ids_BL: The vocabulary indices, int32.
      padding_mask_BL: Bool; False marks padding, at the end of a sequence.
      keep: What to return of each MoE layer's `Aux`.
      attention_state: What the call returned whose tokens came right before;
        None for that of a text's beginning.
      segments: The documents of packed rows; None where a row is one segment.
      slots: How the cache stands that `attention_state` is; None where it is
        none.
      step: The training step, int32; None in evaluation.
      rng: The key of the random numbers of training; None, as in evaluation,
        for none.
    """
    if attention_state is None:
      attention_state = self.start(len(token_ids_BL))
    context = self._context(token_ids_BL, padding_mask_BL, step, rng)
    carry, aux, attention_state = self._run_blocks(
      self._embed(context.token_ids_BL),
      context,
      segments,
      slots,
      attention_state,
      keep,
    )
    x_BLD = carry.x_BLD if self.norm is None else self.norm(carry.x_BLD)
    return Hidden(x_BLD, aux, attention_state)

  def layer_by_layer(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    *,
    attention_state: AttentionState,
    segments: Segments | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> Iterator[tuple[Carry, Aux | None]]:
    """Yields what the embedding and then each layer passes on, with its `Aux`.

    It is what `hidden` computes, for those who look for where something begins;
    without a scan, so what compiles grows with the layers.
    """
    context = self._context(token_ids_BL, padding_mask_BL, step, rng)
    carry = self._embed(context.token_ids_BL)
    yield carry, None
    for period, of_blocks, of_period in self._each_period(
      context, segments, attention_state
    ):
      for block, block_context, state in zip(
        period.blocks,
        of_period.split(len(period.blocks)),
        _unstack(of_blocks, len(period.blocks)),
        strict=True,
      ):
        carry, aux, _ = block(carry, block_context, state)
        yield carry, aux

  def _each_period(
    self,
    context: Context,
    segments: Segments | None,
    attention_state: AttentionState,
  ) -> Iterator[tuple[Period, AttentionState, BlockContext]]:
    """Yields the prefix, and every period, with what its blocks are given."""
    of_prefix, of_periods = self._by_period(attention_state)
    for_prefix, for_periods = context.split(2)
    key_pe_AW = None if self.key_pe_AW is None else self.key_pe_AW[...]

    def given(rng: jax.Array | None) -> BlockContext:
      return BlockContext(
        context.cell,
        context.token_ids_BL,
        context.padding_mask_BL,
        context.step,
        rng,
        key_pe_AW,
        segments,
        seq_shards=self.seq_shards,
      )

    yield self.prefix, of_prefix, given(for_prefix.rng)
    if self.periods is None:
      return
    graphdef, params = nnx.split(self.periods)
    rngs = for_periods.rng
    if rngs is not None:
      rngs = jax.random.split(rngs, self.repeats)
    for i in range(self.repeats):
      own = jax.tree.map(operator.itemgetter(i), (params, of_periods, rngs))
      yield nnx.merge(graphdef, own[0]), own[1], given(own[2])

  def _context(
    self,
    token_ids_BL: jax.Array,
    padding_mask_BL: jax.Array,
    step: jax.Array | None,
    rng: jax.Array | None,
  ) -> Context:
    """Returns what all layers are told, of sequences in shards."""
    return Context(
      self.cell,
      context_lib.shard(token_ids_BL, self.seq_shards),
      context_lib.shard(padding_mask_BL, self.seq_shards),
      step,
      rng,
      seq_shards=self.seq_shards,
    )

  def _embed(self, token_ids_BL: jax.Array) -> Carry:
    """Returns what the first layer is given."""
    table_VD = self.embed_VD[...].astype(self.dtype)
    with jax.named_scope('embedding'):
      x_BLD = look_up(table_VD, token_ids_BL, mesh=self.mesh)
    router_state = start(self.cell, token_ids_BL.size, self.num_residual_logits)
    return self._shard(Carry(x_BLD, router_state))

  def start(self, batch_size: int) -> AttentionState:
    """Returns what attention remembers at the beginning of a text."""
    hidden_size = self.embed_VD.shape[1]
    return self.attend.start(
      self.num_layers, batch_size, hidden_size, self.dtype
    )

  def head(self) -> Head:
    """Returns what makes logits of the last hidden states."""
    bias_V = None if self.head_bias_V is None else self.head_bias_V[...]
    rows = self.embed_VD.shape[0]
    if rows > self.vocab_size:
      # exp(-inf) is 0: no padding is predicted, nor has it a gradient.
      given_V = jnp.zeros(rows) if bias_V is None else bias_V
      bias_V = jnp.where(jnp.arange(rows) < self.vocab_size, given_V, -jnp.inf)
    if self.head_DV is None:
      return Head(self.embed_VD[...].T, bias_V)
    return Head(self.head_DV[...], bias_V)

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Returns logits_BLV, float32, of last hidden states as `hidden` has."""
    weight_DV, bias_V = self.head()
    if weight_DV.shape[1] > self.vocab_size:
      weight_DV = weight_DV[:, : self.vocab_size]
      bias_V = None if bias_V is None else bias_V[: self.vocab_size]
    with jax.named_scope('head'):
      logits_BLV = jnp.einsum(
        'BLD,DV->BLV',
        x_BLD,
        weight_DV.astype(x_BLD.dtype),
        preferred_element_type=jnp.float32,
      )
    return logits_BLV if bias_V is None else logits_BLV + bias_V

  def _run_blocks(
    self,
    carry: Carry,
    context: Context,
    segments: Segments | None,
    slots: Slots | None,
    attention_state: AttentionState,
    keep: Callable[[Aux], Any],
  ) -> tuple[Carry, Any, AttentionState]:
    """Runs the prefix, and scans the periods.

    Returns:
      What the last block passes on, what is kept of every `Aux`, and the next
      state of attention.
    """
    of_prefix, of_periods = self._by_period(attention_state)
    for_prefix, for_periods = context.split(2)
    run_period = self._period_step(context.step, keep)
    key_pe_AW = None if self.key_pe_AW is None else self.key_pe_AW[...]
    # They are arguments, as nnx.scan may not close over modules.
    shared = (
      context.cell,
      context.token_ids_BL,
      context.padding_mask_BL,
      key_pe_AW,
      segments,
      slots,
    )
    carry, outputs = run_period(
      carry, *shared, self.prefix, of_prefix, for_prefix.rng, None
    )
    if self.periods is None:
      return carry, *outputs
    if self.in_place and slots is not None and len(carry.x_BLD) <= _FEW:
      carry, scanned = self._scan_in_place(
        run_period, carry, shared, of_periods
      )
    else:
      scan = nnx.scan(
        self._rematerialized(run_period),
        in_axes=(nnx.Carry, *[None] * len(shared), 0, 0, 0, None),
        out_axes=(nnx.Carry, 0),
        unroll=self.unroll,
      )
      rngs = for_periods.rng
      if rngs is not None:
        rngs = jax.random.split(rngs, self.repeats)
      carry, scanned = scan(
        carry, *shared, self.periods, of_periods, rngs, None
      )
    return carry, *map(_in_depth_order, outputs, scanned)

  def _scan_in_place(
    self,
    run_period: Callable[..., Any],
    carry: Carry,
    shared: tuple[Any, ...],
    of_periods: AttentionState,
  ) -> tuple[Carry, Any]:
    """Scans the periods, but for the experts, which run where they are.

    A scan gives its body slices, which XLA copies, and of the experts that
    would be all of them for the few that few tokens choose.

    Args:
      run_period: What is scanned.
      carry: What the prefix passes on.
      shared: What every period is given.
      of_periods: The states of attention.

    Returns:
      What the last period passes on, and the outputs of all.
    """
    graphdef, *states = nnx.split(self.periods, _of_experts, ...)
    experts, others = states

    def run(
      carry: Carry,
      shared: tuple[Any, ...],
      experts: nnx.State,
      others: nnx.State,
      of_period: AttentionState,
      number: jax.Array,
    ) -> tuple[Carry, Any]:
      period = nnx.merge(graphdef, experts, others)
      return run_period(carry, *shared, period, of_period, None, number)

    scan = nnx.scan(
      run,
      in_axes=(nnx.Carry, None, None, 0, 0, 0),
      out_axes=(nnx.Carry, 0),
      unroll=self.unroll,
    )
    numbers = jnp.arange(self.repeats)
    return scan(carry, shared, experts, others, of_periods, numbers)

  def _period_step(
    self, step: jax.Array | None, keep: Callable[[Aux], Any]
  ) -> Callable[..., tuple[Carry, tuple[Any, AttentionState]]]:
    """Returns the function that is scanned over the periods."""

    def run_period(
      carry: Carry,
      cell: Cell,
      token_ids_BL: jax.Array,
      padding_mask_BL: jax.Array,
      key_pe_AW: jax.Array | None,
      segments: Segments | None,
      slots: Slots | None,
      period: Period,
      attention_state: AttentionState,
      rng: jax.Array | None,
      number: jax.Array | None,
    ) -> tuple[Carry, tuple[Any, AttentionState]]:
      context = BlockContext(
        cell,
        token_ids_BL,
        padding_mask_BL,
        step,
        rng,
        key_pe_AW,
        segments,
        slots,
        period=number,
        seq_shards=self.seq_shards,
      )
      states = _unstack(attention_state, len(period.blocks))
      carry, auxes, states = period(carry, context, states)
      kept = _stack([keep(aux) for aux in auxes])
      states = self._shard(_stack(states), 1, self.attend.state_axes)
      return self._shard(carry), (kept, states)

    return run_period

  def _by_period(
    self, attention_state: AttentionState
  ) -> tuple[AttentionState, AttentionState]:
    """Cuts [layers, ...] into that of the prefix and [P, blocks, ...]."""
    first = len(self.prefix.blocks)
    period = len(self.periods.blocks) if self.periods is not None else 1

    def repeating(a: jax.Array) -> jax.Array:
      return a[first:].reshape(-1, period, *a.shape[1:])

    of_prefix = jax.tree.map(lambda a: a[:first], attention_state)
    return of_prefix, jax.tree.map(repeating, attention_state)

  def _rematerialized(self, run_period: Callable) -> Callable:
    if self.remat == 'none':
      return run_period
    return nnx.remat(run_period, policy=REMAT_POLICIES[self.remat])

  def _shard(
    self, tree: Any, axis: int = 0, behind: tuple[str, ...] = ()
  ) -> Any:
    """Constrains the axis of B or T of all arrays, and axes behind it."""
    return jax.tree.map(
      lambda a: mesh_lib.shard_tokens(a, self.mesh, axis, behind), tree
    )


def _of_experts(path: Any, variable: nnx.Variable) -> bool:
  """Returns whether a parameter is of experts."""
  del path
  return EXPERT in declaration(variable).axes


def _stack(trees: Sequence[Any]) -> Any:
  """Returns the stacked arrays of all trees; None if there are no trees."""
  return jax.tree.map(lambda *a: jnp.stack(a), *trees) if trees else None


def _unstack(tree: Any, count: int) -> list[Any]:
  """Takes apart what `_stack` made of so many trees."""
  return [jax.tree.map(operator.itemgetter(i), tree) for i in range(count)]


def _in_depth_order(prefix: Any, scanned: Any) -> Any:
  """Joins the prefix's [layers, ...] and the scan's [P, layers, ...]."""
  flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scanned)
  if prefix is None:
    return flat
  return jax.tree.map(lambda *a: jnp.concatenate(a), prefix, flat)
