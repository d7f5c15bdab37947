"""The decoder against the float64 oracle, and its invariants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import oracle, tiny
from tests.helpers.marks import fast_only

VARIANTS = tiny.MODELS | {
  'three factors': {'moe.factors': 3, 'router.recurrent': 'gru'},
  'dense': {'moe.num_experts': 0},
  'every second, grouped queries, coefficient': {
    'model.num_layers': 5,
    'moe.every': 2,
    'model.num_kv_heads': 2,
    'moe.factors': 2,
    'moe.shared.width': 16,
    'moe.shared.mixing': 'coefficient',
  },
  'first dense, tied, fixed mixing, bias': {
    'model.num_layers': 3,
    'moe.first_dense': 1,
    'model.tie_embeddings': True,
    'router.recurrent': 'gru',
    'moe.shared.width': 16,
    'moe.shared.mixing': 'fixed',
    'moe.shared.routed_weight': 0.7,
    'moe.bias': True,
  },
  'offset, summed mixing, raw weights, top 3': {
    'model.num_layers': 4,
    'moe.every': 2,
    'moe.offset': 1,
    'moe.shared.width': 16,
    'moe.renormalize': False,
    'moe.top_k': 3,
    'model.head_dim': 6,
  },
}


def random_ids(batch: int = 2, length: int = 9) -> np.ndarray:
  return np.random.default_rng(0).integers(0, tiny.VOCAB, (batch, length))


def run(
  graphdef: nnx.GraphDef, params: Any, ids: np.ndarray, real: Any = None
) -> tuple[jax.Array, Any]:
  real = jnp.ones(ids.shape, bool) if real is None else jnp.asarray(real)
  model = jax.jit(lambda p, i, r: nnx.merge(graphdef, p)(i, r)[:2])
  return model(params, jnp.asarray(ids, jnp.int32), real)


# The covering set has the other settings against the same oracle.
@pytest.mark.parametrize(
  'name',
  fast_only(['every second, grouped queries, coefficient'], VARIANTS),
)
def test_logits_equal_the_oracle(name: str) -> None:
  config = tiny.config(**VARIANTS[name])
  graphdef, params = tiny.decoder(config)
  ids = random_ids()
  logits, load = run(graphdef, params, ids)
  expected = oracle.logits(config, params, ids)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(
    logits, expected, atol=1e-5 * np.abs(expected).max()
  )
  if name == 'dense':
    assert load is None


def test_load_counts_what_the_oracle_routes() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  graphdef, params = tiny.decoder(config)
  ids = random_ids(batch=1)
  _, load = run(graphdef, params, ids)
  sequence = oracle.Sequence(config, params)
  sequence.run(ids[0])
  for i, (probabilities, chosen) in enumerate(sequence.routed):
    at = i // 2, i % 2  # [layer, sub-layer]
    counts = np.bincount(np.concatenate(chosen), minlength=8)
    np.testing.assert_array_equal(load.counts_N[at], counts)
    np.testing.assert_allclose(
      load.probability_N[at], probabilities.sum(0), rtol=1e-5
    )
    entropy = -(probabilities * np.log(probabilities)).sum()
    np.testing.assert_allclose(load.entropy[at], entropy, rtol=1e-5)
  np.testing.assert_array_equal(load.tokens, 9.0)
  np.testing.assert_array_equal(load.dropped, 0.0)


@pytest.mark.parametrize('name', fast_only(['cartesian rmoe'], tiny.MODELS))
def test_causality(name: str) -> None:
  """No logit at or before position 4 depends on the tokens after it."""
  graphdef, params = tiny.decoder(tiny.config(**tiny.MODELS[name]))
  ids = random_ids(batch=1)
  changed = ids.copy()
  changed[0, 5:] = (changed[0, 5:] + 7) % tiny.VOCAB
  before, _ = run(graphdef, params, ids)
  after, _ = run(graphdef, params, changed)
  np.testing.assert_array_equal(before[0, :5], after[0, :5])
  assert (np.abs(before[0, 5:] - after[0, 5:]).max(-1) > 1e-3).all()


def test_padding_is_neither_routed_nor_counted() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  graphdef, params = tiny.decoder(config)
  ids = random_ids()
  real = np.ones(ids.shape, bool)
  real[1, 4:] = False
  padded, load = run(graphdef, params, ids, real)
  other = ids.copy()
  other[1, 4:] = 3
  again, load_again = run(graphdef, params, other, real)
  alone, load_alone = run(graphdef, params, ids[1:, :4])
  np.testing.assert_array_equal(padded[real], again[real])
  np.testing.assert_allclose(padded[1, :4], alone[0], atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, load, load_again)
  np.testing.assert_array_equal(load.tokens, 9 + 4)
  np.testing.assert_array_equal(load.counts_N.sum(-1), 2 * (9 + 4))
  assert (load_alone.tokens == 4).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [{'model.unroll': 2}, {'model.remat': 'dots'}, {'model.remat': 'full'}],
  ids=str,
)
def test_how_it_is_computed_does_not_change_gradients(change: dict) -> None:
  ids = random_ids()

  def gradient(config: Any) -> tuple[Any, Any]:
    graphdef, params = tiny.decoder(config)

    def loss(params: Any) -> jax.Array:
      logits, load, _ = nnx.merge(graphdef, params)(
        jnp.asarray(ids), jnp.ones(ids.shape, bool)
      )
      return jnp.square(logits).mean() + load.z.sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  plain = tiny.MODELS['cartesian rmoe'] | {'model.num_layers': 4}
  expected = gradient(tiny.config(**plain))
  ours = gradient(tiny.config(**plain, **change))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    ours,
    expected,
  )
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))


def test_one_cell_serves_all_layers() -> None:
  """The cell has no layer axis; the projectors have."""
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  _, params = tiny.abstract(config)
  assert params['cell']['input_X3R'].shape == (16, 3, 16)
  router = params['periods']['blocks'][0]['chain']['sub_layers'][1]['router']
  assert router['features']['project']['projector_DR'].shape == (2, 32, 16)


def test_depth_does_not_grow_the_program() -> None:
  """A scan over periods: 24 layers lower to the text of 4, but for sizes."""

  def lines(num_layers: int) -> int:
    config = tiny.config(
      **{
        'model.num_layers': num_layers,
        'moe.every': 2,
        'moe.factors': 2,
        'router.recurrent': 'gru',
      }
    )
    graphdef, params = tiny.abstract(config)
    ids = jnp.asarray(random_ids())
    lowered = jax.jit(
      lambda p: nnx.merge(graphdef, p)(ids, jnp.ones(ids.shape, bool))
    ).lower(params)
    return len(lowered.as_text().splitlines())

  assert lines(24) <= 1.02 * lines(4)


@pytest.mark.slow
@pytest.mark.parametrize('name', tiny.MODELS)
def test_layer_by_layer_is_what_the_scan_computes(name: str) -> None:
  """With a dense layer before the periods and one in each, and dropout."""
  made = tiny.config(
    **tiny.MODELS[name],
    **{'model.num_layers': 5, 'moe.first_dense': 1, 'moe.every': 2},
    **{'model.dropout': 0.1},
  )
  graphdef, params = tiny.decoder(made)
  model = nnx.merge(graphdef, params)
  ids, key = random_ids(), jax.random.key(3)
  mask = np.ones(ids.shape, bool)
  hidden = model.hidden(ids, mask, step=jnp.int32(1), rng=key)
  [embedding, *layers] = model.layer_by_layer(
    ids,
    mask,
    attention_state=model.start(len(ids)),
    step=jnp.int32(1),
    rng=key,
  )
  assert embedding[1] is None and len(layers) == 5
  carry, _ = layers[-1]
  np.testing.assert_allclose(
    model.norm(carry.x_BLD), hidden.x_BLD, rtol=1e-5, atol=1e-5
  )
  counts = [aux.load.counts_N for _, aux in layers if aux is not None]
  np.testing.assert_array_equal(np.stack(counts), hidden.aux.counts_N)
