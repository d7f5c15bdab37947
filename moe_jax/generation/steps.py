"""The two compiled programs of generation: reading prompts, and one token more.

Both are pure functions of parameters and arrays. What a row's tokens are
follows from its own prompt, the seed, its number and the positions alone, not
from the rows beside it.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_jax.experts.layer import Aux
from moe_jax.generation.sampling import Sampling, sample
from moe_jax.model.attention_cached import Cache, CachedAttend
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib

Params = Any


class Draw(NamedTuple):
  """What tokens are drawn by.

  Attributes:
    seed: The seed of all random numbers, uint32 [].
    numbers_B: The number of each row's prompt, int32.
    sampling: How they are drawn.
  """

  seed: jax.Array
  numbers_B: jax.Array
  sampling: Sampling


class Next(NamedTuple):
  """What a program returns beside the cache.

  Attributes:
    ids_B: The token that follows in each row, int32.
    experts: The first choice of every token that was read, int32 [MoE layers,
      S, B, L]; N where it has none. None where nobody asked.
  """

  ids_B: jax.Array
  experts: jax.Array | None


class Steps:
  """The programs of a model, compiled when they are first called.

  Attributes:
    attend: The attention of the model.
    vocab_size: V.
    returns_experts: Whether the programs return the experts of every token.
    num_shards: What the number of rows has to be a multiple of.
    read: (params, ids_BL, lengths_B, draw, num_slots=C) -> Cache, Next.
    go_on: (params, cache, ids_B, lengths_B, active_B, read, count, draw) ->
      Cache, Next; see `next_logits` for these. The cache is donated.
  """

  def __init__(
    self,
    config: ConfigDict,
    vocab_size: int,
    mesh: Mesh,
    *,
    disable_top: int = 0,
    experts: bool = False,
  ) -> None:
    """Describes the programs.

    No token is dropped for others, whatever `moe.dispatch` says.

    Args:
      config: A validated config; its sections `model`, `moe` and `router` are
        enough.
      vocab_size: V.
      mesh: Where the parameters are.
      disable_top: The number of experts left out of every choice; see `Select`.
      experts: Whether to return the experts of every token.

    Raises:
      UserError: The config names an implementation that cannot run there.
    """
    model = nnx.eval_shape(lambda: _make(config, vocab_size, mesh, disable_top))
    self._graphdef = nnx.graphdef(model)
    self._keep = _first_choice if experts else _nothing
    self.returns_experts = experts
    self.vocab_size = vocab_size
    self.attend = cast(CachedAttend, model.attend)
    self.num_shards = int(
      np.prod([mesh.shape[axis] for axis in mesh_lib.TOKEN_AXES])
    )
    self._replicated = mesh_lib.replicated(mesh)
    of_cache = mesh_lib.memory_sharding(mesh, self.attend.state_axes)
    jit = functools.partial(
      jax.jit,
      out_shardings=(of_cache, self._replicated),
      compiler_options=mesh_lib.compiler_options(mesh),
    )
    self.read = jit(self._read, static_argnames='num_slots')
    self.go_on = jit(self._go_on, donate_argnames='cache')

  def place(self, tree: Any) -> Any:
    """Returns arrays that all processes have alike, on all devices."""
    return jax.device_put(tree, self._replicated)

  def first_logits(
    self,
    params: Params,
    ids_BL: jax.Array,
    lengths_B: jax.Array,
    num_slots: int,
  ) -> tuple[jax.Array, Cache, Any]:
    """Reads prompts.

    Args:
      params: The parameters of the model.
      ids_BL: The tokens of each prompt, int32, then padding.
      lengths_B: The number of these tokens, int32; 0 for a row that is none.
      num_slots: The slots of the cache, C.

    Returns:
      The logits of what follows each prompt, float32 [B, V]; the cache; and
      what is kept of every MoE layer's `Aux`.
    """
    model: Decoder = nnx.merge(self._graphdef, params)
    mask_BL = jnp.arange(ids_BL.shape[1]) < lengths_B[:, None]
    x_BLD, kept, read = model.hidden(ids_BL, mask_BL, self._keep)
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    logits_B1V = model.logits(jnp.take_along_axis(x_BLD, last_B11, axis=1))
    return logits_B1V[:, 0], self.attend.fill(read, lengths_B, num_slots), kept

  def next_logits(
    self,
    params: Params,
    cache: Cache,
    ids_B: jax.Array,
    lengths_B: jax.Array,
    active_B: jax.Array,
    read: jax.Array,
    count: jax.Array,
  ) -> tuple[jax.Array, Cache, Any]:
    """Reads one more token of every row.

    Args:
      params: The parameters of the model.
      cache: What the call before returned.
      ids_B: The tokens, int32.
      lengths_B: As in `first_logits`.
      active_B: Bool; the token of a row that is not goes to no expert.
      read: The L of `first_logits`, int32 [].
      count: How many tokens each row had since then, int32 [].

    Returns:
      As `first_logits`.
    """
    model: Decoder = nnx.merge(self._graphdef, params)
    num_slots = cache.key_BGCA.shape[-2]
    slots = self.attend.slots(lengths_B, read, count, num_slots)
    x_B1D, kept, new = model.hidden(
      ids_B[:, None],
      active_B[:, None],
      self._keep,
      attention_state=cache,
      slots=slots,
    )
    return model.logits(x_B1D)[:, 0], cache.put(new, slots), kept

  def _read(
    self,
    params: Params,
    ids_BL: jax.Array,
    lengths_B: jax.Array,
    draw: Draw,
    *,
    num_slots: int,
  ) -> tuple[Cache, Next]:
    logits_BV, cache, kept = self.first_logits(
      params, ids_BL, lengths_B, num_slots
    )
    return cache, _next(logits_BV, lengths_B, draw, kept)

  def _go_on(
    self,
    params: Params,
    cache: Cache,
    ids_B: jax.Array,
    lengths_B: jax.Array,
    active_B: jax.Array,
    read: jax.Array,
    count: jax.Array,
    draw: Draw,
  ) -> tuple[Cache, Next]:
    logits_BV, cache, kept = self.next_logits(
      params, cache, ids_B, lengths_B, active_B, read, count
    )
    position_B = lengths_B + count + 1
    return cache, _next(logits_BV, position_B, draw, kept)


def _make(
  config: ConfigDict, vocab_size: int, mesh: Mesh, disable_top: int
) -> Decoder:
  """Returns the model for generation, whose parameters are those of training.

  What a token becomes must not depend on others that are generated beside it.
  """
  alone = config.copy_and_resolve_references()
  with alone.unlocked():
    alone.moe.dispatch = 'dropless'
  return Decoder(
    alone,
    vocab_size,
    mesh,
    rngs=nnx.Rngs(params=0),
    disable_top=disable_top,
    cached=True,
  )


def _next(
  logits_BV: jax.Array, position_B: jax.Array, draw: Draw, kept: Any
) -> Next:
  """Draws a token of every row, by a key of its number and position."""
  seed = jax.random.key(draw.seed)

  def key(number: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(seed, number), position)

  keys_B = jax.vmap(key)(draw.numbers_B, position_B)
  # What was read are B rows of equal length.
  experts = jax.tree.map(
    lambda a: a.reshape(*a.shape[:-1], len(logits_BV), -1), kept
  )
  return Next(sample(logits_BV, keys_B, draw.sampling), experts)


def _nothing(aux: Aux) -> None:
  """Keeps nothing of an MoE layer."""
  del aux


def _first_choice(aux: Aux) -> jax.Array:
  """Keeps the expert that each token prefers, [S, T]."""
  return aux.routing.indices_TK[..., 0]
