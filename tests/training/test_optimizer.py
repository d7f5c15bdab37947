"""Optimizers and schedules: formulas, eight devices and one, a user's own."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import parameter
from moe_jax.registry import OPTIMIZERS, SCHEDULES
from moe_jax.training import optimizer
from moe_jax.training.state import Setup
from tests.helpers import registries, tiny
from tests.helpers.marks import fast_only
from tests.helpers.steps import EVERY_AXIS, setup

# Large enough for Adafactor to factor the moments of experts.
SIZES = {
  'model.num_layers': 1,
  'model.hidden_size': 128,
  'moe.num_experts': 4,
  'moe.expert_width': 256,
  'loss.bias_rate': 0.01,
}
LR, DECAY = 0.01, 0.1


def made_with(name: str, **axes: int) -> Setup:
  config = tiny.config(
    **SIZES,
    **{
      'optimizer.name': name,
      'optimizer.schedule': 'constant',
      'optimizer.warmup_steps': 0,
      'optimizer.learning_rate': LR,
      'optimizer.clip_norm': 0.0,
      'optimizer.weight_decay': DECAY,
    },
  )
  return setup(config, **axes)


def random(tree: Any, seed: int) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree
  )


def updates(made: Setup) -> tuple[list[Any], Any]:
  """The updates of two steps, and the optimizer's state after them."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, made.abstract)
  of_params, of_state = shardings['params'], shardings['opt_state']
  params = jax.device_put(random(made.abstract['params'], 0), of_params)
  state = jax.jit(made.tx.init, out_shardings=of_state)(params)
  update = jax.jit(made.tx.update, out_shardings=(of_params, of_state))
  found = []
  for step in range(2):
    grads = jax.device_put(random(params, 1 + step), of_params)
    new, state = update(grads, state, params)
    found.append(jax.tree.map(np.asarray, new))
  return found, state


@functools.cache
def updates_of(name: str) -> tuple[list[Any], Any]:
  """The same of an optimizer of the library on one device."""
  return updates(made_with(name))


@pytest.mark.parametrize('name', fast_only(['adamw'], OPTIMIZERS))
def test_eight_devices_update_like_one(name: str) -> None:
  alone, _ = updates_of(name)
  split, state = updates(made_with(name, **EVERY_AXIS))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    alone,
    split,
  )
  # What is as large as a parameter is split as it is.
  for leaf in jax.tree.leaves(state):
    if leaf.shape == (1, 4, 256, 128):
      assert leaf.sharding.spec == P(None, 'expert', 'tensor', 'fsdp')


def test_factored_moments_are_split_as_what_they_are_sums_of() -> None:
  made = made_with('adafactor', **EVERY_AXIS)
  state = made.abstract['opt_state']
  factored = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state)}
  # down_NFD without D, and without F.
  assert factored[1, 4, 256] == P(None, 'expert', 'tensor')
  assert factored[1, 4, 128] == P(None, 'expert', 'fsdp')


def by_name(tree: Any) -> dict[str, Any]:
  return {
    '/'.join(keys): leaf for keys, leaf in parameter.flatten(tree).items()
  }


def one(name: str, path: str) -> tuple[np.ndarray, ...]:
  """A parameter, its two gradients and its two updates, float64."""
  made = made_with(name)
  found, _ = updates_of(name)

  def leaf(tree: Any) -> np.ndarray:
    [value] = [
      value for key, value in by_name(tree).items() if key.endswith(path)
    ]
    return np.asarray(value, np.float64)

  params = random(made.abstract['params'], 0)
  grads = [random(made.abstract['params'], 1 + i) for i in range(2)]
  return leaf(params), *map(leaf, grads), *map(leaf, found)


def test_adamw_is_its_formula() -> None:
  w, g1, g2, first, second = one('adamw', 'attention/query_DHA')
  m, v = 0.1 * g1, 0.05 * g1**2
  step = m / 0.1 / (np.sqrt(v / 0.05) + 1e-8)
  np.testing.assert_allclose(first, -LR * (step + DECAY * w), rtol=1e-5)
  m, v = 0.9 * m + 0.1 * g2, 0.95 * v + 0.05 * g2**2
  step = m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.95**2)) + 1e-8)
  np.testing.assert_allclose(
    second, -LR * (step + DECAY * w), rtol=1e-4, atol=1e-7
  )


def test_lion_is_its_formula() -> None:
  w, g1, g2, first, second = one('lion', 'attention/query_DHA')
  np.testing.assert_allclose(
    first, -LR * (np.sign(0.1 * g1) + DECAY * w), rtol=1e-5
  )
  momentum = 0.05 * g1
  sign = np.sign(0.9 * momentum + 0.1 * g2)
  np.testing.assert_allclose(second, -LR * (sign + DECAY * w), rtol=1e-5)


def test_adafactor_is_its_formula() -> None:
  """The first step: the second moment is that of the gradient alone."""
  w, g1, _, first, _ = one('adafactor', 'experts/down_NFD')
  squared = g1**2 + 1e-30
  rows, columns = squared.mean(-1), squared.mean(-2)
  second = (
    rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
  )
  step = g1 / np.sqrt(second)
  step /= max(1.0, np.sqrt((step**2).mean()))
  np.testing.assert_allclose(
    first, -LR * (step + DECAY * w), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
  'path, sides',
  [
    pytest.param(
      *('attention/query_DHA', lambda a: a.reshape(1, 128, -1)),
      marks=pytest.mark.slow,
    ),
    ('attention/out_HAD', lambda a: a.reshape(1, -1, 128)),
    pytest.param(
      *('experts/gate_up_ND2F', lambda a: a.reshape(4, 128, -1)),
      marks=pytest.mark.slow,
    ),
    ('experts/down_NFD', lambda a: a.reshape(4, 256, 128)),
  ],
)
def test_muon_moves_every_matrix_as_far_in_all_directions(
  path: str, sides: Any
) -> None:
  w, _, _, first, _ = one('muon', path)
  matrices = sides(first + LR * DECAY * w)
  rows, columns = matrices.shape[1:]
  singular = np.linalg.svd(matrices, compute_uv=False)
  # Five Newton-Schulz steps come to about 0.7 to 1.2, as published.
  size = LR * 0.2 * np.sqrt(max(rows, columns))
  assert singular.max() < 1.3 * size
  assert np.quantile(singular, 0.05) > 0.5 * size


def test_muon_leaves_embedding_and_router_to_adamw() -> None:
  (muon, _), _ = updates_of('muon')
  (adamw, _), _ = updates_of('adamw')
  theirs = by_name(adamw)
  for key, update in by_name(muon).items():
    same = np.allclose(update, theirs[key], rtol=1e-5, atol=1e-8)
    matrix = 'attention' in key or 'experts' in key
    assert same != matrix, key


STEPS, WARMUP, PEAK, FINAL = 100, 20, 2.0, 0.5


def closed_form(name: str, step: int, warmup: int) -> float:
  """The learning rate at a step, in float64."""
  if step < warmup:
    return PEAK * step / warmup
  part = min((step - warmup) / (STEPS - warmup), 1)
  stable = round(0.75 * (STEPS - warmup)) / (STEPS - warmup)
  return {
    'cosine': FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * part)) / 2,
    'linear': PEAK + (FINAL - PEAK) * part,
    'constant': PEAK,
    'wsd': PEAK + (FINAL - PEAK) * max(0, part - stable) / (1 - stable),
    'inverse_sqrt': PEAK
    * np.sqrt(max(warmup, 1) / (max(warmup, 1) + step - warmup)),
  }[name]


@pytest.mark.slow
def test_routers_and_their_cell_have_a_rate_of_their_own() -> None:
  keys = {'router.recurrent': 'gru', 'optimizer.clip_norm': 0.0}
  usual = setup(tiny.config(**keys))
  slower = setup(tiny.config(**keys, **{'optimizer.router_rate': 0.25}))
  params = random(usual.abstract['params'], 0)
  grads = random(params, 1)
  both = []
  for made in (usual, slower):
    new, _ = made.tx.update(grads, made.tx.init(params), params)
    both.append(parameter.flatten(new))
  declarations = parameter.flatten(usual.declarations)
  parts = set()
  for path, declared in declarations.items():
    rate = 0.25 if declared.part in (parameter.ROUTER, parameter.CELL) else 1
    np.testing.assert_allclose(both[1][path], rate * both[0][path], rtol=1e-6)
    parts.add(declared.part)
  assert parts == {parameter.MODEL, parameter.ROUTER, parameter.CELL}


@pytest.mark.parametrize('warmup', [0, WARMUP])
@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_are_their_closed_forms(name: str, warmup: int) -> None:
  config = tiny.config(
    **{
      'train.steps': STEPS,
      'optimizer.schedule': name,
      'optimizer.learning_rate': PEAK,
      'optimizer.final_fraction': FINAL / PEAK,
      'optimizer.warmup_steps': warmup,
      'optimizer.stable_fraction': 0.75,
    }
  )
  schedule = jax.jit(jax.vmap(optimizer.schedule(config)))
  steps = np.arange(STEPS + 20)
  expected = [closed_form(name, int(step), warmup) for step in steps]
  np.testing.assert_allclose(schedule(steps), expected, rtol=2e-6)


def test_a_users_own_optimizer_and_schedule(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, OPTIMIZERS, SCHEDULES)

  @SCHEDULES.register('halves')
  def halves(config: Any) -> optax.Schedule:
    return lambda step: config.optimizer.learning_rate / 2**step

  @OPTIMIZERS.register('plain')
  def plain(config: Any, schedule: optax.Schedule, declarations: Any) -> Any:
    del config, declarations
    return optax.sgd(schedule)

  config = tiny.config(
    **{
      'optimizer.name': 'plain',
      'optimizer.schedule': 'halves',
      'optimizer.learning_rate': 1.0,
      'optimizer.clip_norm': 0.0,
    }
  )
  made = setup(config)
  (first, second), _ = updates(made)
  for step, found in enumerate((first, second)):
    grads = random(made.abstract['params'], 1 + step)
    jax.tree.map(
      lambda new, grad, step=step: np.testing.assert_allclose(
        new, -grad / 2**step, rtol=1e-6
      ),
      found,
      grads,
    )
