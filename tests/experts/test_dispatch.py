"""One contract for every dispatch: a dense loop over experts in float64."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.distributed import mesh as mesh_lib
from moe_jax.experts.dispatch import (
  Capacity,
  Dispatch,
  by_position,
  by_probability,
  dropless,
)
from moe_jax.experts.expert_parallel import ExpertParallel
from moe_jax.experts.feed_forward import ExpertBank
from moe_jax.routing.selection import Routing

T, K, D, F, N = 64, 2, 16, 24, 8
NO_DROP = Capacity(float(N), by_position)  # room for every token in one expert


def parallel(inner: Dispatch, **axes: int) -> Dispatch:
  shape = {axis: 1 for axis in mesh_lib.AXES} | axes
  mesh = mesh_lib.make_mesh(shape, jax.devices())
  return ExpertParallel(mesh, inner, mesh_lib.TOKEN_AXES)


DISPATCHES: dict[str, Callable[[], Dispatch]] = {
  'dropless': lambda: dropless,
  'capacity': lambda: NO_DROP,
  'dropless, expert 8': lambda: parallel(dropless, expert=8),
  'dropless, data 2 expert 4': lambda: parallel(dropless, data=2, expert=4),
  'dropless, fsdp 2 expert 2 tensor 2': lambda: parallel(
    dropless, fsdp=2, expert=2, tensor=2
  ),
  'capacity, data 2 expert 2 tensor 2': lambda: parallel(
    NO_DROP, data=2, expert=2, tensor=2
  ),
}


def random_choice(rng: np.random.Generator) -> np.ndarray:
  return np.stack([rng.permutation(N)[:K] for _ in range(T)])


def skewed_choice(rng: np.random.Generator) -> np.ndarray:
  """Expert 5 is in every token's choice."""
  others = rng.integers(6, N, T)
  return np.stack([np.full(T, 5), others], axis=1)


def one_device_choice(rng: np.random.Generator) -> np.ndarray:
  """All tokens go to the same two experts."""
  del rng
  return np.tile([2, 3], (T, 1))


def unused_choice(rng: np.random.Generator) -> np.ndarray:
  """Some slots, and all of some tokens' slots, are unused."""
  choice = random_choice(rng)
  choice[rng.random((T, K)) < 0.3] = N
  choice[:7] = N
  return choice


CHOICES = [random_choice, skewed_choice, one_device_choice, unused_choice]


def dense_loop(
  x: np.ndarray, weights: np.ndarray, choice: np.ndarray, bank: dict
) -> np.ndarray:
  y = np.zeros((T, D))
  for t in range(T):
    for k in range(K):
      if choice[t, k] < N:
        n = choice[t, k]
        gate, up = np.einsum('D,DgF->gF', x[t], bank['gate_up_ND2F'][n])
        hidden = gate / (1 + np.exp(-gate)) * up
        y[t] += weights[t, k] * (hidden @ bank['down_NFD'][n])
  return y


@functools.cache
def jitted(name: str) -> Callable[..., tuple]:
  dispatch = DISPATCHES[name]()

  def run(
    x: jax.Array, weights: jax.Array, choice: jax.Array, params: dict
  ) -> tuple[jax.Array, jax.Array]:
    graphdef = nnx.graphdef(
      nnx.eval_shape(
        lambda: ExpertBank(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
      )
    )
    logits = jnp.zeros((T, N))
    routing = Routing(weights, choice, logits, logits)
    return dispatch(x, routing, nnx.merge(graphdef, params))

  def with_gradients(
    x: jax.Array,
    weights: jax.Array,
    choice: jax.Array,
    params: dict,
    direction: jax.Array,
  ) -> tuple:
    def along(x: jax.Array, weights: jax.Array, params: dict) -> tuple:
      y, dropped = run(x, weights, choice, params)
      return (y * direction).sum(), (y, dropped)

    gradient = jax.grad(along, argnums=(0, 1, 2), has_aux=True)
    return gradient(x, weights, params)

  if isinstance(dispatch, ExpertParallel):
    tokens = NamedSharding(dispatch.mesh, P(mesh_lib.TOKEN_AXES))
    whole = NamedSharding(dispatch.mesh, P())
    return jax.jit(
      with_gradients, in_shardings=(tokens, tokens, tokens, whole, tokens)
    )
  return jax.jit(with_gradients)


@pytest.mark.parametrize('choose', CHOICES)
@pytest.mark.parametrize('name', DISPATCHES)
def test_equals_dense_loop(name: str, choose: Callable) -> None:
  rng = np.random.default_rng(1)
  choice = choose(rng)
  x, direction = rng.standard_normal((2, T, D))
  weights = rng.random((T, K)) * (choice < N)
  bank = {
    'gate_up_ND2F': rng.standard_normal((N, D, 2, F)) / 4,
    'down_NFD': rng.standard_normal((N, F, D)) / 4,
  }
  single = functools.partial(jax.tree.map, jnp.float32)
  (x_grad, weights_grad, bank_grad), (y, dropped) = jitted(name)(
    *single((x, weights)), jnp.int32(choice), *single((bank, direction))
  )
  expected = dense_loop(x, weights, choice, bank)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  assert int(dropped) == 0

  def difference(change: Callable[[float], tuple]) -> float:
    """The central difference of <dense loop, direction>."""
    ahead, behind = (dense_loop(*change(step)) for step in (1e-5, -1e-5))
    return ((ahead - behind) * direction).sum() / 2e-5

  along_x = rng.standard_normal(x.shape)
  along_w = rng.standard_normal(weights.shape) * (choice < N)
  along_bank = {k: rng.standard_normal(v.shape) for k, v in bank.items()}
  expected = [
    difference(lambda h: (x + h * along_x, weights, choice, bank)),
    difference(lambda h: (x, weights + h * along_w, choice, bank)),
    difference(
      lambda h: (
        x,
        weights,
        choice,
        {k: bank[k] + h * along_bank[k] for k in bank},
      )
    ),
  ]
  ours = [
    (np.asarray(x_grad, float) * along_x).sum(),
    (np.asarray(weights_grad, float) * along_w).sum(),
    sum((np.asarray(bank_grad[k], float) * along_bank[k]).sum() for k in bank),
  ]
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_capacity_keeps_the_first_tokens_of_an_expert() -> None:
  # 64 tokens x 2 slots over 8 experts: a balanced share of 16. With factor
  # 0.5, expert 2 and expert 3 keep their first 8 tokens and drop 56 each.
  weights = jnp.ones((T, K))
  choice = jnp.int32(one_device_choice(None))
  logits = jnp.zeros((T, N))
  bank = ExpertBank(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(0), (T, D))
  routing = Routing(weights, choice, logits, logits)
  whole, none_dropped = dropless(x, routing, bank)
  part, dropped = Capacity(0.5, by_position)(x, routing, bank)
  assert (int(none_dropped), int(dropped)) == (0, 112)
  np.testing.assert_allclose(part[:8], whole[:8], rtol=1e-5, atol=1e-4)
  np.testing.assert_array_equal(part[8:], 0)


def test_capacity_counts_drops_on_every_device() -> None:
  dispatch = parallel(Capacity(0.5, by_position), data=2, expert=2, tensor=2)
  choice = jnp.int32(one_device_choice(None))
  logits = jnp.zeros((T, N))
  bank = ExpertBank(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
  routing = Routing(jnp.ones((T, K)), choice, logits, logits)
  # Two groups of 32 tokens: a capacity of 4 for each of the two experts.
  _, dropped = jax.jit(dispatch)(jnp.ones((T, D)), routing, bank)
  assert int(dropped) == 2 * 2 * (32 - 4)


def test_capacity_keeps_the_heaviest_slots_of_an_expert() -> None:
  rng = np.random.default_rng(5)
  weights = rng.random((T, K)).round(1)  # with many equal ones
  choice = random_choice(rng)
  choice[rng.random((T, K)) < 0.2] = N
  logits = jnp.zeros((T, N))
  routing = Routing(jnp.float32(weights), jnp.int32(choice), logits, logits)
  bank = ExpertBank(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(0), (T, D))
  y, dropped = Capacity(0.5, by_probability)(x, routing, bank)

  kept = np.zeros((T, K), bool)
  for expert in range(N):
    slots = [tuple(slot) for slot in np.argwhere(choice == expert)]
    # Python's sort is stable: of equal weights the earlier token comes first.
    for slot in sorted(slots, key=lambda slot: -weights[slot])[:8]:
      kept[slot] = True
  assert int(dropped) == (~kept & (choice < N)).sum() > 0
  alone = routing.only(jnp.array(kept))
  np.testing.assert_allclose(
    y, dropless(x, alone, bank)[0], rtol=1e-5, atol=1e-4
  )
