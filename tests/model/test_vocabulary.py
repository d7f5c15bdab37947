"""Padding of the vocabulary: never predicted, never moved, never counted."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.planning import plan
from moe_jax.training import state as state_lib
from moe_jax.training import step as step_lib
from tests.helpers import tiny, vocabularies
from tests.helpers.marks import fast_only

V, ROWS = tiny.VOCAB, 64
MODELS = {
  'head': {},
  'tied, with a bias': {
    'model.tie_embeddings': True,
    'model.head_bias': True,
  },
}


def setup(config: ConfigDict, multiple: int, tensor: int = 1) -> Any:
  made = config.copy_and_resolve_references()
  made.model.vocab_multiple = multiple
  made.mesh.data, made.mesh.tensor = 1, tensor
  mesh = state_lib.mesh_lib.make_mesh(
    dict.fromkeys(config_lib.MESH_AXES, 1) | {'tensor': tensor},
    jax.devices()[:tensor],
  )
  return state_lib.setup(made, V, mesh)


def gradient(setup: Any, batch: dict[str, jax.Array]) -> tuple[float, Any]:
  """The loss of the first state, and its gradient."""
  state = setup.init()
  run = jax.jit(lambda state, batch: step_lib.gradient(setup, state, batch))
  grads, metrics, _ = run(state, batch)
  return float(metrics['loss']), jax.tree.map(np.asarray, grads)


def batch() -> dict[str, jax.Array]:
  ids = np.random.default_rng(0).integers(V, size=(8, 17)).astype(np.int32)
  return {
    'token_ids': jnp.asarray(ids[:, :-1]),
    'targets': jnp.asarray(ids[:, 1:]),
    'padding_mask': jnp.ones((8, 16), bool),
  }


@pytest.mark.parametrize('tensor', [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize('name', fast_only(['head'], MODELS))
def test_padding_changes_nothing_and_has_no_gradient(
  name: str, tensor: int
) -> None:
  config = tiny.config(
    **{'model.num_layers': 1, 'moe.num_experts': 0} | MODELS[name]
  )
  loss, grads = gradient(setup(config, 1), batch())
  padded = setup(config, 32, tensor)
  shape = padded.abstract['params']['embed_VD'].shape
  assert shape == (ROWS, config.model.hidden_size)
  loss_padded, grads_padded = gradient(padded, batch())
  assert loss_padded == pytest.approx(loss, rel=1e-6)

  def compare(theirs: np.ndarray, ours: np.ndarray) -> None:
    if ours.shape != theirs.shape:
      [axis] = [i for i, n in enumerate(ours.shape) if n == ROWS]
      rest = ours.take(range(V, ROWS), axis)
      np.testing.assert_array_equal(rest, 0)
      ours = ours.take(range(V), axis)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)

  jax.tree.map(compare, grads, grads_padded)


@pytest.mark.slow
def test_logits_are_of_ids_alone() -> None:
  config = tiny.config(
    **{
      'model.num_layers': 1,
      'moe.num_experts': 0,
      'model.vocab_multiple': 32,
      'model.head_bias': True,
    }
  )
  graphdef, params = tiny.decoder(config)
  # However much a row of padding would like to be predicted.
  params['head_DV'] = params['head_DV'].at[:, V:].set(100.0)
  model = tiny.nnx.merge(graphdef, params)
  ids = batch()['token_ids']
  logits = model(ids, jnp.ones(ids.shape, bool)).logits_BLV
  assert logits.shape == (*ids.shape, V)
  head = model.head()
  assert head.weight_DV.shape[1] == ROWS
  np.testing.assert_array_equal(head.bias_V[V:], -np.inf)


def test_without_a_multiple_nothing_is_padded() -> None:
  made = setup(tiny.config(), 1)
  assert made.abstract['params']['head_DV'].shape[1] == V
  assert config_lib.vocab_rows(made.config, V) == V


@pytest.mark.slow
def test_a_padded_vocabulary_is_split_and_planned(tmp_path: Path) -> None:
  config = tiny.config(
    **{
      'model.vocab_size': V,
      'mesh.tensor': 2,
      'data.tokenizer': vocabularies.of_size(tmp_path / 'words.json', V),
    }
  )
  whole = plan.make(config, 2)
  config.model.vocab_multiple = 32
  split = plan.make(config, 2)
  assert split['vocabulary'] == {'ids': V, 'rows': ROWS}
  assert f'vocabulary  {V} ids in {ROWS} rows' in plan.table(split)
  assert 'vocabulary' not in plan.table(whole)
  # Embedding and head: 61 whole rows on each device, or half of 64; float32.
  parts = [p['memory_parts_per_device'] for p in (whole, split)]
  fewer = parts[0]['parameters'] - parts[1]['parameters']
  assert fewer == 2 * 4 * 32 * (V - ROWS // 2)
  assert parts[1]['logits'] * 2 * V == parts[0]['logits'] * ROWS
