"""Tokens, routings and experts in float64, and a loop over them: the oracle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.experts.dispatch import Dispatch, Dispatched
from moe_jax.experts.dropout import dropout_rows
from moe_jax.experts.mlp import SwiGLUExperts
from moe_jax.routing.selection import Routing

T, D, F = 64, 16, 24
DROPOUT = 0.25


def balanced(rng: np.random.Generator, num_experts: int, k: int) -> np.ndarray:
  """Every expert, and every device, gets as much of every device's tokens."""
  first = rng.integers(0, num_experts)
  return (first + np.arange(T * k).reshape(T, k)) % num_experts


def varied(rng: np.random.Generator, num_experts: int, k: int) -> np.ndarray:
  return np.stack([rng.permutation(num_experts)[:k] for _ in range(T)])


def skewed(rng: np.random.Generator, num_experts: int, k: int) -> np.ndarray:
  """The last expert is every token's first choice."""
  others = np.stack(
    [rng.permutation(num_experts - 1)[: k - 1] for _ in range(T)]
  )
  last = np.full((T, 1), num_experts - 1)
  return np.concatenate([last, others], axis=1)


def together(rng: np.random.Generator, num_experts: int, k: int) -> np.ndarray:
  """All tokens go to the same experts, with k = 1 to one."""
  del rng, num_experts
  return np.tile(np.arange(k), (T, 1))


def unused(rng: np.random.Generator, num_experts: int, k: int) -> np.ndarray:
  """Some assignments, and all of some tokens, are unused, as with top-p."""
  choice = varied(rng, num_experts, k)
  choice[rng.random((T, k)) < 0.3] = num_experts
  choice[:7] = num_experts
  return choice


CHOICES = (balanced, varied, skewed, together, unused)


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a dispatch is given, and a direction that its output is summed along.

  Attributes:
    choice: int [T, K]; N in an unused assignment.
    weights: float64 [T, K]; 0 in an unused assignment.
    seeds: uint32 [T, K] of the dropout; None for none.
    mask: float64 [T, K, F], what the hidden units are multiplied by.
  """

  x: np.ndarray
  weights: np.ndarray
  choice: np.ndarray
  seeds: np.ndarray | None
  mask: np.ndarray
  params: dict[str, np.ndarray]
  direction: np.ndarray

  @property
  def num_experts(self) -> int:
    return len(self.params['down_NFD'])


def problem(
  choose: Any, num_experts: int, k: int, seed: int = 1, dropout: bool = False
) -> Problem:
  rng = np.random.default_rng(seed)
  choice = choose(rng, num_experts, k)
  x, direction = rng.standard_normal((2, T, D))
  seeds = rng.integers(0, 2**32, (T, k), np.uint32) if dropout else None
  return Problem(
    x,
    rng.random((T, k)) * (choice < num_experts),
    choice,
    seeds,
    np.ones((T, k, F)) if seeds is None else _mask(seeds),
    {
      'gate_up_ND2F': rng.standard_normal((num_experts, D, 2, F)) / 4,
      'down_NFD': rng.standard_normal((num_experts, F, D)) / 4,
    },
    direction,
  )


def _mask(seeds: np.ndarray) -> np.ndarray:
  """Of each assignment: its seed alone says it (`test_mlp` tests that)."""
  ones = jnp.ones((*seeds.shape, F))
  mask = dropout_rows(
    ones, DROPOUT, jnp.asarray(seeds), num_units=F, first_unit=0
  )
  return np.asarray(mask, float)


def dense_loop(of: Problem) -> dict[str, np.ndarray]:
  """y and the gradients of <y, direction>, one assignment after the other."""
  gate_up, down = of.params['gate_up_ND2F'], of.params['down_NFD']
  found = {
    'y': np.zeros((T, D)),
    'x': np.zeros((T, D)),
    'weights': np.zeros(of.weights.shape),
    'gate_up_ND2F': np.zeros(gate_up.shape),
    'down_NFD': np.zeros(down.shape),
  }
  for t, k in np.argwhere(of.choice < of.num_experts):
    n, w, x, mask = of.choice[t, k], of.weights[t, k], of.x[t], of.mask[t, k]
    gate, up = np.einsum('D,DgF->gF', x, gate_up[n])
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up * mask
    found['y'][t] += w * (hidden @ down[n])

    found['weights'][t, k] = hidden @ down[n] @ of.direction[t]
    found['down_NFD'][n] += w * np.outer(hidden, of.direction[t])
    back = w * (down[n] @ of.direction[t]) * mask
    of_gate = back * up * sigmoid * (1 + gate * (1 - sigmoid))
    both = np.stack([of_gate, back * gate * sigmoid])
    found['gate_up_ND2F'][n] += np.einsum('D,gF->DgF', x, both)
    found['x'][t] += np.einsum('DgF,gF->D', gate_up[n], both)
  return found


def jitted(dispatch: Dispatch, num_experts: int, dropout: bool = False) -> Any:
  """`computed(problem) -> {name: as in dense_loop}, Dispatched`, one program.

  Problems of the same sizes share it.
  """
  graphdef = nnx.graphdef(
    nnx.eval_shape(
      lambda: SwiGLUExperts(
        num_experts,
        D,
        F,
        init_std=1.0,
        rngs=nnx.Rngs(params=0),
        dropout=DROPOUT if dropout else 0.0,
      )
    )
  )

  @jax.jit
  def run(x: Any, weights: Any, choice: Any, seeds: Any, params: Any, to: Any):
    def along(
      x: Any, weights: Any, params: Any
    ) -> tuple[jax.Array, Dispatched]:
      logits = jnp.zeros((T, num_experts))
      routing = Routing(weights, choice, logits, logits, seeds)
      done = dispatch(x, routing, nnx.merge(graphdef, params))
      return (done.y_TD * to).sum(), done

    gradient = jax.grad(along, argnums=(0, 1, 2), has_aux=True)
    return gradient(x, weights, params)

  def computed(of: Problem) -> tuple[dict[str, np.ndarray], Dispatched]:
    x, weights, params, to = jax.tree.map(
      jnp.float32, (of.x, of.weights, of.params, of.direction)
    )
    (x_grad, weights_grad, params_grad), done = run(
      x, weights, jnp.int32(of.choice), of.seeds, params, to
    )
    used = (
      of.choice < num_experts
    )  # an unused assignment's weight is read by nobody
    named = {'y': done.y_TD, 'x': x_grad, 'weights': weights_grad * used}
    return named | params_grad, done

  return computed


def assert_close(
  ours: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5
) -> None:
  """Within `rtol` of the largest number of each array."""
  assert ours.keys() == expected.keys()
  for name, array in expected.items():
    most = rtol * np.abs(array).max()
    np.testing.assert_allclose(ours[name], array, 0, most, err_msg=name)
