"""What experts compute: one SwiGLU network, or a bank of them."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.grouped_matmul import grouped_matmul
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import State, Tokens


def _gate(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
  """`down(silu(gate(x)) * up(x))`, without biases.

  Attributes:
    gate_up_D2F: the gate and the up projection.
    down_FD: the projection back.
  """

  def __init__(
    self, hidden_size: int, width: int, *, init_std: float, rngs: nnx.Rngs
  ):
    init = nnx.initializers.normal(init_std)
    self.gate_up_D2F = nnx.Param(
      init(rngs.params(), (hidden_size, 2, width), jnp.float32)
    )
    self.down_FD = nnx.Param(
      init(rngs.params(), (width, hidden_size), jnp.float32)
    )

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    gate_up_D2F = self.gate_up_D2F[...].astype(x_TD.dtype)
    # One matmul each: joined, the product would be sliced, and the gradient of
    # a slice of activations costs more than the second matmul saves.
    gate_TF = x_TD @ gate_up_D2F[:, 0]
    up_TF = x_TD @ gate_up_D2F[:, 1]
    return _gate(gate_TF, up_TF) @ self.down_FD[...].astype(x_TD.dtype)


class DenseLayer(nnx.Module):
  """A dense feed-forward with the calling convention of `MoELayer`."""

  def __init__(self, feed_forward: FeedForward):
    self.feed_forward = feed_forward

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, None]:
    del cell, tokens, key
    return self.feed_forward(x_TD), state, None


class ExpertBank(nnx.Module):
  """N SwiGLU experts, stacked.

  Attributes:
    gate_up_ND2F: the gate and up projections of every expert.
    down_NFD: the projections back.
  """

  def __init__(
    self,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(init_std)
    self.gate_up_ND2F = nnx.Param(
      init(rngs.params(), (num_experts, hidden_size, 2, width), jnp.float32)
    )
    self.down_NFD = nnx.Param(
      init(rngs.params(), (num_experts, width, hidden_size), jnp.float32)
    )

  @property
  def num_experts(self) -> int:
    """Experts in this bank; on a shard, those that live there."""
    return self.down_NFD.shape[0]

  def grouped(self, rows_MD: jax.Array, sizes_N: jax.Array) -> jax.Array:
    """Rows sorted by expert, `sizes_N` of them each; see `grouped_matmul`."""
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_MD.dtype)
    num_experts, hidden_size, _, width = gate_up_ND2F.shape
    flat_NDF = gate_up_ND2F.reshape(num_experts, hidden_size, 2 * width)
    gate_MF, up_MF = jnp.split(
      grouped_matmul(rows_MD, flat_NDF, sizes_N), 2, axis=-1
    )
    hidden_MF = _gate(gate_MF, up_MF)
    down_NFD = self.down_NFD[...].astype(rows_MD.dtype)
    return grouped_matmul(hidden_MF, down_NFD, sizes_N)

  def batched(self, rows_NCD: jax.Array) -> jax.Array:
    """C rows for every expert, padded or not, as one batched matmul."""
    gate_up_ND2F = self.gate_up_ND2F[...].astype(rows_NCD.dtype)
    gate_NCF, up_NCF = jnp.einsum('NCD,NDgF->gNCF', rows_NCD, gate_up_ND2F)
    hidden_NCF = _gate(gate_NCF, up_NCF)
    down_NFD = self.down_NFD[...].astype(rows_NCD.dtype)
    return jnp.einsum('NCF,NFD->NCD', hidden_NCF, down_NFD)
