"""RMoE's layerwise recurrence: routers that remember the layers below.

Source: RMoE (arXiv 2408.06793), equations 2 to 5, and the ablations of its
tables 4 to 6. The recurrence runs over layers, for every token on its own, so
all tokens are computed in parallel. One cell serves all layers: the decoder
makes it (see `cells.py`) and passes it at call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.parameter import param
from moe_jax.routing.cells import Cell, CellState
from moe_jax.routing.matmul import matmul


class HiddenFeatures(nnx.Module):
  """A conventional router's features: the hidden state itself (RMoE eq. 1)."""

  def __call__(
    self, x_TD: jax.Array, state: CellState, cell: Cell
  ) -> tuple[jax.Array, CellState]:
    """Returns x_TD and the state as it was."""
    del cell
    return x_TD, state


class RecurrentFeatures(nnx.Module):
  """RMoE's features: the shared cell's state after this layer (eq. 5).

  Attributes:
    project: Makes of x_TD what the cell reads: a `Projector`, or `identity`.
    passing: A key of `PASSING`, which says what is read of the state below.
  """

  def __init__(self, project: Callable[[jax.Array], jax.Array], passing: str):
    self.project = project
    self.passing = passing

  def __call__(
    self, x_TD: jax.Array, state: CellState, cell: Cell
  ) -> tuple[jax.Array, CellState]:
    """Returns h_TR and the state for the next MoE layer."""
    previous = PASSING[self.passing](state)
    return cell(self.project(x_TD), previous)  # RMoE eq. 5


class Projector(nnx.Module):
  """Proj_i of RMoE eq. 4: a layer's own linear map, without a bias (L-proj).

  Attributes:
    projector_DR: The weights, float32.
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
    self.projector_DR = param(
      init(rngs.params(), (hidden_size, state_size), jnp.float32), decay=True
    )

  def __call__(self, x_TD: jax.Array) -> jax.Array:
    return matmul(x_TD, self.projector_DR[...])


def identity(x_TD: jax.Array) -> jax.Array:
  """Returns x_TD: the cell of all layers reads the hidden state (S-proj)."""
  return x_TD


def _nothing(state: CellState) -> CellState:
  """Returns h_0 for every layer, as if nothing recurred (RMoE + NP)."""
  return jax.tree.map(jnp.zeros_like, state)


# What of the state below enters a layer's cell.
PASSING = {
  'state': lambda state: state,
  'detached': jax.lax.stop_gradient,
  'none': _nothing,
}
