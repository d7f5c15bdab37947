"""Packed rows: every target once, little padding, the same wherever read."""

import collections
import dataclasses
import itertools
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data import pipeline, sources, tokenizers
from moe_jax.data.mixtures import Mixture
from moe_jax.data.orders import PackedInOrder
from moe_jax.data.packing import Packing, best_fit

L = 16
EOS = 256
TOKENIZER = tokenizers.ByteTokenizer()


@pytest.fixture
def sequences(documents: sources.Documents) -> pipeline.TokenSequences:
  return pipeline.TokenSequences(documents, TOKENIZER, L)


def _train(
  sequences: pipeline.TokenSequences, steps: int, **keys: object
) -> list[pipeline.Batch]:
  """Returns the first batches of a packed stream."""
  keys = {'rows': range(4), 'seed': 0, 'start': 0, 'threads': 2} | keys
  size = keys.pop('batch_size', 4)
  mixture = Mixture.of_one(sequences, order='packed', batch_size=size)
  stream = pipeline.train_batches(mixture, **keys)
  batches = list(itertools.islice(stream, steps))
  stream.close()
  return batches


def _evaluated(
  sequences: pipeline.TokenSequences, size: int, rows: range | None = None
) -> list[pipeline.Batch]:
  rows = range(size) if rows is None else rows
  return list(
    pipeline.eval_batches(sequences, batch_size=size, rows=rows, order='packed')
  )


def _segments(batches: list[pipeline.Batch]) -> list[tuple[bytes, bytes]]:
  """Returns inputs and targets of all segments, and checks how they lie."""
  found = []
  for batch in batches:
    for b in range(len(batch['token_ids'])):
      row = {key: array[b] for key, array in batch.items()}
      ids = row['segment_ids']
      assert ids.dtype == row['positions'].dtype == np.int32
      np.testing.assert_array_equal(row['padding_mask'], ids > 0)
      count = int((ids > 0).sum())
      # 1, 2, ... in order, then nothing but padding.
      assert set(np.diff(ids[:count])) <= {0, 1}
      assert not count or ids[0] == 1
      for key in ('segment_ids', 'positions', 'token_ids', 'targets'):
        assert not row[key][count:].any()
      for number in range(1, ids.max() + 1):
        here = ids == number
        np.testing.assert_array_equal(
          row['positions'][here], np.arange(here.sum())
        )
        found.append(
          (row['token_ids'][here].tobytes(), row['targets'][here].tobytes())
        )
  return found


def _expected(
  documents: sources.Documents, length: int
) -> list[tuple[bytes, bytes]]:
  """Cuts `eos document eos` into rows, each document on its own."""
  pieces = []
  for d in range(len(documents)):
    whole = np.array([EOS, *documents[d].encode(), EOS], np.int32)
    for begin in range(0, len(whole) - 1, length):
      tokens = whole[begin : begin + length + 1]
      pieces.append((tokens[:-1].tobytes(), tokens[1:].tobytes()))
  return pieces


@pytest.mark.parametrize('seq_len', [1, 7, 16, 5000])
def test_every_target_once_and_those_of_the_stream(
  documents: sources.Documents, seq_len: int
) -> None:
  sequences = pipeline.TokenSequences(documents, TOKENIZER, seq_len)
  expected = collections.Counter(_expected(documents, seq_len))
  rows = len(sequences.packing)
  epoch = _train(sequences, rows, batch_size=1, rows=[0])
  assert collections.Counter(_segments(epoch)) == expected
  evaluated = _evaluated(sequences, 3)
  assert collections.Counter(_segments(evaluated)) == expected
  assert len(evaluated) == -(-rows // 3)
  targets = sum(int(batch['padding_mask'].sum()) for batch in evaluated)
  assert targets == sequences.num_tokens
  assert sequences.packing.waste == pytest.approx(
    1 - targets / (rows * seq_len)
  )


@pytest.mark.parametrize('capacity', [1, 10, 64])
def test_rows_are_those_of_best_fit_one_by_one(capacity: int) -> None:
  """Restated without groups: the longest first, where the least is left."""
  rng = np.random.default_rng(capacity)
  sizes = -np.sort(-rng.integers(1, capacity + 1, 200))
  rows = best_fit(sizes, capacity)
  room: list[int] = []
  for size in sizes:
    fitting = [r for r in room if r >= size]
    if fitting:
      room.remove(min(fitting))
    room.append((min(fitting) if fitting else capacity) - size)
  filled = np.bincount(rows, sizes)
  assert sorted(capacity - filled) == sorted(room)
  assert set(rows) == set(range(len(room)))


def test_an_epoch_is_drawn_anew_and_a_seed_draws_it_otherwise(
  sequences: pipeline.TokenSequences,
) -> None:
  rows = len(sequences.packing)
  both = _train(sequences, 2 * rows, batch_size=1, rows=[0])
  reseeded = _train(sequences, rows, batch_size=1, rows=[0], seed=1)
  first, second, other = (
    [batch['token_ids'].tobytes() for batch in epoch]
    for epoch in (both[:rows], both[rows:], reseeded)
  )
  assert first != second != other != first
  # Equally long pieces change rows, not only rows their places.
  assert set(first) != set(second)


def _assert_same(
  left: list[pipeline.Batch], right: list[pipeline.Batch]
) -> None:
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def _joined(parts: list[list[pipeline.Batch]]) -> list[pipeline.Batch]:
  """Joins the rows that several processes read."""
  return [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('threads', [0, 3])
def test_hosts_threads_and_resuming_change_nothing(
  documents: sources.Documents, hosts: int, threads: int
) -> None:
  """At three places: the beginning, inside an epoch, and beyond its end."""
  straight = _train(pipeline.TokenSequences(documents, TOKENIZER, L), 60)
  for start in (0, 7, 41):
    sequences = pipeline.TokenSequences(documents, TOKENIZER, L)
    assert 7 < len(sequences.packing) / 4 < 41
    own = 4 // hosts
    parts = [
      _train(
        sequences,
        60 - start,
        rows=range(h * own, h * own + own),
        start=start,
        threads=threads,
      )
      for h in range(hosts)
    ]
    _assert_same(_joined(parts), straight[start:])


def test_evaluation_shared_by_two_processes(
  sequences: pipeline.TokenSequences,
) -> None:
  halves = [_evaluated(sequences, 6, range(h, h + 3)) for h in (0, 3)]
  _assert_same(_evaluated(sequences, 6), _joined(halves))


def test_evaluation_begins_with_the_first_document(
  documents: sources.Documents, sequences: pipeline.TokenSequences
) -> None:
  first = PackedInOrder(sequences).at(0)
  whole = [EOS, *documents[0].encode(), EOS]
  assert first['token_ids'][:5].tolist() == whole[:5]


def test_seeking_far_draws_the_epochs_of_that_step_alone(
  sequences: pipeline.TokenSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
  drawn, draw = [], Packing.drawn

  def counted(self: Packing, seed: int, epoch: int) -> np.ndarray:
    drawn.append(epoch)
    return draw(self, seed, epoch)

  monkeypatch.setattr(Packing, 'drawn', counted)
  _train(sequences, 1, start=10**7, threads=0)
  first = 4 * 10**7 // len(sequences.packing)
  assert drawn in ([first], [first, first + 1])


def test_one_text_is_one_document(documents: sources.Documents) -> None:
  """Its pieces are no documents, so its rows are those of the stream."""
  documents = dataclasses.replace(documents, single_document=True)
  sequences = pipeline.TokenSequences(documents, TOKENIZER, L)
  text = b''.join(documents[d].encode() for d in range(len(documents)))
  rows = [PackedInOrder(sequences).at(i) for i in range(len(sequences))]
  targets = np.concatenate(
    [row['targets'][row['padding_mask']] for row in rows]
  )
  assert bytes(targets.tolist()) == text[1:]
  assert {row['segment_ids'].max() for row in rows} == {1}


def test_the_standard_library_wastes_little(stdlib: ConfigDict) -> None:
  stdlib = stdlib.copy_and_resolve_references()
  stdlib.seq_len = 2048
  sequences = pipeline.TokenSequences.open(stdlib, 'validation', TOKENIZER)
  print(f'{sequences.packing.waste:.3%} of {len(sequences.packing)} rows')
  assert sequences.packing.waste < 0.02


@pytest.mark.slow
def test_a_million_documents_are_packed_fast() -> None:
  lengths = np.random.default_rng(0).lognormal(6, 1.3, 10**6)
  began = time.process_time()
  packing = Packing(np.ceil(lengths).astype(np.int64), 2048)
  planned = time.process_time()
  packing.drawn(0, 7)
  print(
    f'{planned - began:.2f} s to plan, {time.process_time() - planned:.2f} s an'
    f' epoch, {packing.waste:.3%} padding'
  )
  assert packing.waste < 0.001
  assert planned - began < 30
