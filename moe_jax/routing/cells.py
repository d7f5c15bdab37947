"""The recurrent cells a router's memory can be: none, RNN, GRU, LSTM.

All are in PyTorch's form, with one bias on each side. A cell is
`cell(u_TX, state) -> h_TR, state`, with X the width of its input; its weights
and its arithmetic are float32.
"""

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.parameter import param
from moe_jax.registry import CELLS
from moe_jax.routing.matmul import matmul

__all__ = ['CELLS', 'Cell', 'CellState']

# What a cell remembers of each token: (), h_TR, or (h_TR, c_TR).
CellState = jax.Array | tuple[jax.Array, ...]
State = TypeVar('State', bound=CellState)


class Cell(Protocol[State]):
  """What carries a token's routing history from one MoE layer to the next."""

  def start(self, num_tokens: int) -> State:
    """Returns the state below the first MoE layer, for `num_tokens` tokens."""
    ...

  def __call__(self, u_TX: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Returns h_TR, which the router reads, and the next layer's state."""
    ...


@CELLS.register('none')
class Memoryless(nnx.Module):
  """Has no recurrence: what is read is the input, and the state is ()."""

  def __init__(self, input_size: int, state_size: int, *, rngs: nnx.Rngs):
    del input_size, state_size, rngs

  def start(self, num_tokens: int) -> tuple[()]:
    """Returns the state of nothing to remember, ()."""
    del num_tokens
    return ()

  def __call__(
    self, u_TX: jax.Array, state: tuple[()]
  ) -> tuple[jax.Array, tuple[()]]:
    return u_TX, state


@CELLS.register('rnn')
class RNNCell(nnx.Module):
  """Computes `h' = tanh(W u + b + U h + c)`.

  Attributes:
    input_XR, hidden_RR: The weights W and U, transposed.
    input_bias_R, hidden_bias_R: The biases b and c.
  """

  def __init__(self, input_size: int, state_size: int, *, rngs: nnx.Rngs):
    uniform = _initializer(state_size, rngs)
    self.input_XR = uniform(input_size, state_size)
    self.hidden_RR = uniform(state_size, state_size)
    self.input_bias_R = uniform(state_size)
    self.hidden_bias_R = uniform(state_size)

  def start(self, num_tokens: int) -> jax.Array:
    """Returns h_0 = 0, [T, R] float32."""
    return jnp.zeros((num_tokens, self.hidden_RR.shape[0]), jnp.float32)

  def __call__(
    self, u_TX: jax.Array, h_TR: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    [new] = _gates(u_TX, self.input_XR, self.input_bias_R, 1)
    [new_h] = _gates(h_TR, self.hidden_RR, self.hidden_bias_R, 1)
    h_TR = jnp.tanh(new + new_h)
    return h_TR, h_TR


@CELLS.register('gru')
class GRUCell(nnx.Module):
  """The gated recurrent unit of RMoE eq. 2-3.

  Attributes:
    input_X3R, hidden_R3R: The weights of the reset, update and new gates, in
      this order.
    input_bias_3R, hidden_bias_3R: Their biases.
  """

  def __init__(self, input_size: int, state_size: int, *, rngs: nnx.Rngs):
    uniform = _initializer(state_size, rngs)
    self.input_X3R = uniform(input_size, 3, state_size)
    self.hidden_R3R = uniform(state_size, 3, state_size)
    self.input_bias_3R = uniform(3, state_size, matmuls=0)
    self.hidden_bias_3R = uniform(3, state_size, matmuls=0)

  def start(self, num_tokens: int) -> jax.Array:
    """Returns h_0 = 0, [T, R] float32."""
    return jnp.zeros((num_tokens, self.hidden_R3R.shape[0]), jnp.float32)

  def __call__(
    self, u_TX: jax.Array, h_TR: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    reset, update, new = _gates(u_TX, self.input_X3R, self.input_bias_3R, 3)
    reset_h, update_h, new_h = _gates(
      h_TR, self.hidden_R3R, self.hidden_bias_3R, 3
    )
    r_TR = jax.nn.sigmoid(reset + reset_h)  # RMoE eq. 2
    z_TR = jax.nn.sigmoid(update + update_h)
    n_TR = jnp.tanh(new + r_TR * new_h)  # RMoE eq. 3
    h_TR = (1 - z_TR) * n_TR + z_TR * h_TR
    return h_TR, h_TR


@CELLS.register('lstm')
class LSTMCell(nnx.Module):
  """Long short-term memory; its state is the output h and the cell c.

  Attributes:
    input_X4R, hidden_R4R: The weights of the input, forget, cell and output
      gates, in this order.
    input_bias_4R, hidden_bias_4R: Their biases.
  """

  def __init__(self, input_size: int, state_size: int, *, rngs: nnx.Rngs):
    uniform = _initializer(state_size, rngs)
    self.input_X4R = uniform(input_size, 4, state_size)
    self.hidden_R4R = uniform(state_size, 4, state_size)
    self.input_bias_4R = uniform(4, state_size, matmuls=0)
    self.hidden_bias_4R = uniform(4, state_size, matmuls=0)

  def start(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns h_0 = c_0 = 0, [T, R] float32 each."""
    zeros = jnp.zeros((num_tokens, self.hidden_R4R.shape[0]), jnp.float32)
    return zeros, zeros

  def __call__(
    self, u_TX: jax.Array, state: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    h_TR, c_TR = state
    from_u = _gates(u_TX, self.input_X4R, self.input_bias_4R, 4)
    from_h = _gates(h_TR, self.hidden_R4R, self.hidden_bias_4R, 4)
    i, f, g, o = (a + b for a, b in zip(from_u, from_h, strict=True))
    c_TR = jax.nn.sigmoid(f) * c_TR + jax.nn.sigmoid(i) * jnp.tanh(g)
    h_TR = jax.nn.sigmoid(o) * jnp.tanh(c_TR)
    return h_TR, (h_TR, c_TR)


def _initializer(state_size: int, rngs: nnx.Rngs):
  """Returns a maker of parameters in PyTorch's range for recurrent cells."""
  bound = state_size**-0.5

  def uniform(*shape: int, **declared: Any) -> nnx.Param:
    return param(
      jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound),
      **declared,
    )

  return uniform


def _gates(
  x_TX: jax.Array, weight: nnx.Param, bias: nnx.Param, count: int
) -> list[jax.Array]:
  """Returns the gates' parts from one side, [T, R] each."""
  # Flat, so that the gates are split in the last axis: fastest backward.
  weight_XO = weight[...].reshape(x_TX.shape[-1], -1)
  product_TO = matmul(x_TX, weight_XO)
  return jnp.split(product_TO + bias[...].reshape(-1), count, axis=-1)
