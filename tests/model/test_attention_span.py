"""The enwik8 / WikiText-103 backbone against its float64 oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.attention import BlockContext
from moe_jax.model.attention_span import SpanAttend, group_logits, shift_rows
from moe_jax.routing.cells import Memoryless
from tests.helpers import oracle_span, tiny
from tests.helpers.marks import fast_only

SPAN = {
  'model.positions': 'span',
  'model.span': 6,
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.activation': 'relu',
  'model.head_bias': True,
  'data.order': 'contiguous',
}

VARIANTS = {
  'linear': SPAN,
  'recurrent cartesian': SPAN
  | {'router.recurrent': 'gru', 'moe.factors': 2, 'model.num_kv_heads': 2},
  'three factors, rms, shared expert, first dense': SPAN
  | {
    'model.num_layers': 3,
    'model.norm': 'rms',
    'moe.factors': 3,
    'moe.first_dense': 1,
    'moe.shared.width': 12,
    'model.head_bias': False,
  },
  'pre-norm, swiglu, every second': SPAN
  | {
    'model.num_layers': 4,
    'model.norm_place': 'pre',
    'model.activation': 'swiglu',
    'moe.every': 2,
    'router.recurrent': 'gru',
  },
  'dense': SPAN | {'moe.num_experts': 0},
}


def at(key_pe_AW: Any) -> BlockContext:
  """Returns what attention alone is told: keys of positions."""
  cell, ids_BL = Memoryless(1, 1, rngs=nnx.Rngs(0)), jnp.zeros((1, 1), int)
  return BlockContext(cell, ids_BL, ids_BL == 0, key_pe_AW=key_pe_AW)


def random_ids(batch: int = 2, length: int = 9) -> np.ndarray:
  return np.random.default_rng(0).integers(0, tiny.VOCAB, (batch, length))


def run(
  graphdef: nnx.GraphDef,
  params: Any,
  ids: np.ndarray,
  memory: Any = None,
  key: Any = None,
) -> Any:
  model = jax.jit(
    lambda p, i, m, k: nnx.merge(graphdef, p)(
      i, jnp.ones(i.shape, bool), attention_state=m, rng=k
    )
  )
  return model(params, jnp.asarray(ids, jnp.int32), memory, key)


@pytest.mark.slow
@pytest.mark.parametrize('name', fast_only(['recurrent cartesian'], VARIANTS))
def test_two_segments_equal_the_oracle(name: str) -> None:
  """Logits and memories, of a segment longer than the span and a shorter."""
  config = tiny.config(**VARIANTS[name])
  graphdef, params = tiny.decoder(config)
  ids = random_ids(length=13)
  first = run(graphdef, params, ids[:, :9])
  second = run(graphdef, params, ids[:, 9:], first.attention_state)
  for row in range(2):
    sequence = oracle_span.Sequence(config, params)
    memory = None
    for ours, part in ((first, ids[row, :9]), (second, ids[row, 9:])):
      expected = sequence.run(part, memory)
      memory = sequence.memory
      np.testing.assert_allclose(
        ours.logits_BLV[row], expected, atol=1e-5 * np.abs(expected).max()
      )
      for layer, kept in enumerate(memory):
        np.testing.assert_allclose(
          ours.attention_state[layer, row], kept, atol=1e-4
        )


@pytest.mark.slow
def test_gradients_equal_differences_of_the_oracle() -> None:
  """Of every parameter, along a random direction, with a memory."""
  config = tiny.config(**VARIANTS['recurrent cartesian'])
  graphdef, params = tiny.decoder(config)
  ids, rng = random_ids(batch=1, length=4), np.random.default_rng(1)
  along = rng.standard_normal((4, tiny.VOCAB))
  memory = rng.standard_normal((2, 1, 6, 32)).astype(np.float32)

  def ours(params: Any, memory: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    output = model(
      jnp.asarray(ids), jnp.ones(ids.shape, bool), attention_state=memory
    )
    # The next memory has no gradient: it is as if it were not there.
    return (output.logits_BLV[0] * along).sum() + output.attention_state.sum()

  found = jax.jit(jax.grad(ours))(params, memory)
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  values = [np.asarray(leaf, np.float64) for _, leaf in leaves]

  def theirs(at: list[np.ndarray]) -> float:
    sequence = oracle_span.Sequence(config, jax.tree.unflatten(tree, at))
    logits = sequence.run(ids[0], [np.float64(m) for m in memory[:, 0]])
    return (logits * along).sum()

  for i, ((path, _), gradient) in enumerate(
    zip(leaves, jax.tree.leaves(found), strict=True)
  ):
    direction = rng.standard_normal(values[i].shape)
    ahead, behind = (
      theirs([*values[:i], values[i] + h * direction, *values[i + 1 :]])
      for h in (1e-6, -1e-6)
    )
    expected = (ahead - behind) / 2e-6
    ours_along = (np.asarray(gradient, np.float64) * direction).sum()
    scale = np.abs(gradient).max() * np.abs(direction).sum()
    assert abs(ours_along - expected) < 1e-4 * max(scale, 1e-3), (
      jax.tree_util.keystr(path),
      ours_along,
      expected,
    )


@pytest.mark.slow
def test_no_gradient_reaches_the_memory_of_the_next_segment() -> None:
  graphdef, params = tiny.decoder(tiny.config(**SPAN))
  ids = jnp.asarray(random_ids())

  def remembered(params: Any) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model(ids, jnp.ones(ids.shape, bool)).attention_state.sum()

  gradient = jax.jit(jax.grad(remembered))(params)
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['linear', 'recurrent cartesian'])
def test_segments_with_memory_equal_one_long_segment(name: str) -> None:
  """What a token sees lies in the memory or in its segment: all the same."""
  graphdef, params = tiny.decoder(tiny.config(**VARIANTS[name]))
  ids = random_ids(length=12)
  whole = run(graphdef, params, ids)
  memory, parts = None, []
  for begin in (0, 4, 8):
    output = run(graphdef, params, ids[:, begin : begin + 4], memory)
    memory = output.attention_state
    parts.append(output.logits_BLV)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), whole.logits_BLV, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    memory, whole.attention_state, rtol=1e-4, atol=1e-4
  )


@pytest.mark.slow
def test_causality() -> None:
  graphdef, params = tiny.decoder(
    tiny.config(**VARIANTS['recurrent cartesian'])
  )
  ids = random_ids(batch=1)
  changed = ids.copy()
  changed[0, 5:] = (changed[0, 5:] + 7) % tiny.VOCAB
  before = run(graphdef, params, ids).logits_BLV
  after = run(graphdef, params, changed).logits_BLV
  np.testing.assert_array_equal(before[0, :5], after[0, :5])
  assert (np.abs(before[0, 5:] - after[0, 5:]).max(-1) > 1e-3).all()


def test_a_token_sees_its_span_and_not_itself() -> None:
  """One layer: of what attention adds, by the gradient of position 8."""
  attend = SpanAttend(6, 0.0)
  rng = np.random.default_rng(0)
  query, keys = rng.standard_normal((2, 1, 15, 2, 4)).astype(np.float32)
  key_pe = rng.standard_normal((4, 6)).astype(np.float32)

  def eighth(value: jax.Array) -> jax.Array:
    seen, _ = attend(query[:, 6:], keys, value, at(key_pe), ())
    return seen[0, 8].sum()

  seen = np.abs(jax.grad(eighth)(jnp.asarray(keys))[0]).sum((1, 2)) > 0
  # Position 8 of the sequence is number 6 + 8 of the context.
  np.testing.assert_array_equal(np.flatnonzero(seen), range(8, 14))


def test_blocks_change_nothing() -> None:
  """Seven queries in blocks of three, the last one filled up."""
  rng = np.random.default_rng(0)
  query = rng.standard_normal((2, 7, 4, 3)).astype(np.float32)
  keys, values = rng.standard_normal((2, 2, 12, 2, 3)).astype(np.float32)
  key_pe = rng.standard_normal((3, 5)).astype(np.float32)

  def gradient(block: int) -> Any:
    def total(*operands: jax.Array) -> jax.Array:
      *projected, key_pe = operands
      attend = SpanAttend(5, 0.0, block)
      return jnp.sin(attend(*projected, at(key_pe), ())[0]).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(
      query, keys, values, key_pe
    )

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    gradient(3),
    gradient(7),
  )


def test_shift_rows() -> None:
  rows = jnp.arange(1, 7).reshape(1, 1, 2, 3)
  expected = [[1, 2, 3, 0, 0], [0, 4, 5, 6, 0]]
  np.testing.assert_array_equal(shift_rows(rows, 0)[0, 0], expected)


def test_grouped_queries_share_their_keys() -> None:
  rng = np.random.default_rng(0)
  query = rng.standard_normal((1, 2, 4, 3))
  keys = rng.standard_normal((1, 5, 2, 3))
  logits = group_logits(jnp.asarray(query), jnp.asarray(keys))
  for head in range(4):
    expected = query[0, :, head] @ keys[0, :, head // 2].T
    np.testing.assert_allclose(
      logits[0, head // 2, head % 2], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_remat_and_unroll_change_nothing() -> None:
  ids, results = random_ids(), []
  changes = {'model.num_layers': 4, 'model.dropout': 0.3}
  for change in ({}, {'model.remat': 'full', 'model.unroll': 2}):
    graphdef, params = tiny.decoder(tiny.config(**SPAN, **changes, **change))

    def loss(params: Any, graphdef: nnx.GraphDef = graphdef) -> jax.Array:
      model = nnx.merge(graphdef, params)
      real = jnp.ones(ids.shape, bool)
      output = model(jnp.asarray(ids), real, rng=jax.random.key(3))
      return jnp.square(output.logits_BLV).mean()

    results.append(jax.jit(jax.value_and_grad(loss))(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *results,
  )
