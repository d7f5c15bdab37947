"""Token by token from a cache, against whole sequences of the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.generation.steps import Steps
from moe_jax.model import build
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parameter import flatten
from tests.helpers import examples, oracle, oracle_span, tiny
from tests.helpers.marks import fast_only

ONE = mesh_lib.make_mesh(
  dict.fromkeys(mesh_lib.MESH_AXES, 1), jax.devices()[:1]
)
LENGTHS = 5, 1, 3  # of prompts, which are read in rows of
READ = 6
MORE = 9  # tokens that follow one by one

SPAN = {
  'model.positions': 'span',
  'model.span': 4,
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.activation': 'relu',
  'model.head_bias': True,
  'data.order': 'contiguous',
}
MODELS: dict[str, dict[str, Any]] = {
  'rmoe': {'router.recurrent': 'gru'},
  'span, recurrent cartesian': SPAN
  | {'router.recurrent': 'gru', 'moe.factors': 2, 'model.num_kv_heads': 2},
  'linear': {},
  'mlp, sigmoid, groups, capacity, grouped queries': {
    'router.score': 'mlp',
    'router.weights': 'sigmoid',
    'router.groups': 4,
    'router.top_groups': 2,
    'moe.dispatch': 'capacity',
    'moe.capacity_factor': 0.3,
    'model.num_kv_heads': 2,
  },
  'cosine, lstm, residual, top-p': {
    'router.score': 'cosine',
    'router.recurrent': 'lstm',
    'router.residual': 0.5,
    'router.selection': 'top_p',
    'moe.renormalize': False,
  },
  'xmoe, rnn, one projector, three factors': {
    'router.score': 'xmoe',
    'router.recurrent': 'rnn',
    'router.projector': 'shared',
    'moe.factors': 3,
  },
  'hyper, np, first and every second dense, tied, coefficients': {
    'model.num_layers': 5,
    'moe.first_dense': 1,
    'moe.every': 2,
    'model.tie_embeddings': True,
    'router.score': 'hyper',
    'router.recurrent': 'gru',
    'router.passing': 'none',
    'moe.shared.width': 16,
    'moe.shared.mixing': 'coefficient',
  },
  'random, cartesian': {
    'router.score': 'random',
    'moe.factors': 2,
  },
  'hash, cartesian, chosen': {
    'router.score': 'hash',
    'moe.factors': 2,
    'router.weights': 'chosen',
    'moe.bias': True,
  },
  'dense': {'moe.num_experts': 0, 'model.vocab_multiple': 64},
  'span, pre-norm, dense': SPAN
  | {'moe.num_experts': 0, 'model.norm_place': 'pre', 'model.norm': 'rms'},
}
# Of gates and selections of a user's own there is no oracle.
OWN = {
  'null experts': {'router.selection': 'null_experts', 'moe.top_k': 4},
  'masks': {'router.score': 'mask', 'router.recurrent': 'gru'},
}
FAST = ['rmoe']


def random_rows(count: int = MORE) -> list[np.ndarray]:
  """Prompts with what follows them."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, tiny.VOCAB, length + count) for length in LENGTHS]


def expected(
  config: ConfigDict, params: Any, rows: list[np.ndarray]
) -> list[np.ndarray]:
  """[L, V] float64 of every row, from whole sequences."""
  span = config.model.positions == 'span'
  kind = oracle_span.Sequence if span else oracle.Sequence
  return [kind(config, params).run(row) for row in rows]


def by_steps(
  steps: Steps, params: Any, rows: list[np.ndarray], num_slots: int
) -> list[np.ndarray]:
  """The logits of every row after its prompt and each token that follows."""
  lengths_B = np.array(LENGTHS, np.int32)
  ids_BL = np.full((len(rows), READ), 7, np.int32)  # padding is of no account
  for ids_L, row, length in zip(ids_BL, rows, LENGTHS, strict=True):
    ids_L[:length] = row[:length]
  first = jax.jit(steps.first_logits, static_argnums=3)
  following = jax.jit(steps.next_logits)
  logits_BV, cache, _ = first(params, ids_BL, lengths_B, num_slots)
  found = [logits_BV]
  for count in range(MORE):
    ids_B = np.array(
      [row[n + count] for row, n in zip(rows, LENGTHS, strict=True)], np.int32
    )
    logits_BV, cache, _ = following(
      params, cache, ids_B, lengths_B, ids_B >= 0, READ, count
    )
    found.append(logits_BV)
  return list(np.stack(found, axis=1))


def check(config: ConfigDict, params: Any, exact: list[np.ndarray]) -> None:
  """Holds the logits from a cache to those of every position of each row."""
  steps = Steps(config, tiny.VOCAB, ONE)
  num_slots = steps.attend.num_slots(READ + MORE + 2)
  found = by_steps(steps, params, random_rows(), num_slots)
  for ours, logits_LV, length in zip(found, exact, LENGTHS, strict=True):
    expected_LV = logits_LV[length - 1 :, : tiny.VOCAB]
    np.testing.assert_allclose(
      ours, expected_LV, atol=1e-5 * np.abs(expected_LV).max()
    )


@pytest.mark.parametrize('name', fast_only(FAST, MODELS))
def test_equal_the_oracle(name: str) -> None:
  config = tiny.config(**MODELS[name])
  config_lib.validate(config, num_devices=1)
  _, params = tiny.decoder(config)
  check(config, params, expected(config, params, random_rows()))


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN)
def test_own_routers_equal_whole_sequences(name: str) -> None:
  with examples.registered_here():
    examples.routers()
    config = tiny.config(**OWN[name])
    graphdef, params = tiny.decoder(config)

    @jax.jit
    def whole(params: Any, ids_BL: jax.Array) -> jax.Array:
      model = nnx.merge(graphdef, params)
      return model(ids_BL, jnp.ones(ids_BL.shape, bool)).logits_BLV

    exact = [whole(params, row[None])[0] for row in random_rows()]
    check(config, params, exact)


# With layers before the pattern repeats, and experts with biases.
IN_PLACE = {
  'cartesian rmoe after a dense layer': {
    'model.num_layers': 5,
    'moe.first_dense': 1,
    'moe.every': 2,
    'moe.factors': 2,
    'router.recurrent': 'gru',
  },
  'relu': SPAN,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', fast_only(['relu'], IN_PLACE))
def test_experts_in_place_compute_what_copies_do(
  name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.config(**IN_PLACE[name])
  _, params = tiny.decoder(config)
  in_place = Steps(config, tiny.VOCAB, ONE)
  monkeypatch.setattr(build, 'reads_in_place', lambda parts, mesh: False)
  copied = Steps(config, tiny.VOCAB, ONE)
  num_slots = in_place.attend.num_slots(READ + MORE + 2)
  lengths_B = np.array(LENGTHS, np.int32)
  ids_BL = np.arange(len(LENGTHS) * READ, dtype=np.int32).reshape(-1, READ)
  first = jax.jit(in_place.first_logits, static_argnums=3)
  _, cache, _ = first(params, ids_BL, lengths_B, num_slots)
  given = params, cache, lengths_B, lengths_B, lengths_B > 0, READ, 0
  assert not scans_experts(in_place, *given) and scans_experts(copied, *given)
  ours, theirs = (
    jax.jit(steps.next_logits)(*given)[0] for steps in (in_place, copied)
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


def scans_experts(steps: Steps, params: Any, *given: Any) -> bool:
  """Whether a step scans experts' weights, which hands out copies of them."""
  traced = jax.make_jaxpr(steps.next_logits)(params, *given)
  [scan] = [e for e in traced.eqns if e.primitive.name == 'scan']
  first = scan.params['num_consts'] + scan.params['num_carry']
  shapes = [each.aval.shape for each in scan.invars[first:]]
  leaves = flatten(params['periods']).items()
  return any(path[-1] == 'down_NFD' and x.shape in shapes for path, x in leaves)


@pytest.mark.parametrize(
  'changes, devices, expected',
  [
    ({}, 1, True),
    ({}, 2, False),
    ({'model.dtype': 'bfloat16'}, 1, False),
    ({'moe.grouped_matmul': 'ragged_dot'}, 1, False),
  ],
)
def test_where_experts_run_in_place(
  changes: dict[str, Any], devices: int, expected: bool
) -> None:
  """Not where parameters are split, cast, or all multiplied."""
  axes = dict.fromkeys(mesh_lib.MESH_AXES, 1) | {'expert': devices}
  mesh = mesh_lib.make_mesh(axes, jax.devices()[:devices])
  parts = build.make_parts(tiny.config(**changes), tiny.VOCAB, mesh)
  assert build.reads_in_place(parts, mesh) == expected
