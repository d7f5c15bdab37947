import collections
import concurrent.futures
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import pipeline, sources, tokenizers
from moe_jax.data.mixtures import Mixture

MakeData = Callable[[dict[str, bytes]], ConfigDict]
NamesOf = Callable[[str, int], list[str]]

L = 16
TOKENIZER = tokenizers.ByteTokenizer()


@pytest.fixture
def sequences(documents: sources.Documents) -> pipeline.TokenSequences:
  return pipeline.TokenSequences(documents, TOKENIZER, L)


def _stream(documents: sources.Documents) -> list[int]:
  """The token stream of a split, built in plain Python."""
  tokens = [256]
  for i in range(len(documents)):
    tokens += [*documents[i].encode('utf-8'), 256]
  return tokens


def _train(
  sequences: pipeline.TokenSequences, steps: int, **keys: object
) -> list[pipeline.Batch]:
  """Returns the first batches of a stream."""
  keys = {'rows': range(8), 'seed': 0, 'start': 0, 'threads': 2} | keys
  order, size = keys.pop('order', 'shuffled'), keys.pop('batch_size', 8)
  mixture = Mixture.of_one(sequences, order=order, batch_size=size)
  stream = pipeline.train_batches(mixture, **keys)
  batches = list(itertools.islice(stream, steps))
  stream.close()
  return batches


def _assert_same(
  left: list[pipeline.Batch], right: list[pipeline.Batch]
) -> None:
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    for key in ('token_ids', 'targets', 'padding_mask'):
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize('seq_len', [1, 7, 16, 5000])
def test_every_token_is_a_target_once(
  documents: sources.Documents, seq_len: int
) -> None:
  sequences = pipeline.TokenSequences(documents, TOKENIZER, seq_len)
  stream = _stream(documents)
  rows = [sequences[i] for i in range(len(sequences))]
  for key, expected in ('token_ids', stream[:-1]), ('targets', stream[1:]):
    got = np.concatenate([row[key][row['padding_mask']] for row in rows])
    np.testing.assert_array_equal(got, expected)
  assert sequences.num_tokens == len(stream) - 1
  assert sequences.num_bytes == sum(token != 256 for token in stream)


def test_shapes_types_and_padding(sequences: pipeline.TokenSequences) -> None:
  last = sequences[len(sequences) - 1]
  assert {key: array.dtype for key, array in last.items()} == {
    'token_ids': np.int32,
    'targets': np.int32,
    'padding_mask': np.bool_,
  }
  assert all(value.shape == (L,) for value in last.values())
  real = sequences.num_tokens - L * (len(sequences) - 1)
  assert 0 < real < L  # the corpus of this test does not fill its last sequence
  np.testing.assert_array_equal(last['padding_mask'], np.arange(L) < real)
  assert not last['token_ids'][real:].any()
  assert not last['targets'][real:].any()


def test_number_outside_the_windows(sequences: pipeline.TokenSequences) -> None:
  for i in (-1, len(sequences)):
    with pytest.raises(IndexError):
      sequences[i]


def test_two_processes_read_what_one_reads(
  sequences: pipeline.TokenSequences,
) -> None:
  one = _train(sequences, 12)
  halves = [_train(sequences, 12, rows=range(h, h + 4)) for h in (0, 4)]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*halves, strict=True)
  ]
  _assert_same(one, joined)


def test_rows_in_the_order_asked_for(
  sequences: pipeline.TokenSequences,
) -> None:
  order = [5, 0, 2]
  expected = [
    {key: value[order] for key, value in batch.items()}
    for batch in _train(sequences, 3)
  ]
  _assert_same(_train(sequences, 3, rows=np.array(order)), expected)


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_resuming_goes_on_where_it_stopped(
  sequences: pipeline.TokenSequences, threads: int
) -> None:
  mixture = Mixture.of_one(sequences, order='shuffled', batch_size=8)
  stream = pipeline.train_batches(
    mixture, rows=range(8), seed=0, start=0, threads=threads
  )
  straight = [next(stream) for _ in range(5)]
  straight += [next(stream) for _ in range(7)]
  stream.close()
  _assert_same(straight[5:], _train(sequences, 7, start=5, threads=threads))


def test_epochs_are_permutations_that_differ(
  sequences: pipeline.TokenSequences,
) -> None:
  # Three epochs of batches of one sequence each.
  count = len(sequences)
  batches = _train(sequences, 3 * count, batch_size=1, rows=[0])
  rows = [b['token_ids'].tobytes() + b['targets'].tobytes() for b in batches]
  plain = [
    sequences[i]['token_ids'].tobytes() + sequences[i]['targets'].tobytes()
    for i in range(count)
  ]
  epochs = [rows[i : i + count] for i in range(0, 3 * count, count)]
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(plain)
  assert len({tuple(epoch) for epoch in [plain, *epochs]}) == 4


def test_seed_decides_the_order(sequences: pipeline.TokenSequences) -> None:
  first, other = _train(sequences, 2), _train(sequences, 2, seed=7)
  assert (first[0]['token_ids'] != other[0]['token_ids']).any()
  _assert_same(
    _train(sequences, 2, seed=-1), _train(sequences, 2, seed=2**32 - 1)
  )


def test_fewer_windows_than_a_batch(
  make_data: MakeData, names_of: NamesOf
) -> None:
  data = make_data({names_of('train', 1)[0]: b'a few words of text'})
  documents = sources.open_documents(data, 'train')
  sequences = pipeline.TokenSequences(documents, TOKENIZER, L)
  assert len(sequences) == 2
  # Four epochs in a batch: each sequence four times.
  (batch,) = _train(sequences, 1)
  seen = collections.Counter(row.tobytes() for row in batch['token_ids'])
  assert sorted(seen.values()) == [4, 4]


@pytest.mark.parametrize('batch_size', [1, 6, 8, 1000])
def test_evaluation_reads_the_split_once(
  sequences: pipeline.TokenSequences, batch_size: int
) -> None:
  rows = range(batch_size)
  batches = list(
    pipeline.eval_batches(sequences, batch_size=batch_size, rows=rows)
  )
  assert len(batches) == pipeline.num_batches(sequences, batch_size)
  got = np.concatenate([b['targets'][b['padding_mask']] for b in batches])
  plain = [sequences[i] for i in range(len(sequences))]
  expected = np.concatenate([w['targets'][w['padding_mask']] for w in plain])
  np.testing.assert_array_equal(got, expected)
  assert batches[-1]['token_ids'].shape == (batch_size, L)
  filler = pipeline.num_batches(sequences, batch_size) * batch_size - len(
    sequences
  )
  assert not batches[-1]['padding_mask'][batch_size - filler :].any()


def test_evaluation_shared_by_two_processes(
  sequences: pipeline.TokenSequences,
) -> None:
  whole = pipeline.eval_batches(sequences, batch_size=6, rows=range(6))
  halves = [
    pipeline.eval_batches(sequences, batch_size=6, rows=range(h, h + 3))
    for h in (0, 3)
  ]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*halves, strict=True)
  ]
  _assert_same(list(whole), joined)


def test_many_threads(sequences: pipeline.TokenSequences) -> None:
  order = np.random.default_rng(0).permutation(len(sequences)).repeat(8)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(sequences.__getitem__, order))
  stream = np.array(_stream(sequences._documents))
  for i, row in zip(order, rows, strict=True):
    expected = stream[i * L + 1 : (i + 1) * L + 1]
    np.testing.assert_array_equal(row['targets'][row['padding_mask']], expected)


@pytest.mark.parametrize('order', ['shuffled', 'contiguous', 'packed'])
@pytest.mark.parametrize('start', [0, 5, 1037])
def test_hosts_and_threads_change_nothing(
  sequences: pipeline.TokenSequences, start: int, order: str
) -> None:
  """The global batches are the same bytes, wherever a run is gone on with."""
  keys = {'start': start, 'order': order}
  expected = _train(sequences, 4, threads=0, **keys)
  for hosts, threads in itertools.product((1, 2, 4), (0, 1, 3)):
    size = 8 // hosts
    parts = [
      _train(
        sequences,
        4,
        rows=range(host * size, (host + 1) * size),
        threads=threads,
        **keys,
      )
      for host in range(hosts)
    ]
    for whole, *pieces in zip(expected, *parts, strict=True):
      for key, value in whole.items():
        joined = np.concatenate([piece[key] for piece in pieces])
        assert joined.tobytes() == value.tobytes()


@pytest.mark.parametrize('order', ['shuffled', 'contiguous', 'packed'])
def test_seeking_counts_no_epochs(
  sequences: pipeline.TokenSequences, order: str
) -> None:
  """Of which there are millions up to here."""
  began = time.process_time()
  _train(sequences, 1, start=10**7, order=order, threads=0)
  assert time.process_time() - began < 1


def test_parts_of_a_split_have_their_own_tokens(
  make_data: MakeData, names_of: NamesOf
) -> None:
  files = dict(
    zip(names_of('train', 4), [b'a', b'bb', b'cc', b'd'], strict=True)
  )
  data = make_data(files)
  tokens = [
    pipeline.TokenSequences(
      sources.open_documents(data, split), TOKENIZER, L
    ).num_tokens
    for split in ('train[:2]', 'train[2:]', 'train')
  ]
  assert tokens[0] + tokens[1] == tokens[2] == 10


def test_text_that_is_not_utf8_stops_before_training(
  make_data: MakeData, names_of: NamesOf
) -> None:
  good, bad = names_of('train', 2)
  data = make_data({good: b'fine', bad: b'\xc3('})
  documents = sources.open_documents(data, 'train')
  with pytest.raises(errors.UserError, match=rf'\({bad}\) is not UTF-8 at by'):
    pipeline.TokenSequences(documents, TOKENIZER, L)


def test_real_text(stdlib: ConfigDict) -> None:
  documents = sources.open_documents(stdlib, 'validation')
  sequences = pipeline.TokenSequences(documents, TOKENIZER, 256)
  batches = pipeline.eval_batches(sequences, batch_size=64, rows=range(64))
  got = np.concatenate([b['targets'][b['padding_mask']] for b in batches])
  np.testing.assert_array_equal(got, _stream(documents)[1:])


def test_a_fingerprint_tells_texts_and_not_where_they_lie(
  make_data: MakeData, names_of: NamesOf
) -> None:
  names = names_of('train', 3)
  texts = dict(zip(names, [b'one', b'two', b'three'], strict=True))

  def fingerprint(**changed: bytes) -> dict[str, str | int]:
    data = make_data(texts | changed)
    documents = sources.open_documents(data, 'train')
    return pipeline.TokenSequences(documents, TOKENIZER, L).fingerprint()

  first = fingerprint()
  assert first['documents'] == 3 and first['tokenizer'] == 'bytes'
  assert (first['tokens'], first['bytes']) == (11 + 4, 11)
  again = fingerprint()  # the files are newer, and so the name is another
  assert again['name'] != first['name']
  assert again | {'name': first['name']} == first
  for other in (b'owe', b'', b'longer'):
    assert fingerprint(**{names[0]: other})['content'] != first['content']
