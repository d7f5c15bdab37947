"""RMoE's layerwise recurrence: routers that remember the layers below.

Source: RMoE (arXiv 2408.06793), equations 2 to 5. The recurrence runs over
layers, for every token on its own, so all tokens are computed in parallel. One
cell serves all layers: the decoder makes it and passes it at call.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

# The state of a router: () where it has no memory, h_TR float32 where it does.
State = jax.Array | tuple[()]

Precision = (
  jax.lax.Precision.HIGHEST
)  # float32 means float32 on TPU and GPU too


class Cell(Protocol):
  """What carries a token's routing history from one MoE layer to the next."""

  def start(self, num_tokens: int) -> State:
    """The state below the first MoE layer, for `num_tokens` tokens."""

  def __call__(self, u_TR: jax.Array, state: State) -> State:
    """The state after a layer whose projected input is `u_TR`."""


class Memoryless(nnx.Module):
  """No recurrence: the state is () in every layer."""

  def start(self, num_tokens: int) -> State:
    del num_tokens
    return ()


class GRUCell(nnx.Module):
  """The gated recurrent unit of RMoE eq. 2-3, in PyTorch's two-bias form.

  Attributes:
    input_R3R, hidden_R3R: weights of the reset, update and new gates, in this
      order, float32.
    input_bias_3R, hidden_bias_3R: their biases, float32.
  """

  def __init__(self, state_size: int, *, rngs: nnx.Rngs):
    bound = state_size**-0.5  # PyTorch's initial range for recurrent cells

    def uniform(*shape: int) -> nnx.Param:
      return nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
      )

    self.input_R3R = uniform(state_size, 3, state_size)
    self.hidden_R3R = uniform(state_size, 3, state_size)
    self.input_bias_3R = uniform(3, state_size)
    self.hidden_bias_3R = uniform(3, state_size)

  def start(self, num_tokens: int) -> State:
    """h_0 = 0, [T, R] float32."""
    return jnp.zeros((num_tokens, self.hidden_bias_3R.shape[-1]), jnp.float32)

  def __call__(self, u_TR: jax.Array, h_TR: State) -> State:
    reset, update, new = _gates(u_TR, self.input_R3R, self.input_bias_3R)
    reset_h, update_h, new_h = _gates(
      h_TR, self.hidden_R3R, self.hidden_bias_3R
    )
    r_TR = jax.nn.sigmoid(reset + reset_h)  # RMoE eq. 2
    z_TR = jax.nn.sigmoid(update + update_h)
    n_TR = jnp.tanh(new + r_TR * new_h)  # RMoE eq. 3
    return (1 - z_TR) * n_TR + z_TR * h_TR


def _gates(
  x_TR: jax.Array, weight_R3R: nnx.Param, bias_3R: nnx.Param
) -> tuple[jax.Array, ...]:
  """The three gates' parts from one side, [T, R] each."""
  num_gates, state_size = bias_3R.shape
  # Flat, so that the gates are split in the last axis: fastest backward.
  weight_RX = weight_R3R[...].reshape(-1, num_gates * state_size)
  product_TX = jnp.matmul(x_TR, weight_RX, precision=Precision)
  return tuple(jnp.split(product_TX + bias_3R[...].reshape(-1), 3, axis=-1))


class HiddenFeatures(nnx.Module):
  """A conventional router's features: the hidden state itself (RMoE eq. 1)."""

  def __call__(
    self, x_TD: jax.Array, state: State, cell: Cell
  ) -> tuple[jax.Array, State]:
    del cell
    return x_TD, state


class RecurrentFeatures(nnx.Module):
  """RMoE's features: the shared cell's state after this layer (eq. 4-5).

  Attributes:
    projector_DR: Proj_i, this layer's own and without a bias, float32.
  """

  def __init__(
    self,
    hidden_size: int,
    state_size: int,
    *,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(init_std)
    self.projector_DR = nnx.Param(
      init(rngs.params(), (hidden_size, state_size), jnp.float32)
    )

  def __call__(
    self, x_TD: jax.Array, state: State, cell: Cell
  ) -> tuple[jax.Array, State]:
    u_TR = jnp.einsum(  # RMoE eq. 4
      'TD,DR->TR', x_TD, self.projector_DR[...], precision=Precision
    )
    h_TR = cell(u_TR, state)  # RMoE eq. 5
    return h_TR, h_TR
