"""Scores of continuations against float64, in batches of few shapes."""

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.evaluation import likelihood
from moe_jax.evaluation.likelihood import (
  Request,
  Scorer,
  batches,
  packed_batches,
)
from tests.helpers import oracle, oracle_span, tiny
from tests.helpers.marks import fast_only

MESHES = {
  'one device': {},
  'eight': {'data': 2, 'expert': 2, 'tensor': 2},
}
SPAN = {
  'model.positions': 'span',
  'model.span': 6,
  'model.norm_place': 'post',
}
MODELS = {
  'cartesian rmoe': {'moe.factors': 2, 'router.recurrent': 'gru'},
  'span': SPAN,
}


def drawn(config: ConfigDict, params: Any, count: int) -> list[Request]:
  """Sequences of all lengths, every third of which ends greedily."""
  rng = np.random.default_rng(0)
  requests = []
  for number in range(count):
    size = int(rng.integers(2, config.data.seq_len + 2))
    ids = rng.integers(tiny.VOCAB, size=size, dtype=np.int32)
    scored = int(rng.integers(1, size))
    if number % 3 == 0:
      ids, scored = np.resize(ids, min(size, 6)), 1
      ids[-1] = logits(config, params, ids[:-1])[-1].argmax()
    requests.append(Request(ids, scored))
  return requests


def logits(config: ConfigDict, params: Any, ids_L: np.ndarray) -> np.ndarray:
  """[L, V] of the oracle, float64."""
  if config.model.positions == 'span':
    return oracle_span.Sequence(config, params).run(ids_L)
  return oracle.Sequence(config, params).run(ids_L)


@pytest.mark.parametrize('mesh', fast_only(['one device'], MESHES))
@pytest.mark.parametrize('model', fast_only(['span'], MODELS))
def test_equals_the_oracle(model: str, mesh: str) -> None:
  config, setup, params = tiny.on_mesh(MESHES[mesh], scale=3, **MODELS[model])
  requests = drawn(config, params, 13)
  told: list[int] = []
  found = Scorer(setup)(params, requests, told.append)
  assert sum(told) == len(found) == len(requests)
  for (ids, count), score in zip(requests, found, strict=True):
    rows = oracle.softmax(logits(config, params, ids[:-1]))[-count:]
    expected = np.log(rows[np.arange(count), ids[-count:]]).sum()
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert score.is_greedy == (rows.argmax(-1) == ids[-count:]).all()
  assert 0 < sum(score.is_greedy for score in found) < len(found)


@pytest.mark.parametrize('seed', range(5))
def test_every_request_has_a_row_in_a_batch_that_is_long_enough(
  seed: int,
) -> None:
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 300, rng.integers(1, 200))
  planned = batches(lengths, rows=4, longest=299, groups=4)
  numbers = np.concatenate([batch.numbers for batch in planned])
  assert sorted(numbers) == [*range(len(lengths))]
  for batch in planned:
    assert lengths[batch.numbers].max() <= batch.length <= 299
    assert len(batch.numbers) <= batch.rows and batch.rows % 4 == 0
    assert batch.rows * batch.length <= 4 * 299
  assert [b.length for b in planned] == sorted(
    (b.length for b in planned), reverse=True
  )


def test_shapes_are_those_that_cost_the_least() -> None:
  """Of all ways to cut the lengths that there are, by trying each."""
  rng = np.random.default_rng(0)
  tokens = 144
  for _ in range(20):
    lengths = 16 * rng.choice([1, 2, 3, 5, 8, 9], rng.integers(1, 90))
    planned = batches(lengths, rows=1, longest=144, groups=1)
    chosen = {batch.length for batch in planned}
    assert cost(lengths, chosen, tokens) == min(
      cost(lengths, set(edges), tokens) for edges in subsets(set(lengths))
    )


def cost(lengths: np.ndarray, edges: set[int], tokens: int) -> int:
  """Tokens with padding, and what compiling these lengths is worth."""
  padded = sum(min(e for e in edges if e >= each) for each in lengths)
  return padded + likelihood._COMPILATION * tokens * len(edges)


def subsets(lengths: set[int]) -> list[list[int]]:
  """All sets of lengths that have the longest."""
  *others, longest = sorted(lengths)
  masks = range(2 ** len(others))
  return [
    [longest, *(n for i, n in enumerate(others) if mask >> i & 1)]
    for mask in masks
  ]


def test_few_requests_are_one_shape() -> None:
  planned = batches(np.array([3, 40, 200]), 16, longest=256, groups=2)
  assert [(b.rows, b.length) for b in planned] == [(4, 208)]


@pytest.mark.parametrize('seed', range(5))
def test_requests_share_rows_and_overlap_nowhere(seed: int) -> None:
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 65, rng.integers(1, 200))
  planned = packed_batches(lengths, rows=8, longest=64, groups=4)
  numbers = np.concatenate([batch.numbers for batch in planned])
  assert sorted(numbers) == [*range(len(lengths))]
  assert len({(b.rows, b.length) for b in planned}) == 1, 'one shape'
  assert planned[0].rows in (4, 8) and planned[0].length == 64
  rows = 0
  for batch in planned:
    taken_BL = np.zeros((batch.rows, batch.length), int)
    for number, row, begin in likelihood._places(batch):
      taken_BL[row, begin : begin + lengths[number]] += 1
    assert taken_BL.max() == 1
    assert taken_BL.sum() == lengths[batch.numbers].sum()
    rows += taken_BL.any(-1).sum()
  assert (rows - 1) * 64 < 1.5 * lengths.sum(), 'rows are full'


def test_nothing_to_score() -> None:
  _, setup, params = tiny.on_mesh({})
  assert Scorer(setup)(params, []) == []
