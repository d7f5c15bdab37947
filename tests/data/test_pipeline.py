import collections
import concurrent.futures
import itertools
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import corpora, pipeline, token_index, tokenizers
from moe_jax.data import windows as windows_lib

MakeData = Callable[[dict[str, bytes]], ConfigDict]
NamesOf = Callable[[str, int], list[str]]

L = 16
TOKENIZER = tokenizers.ByteTokenizer()


@pytest.fixture
def windows(documents: corpora.Documents) -> pipeline.Windows:
  return pipeline.Windows(documents, TOKENIZER, L)


def _stream(documents: corpora.Documents) -> list[int]:
  """The token stream of a split, built in plain Python."""
  tokens = [256]
  for i in range(len(documents)):
    tokens += [*documents[i].encode('utf-8'), 256]
  return tokens


def _train(
  windows: pipeline.Windows, steps: int, **keys: object
) -> list[pipeline.Batch]:
  """Returns the first batches of a stream."""
  keys = {'batch_size': 8, 'rows': range(8), 'seed': 0, 'start': 0} | keys
  stream = pipeline.train_batches(windows, **({'threads': 2} | keys))
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
  documents: corpora.Documents, seq_len: int
) -> None:
  windows = pipeline.Windows(documents, TOKENIZER, seq_len)
  stream = _stream(documents)
  rows = [windows[i] for i in range(len(windows))]
  for key, expected in ('token_ids', stream[:-1]), ('targets', stream[1:]):
    got = np.concatenate([row[key][row['padding_mask']] for row in rows])
    np.testing.assert_array_equal(got, expected)
  assert windows.num_tokens == len(stream) - 1
  assert windows.num_bytes == sum(token != 256 for token in stream)


def test_shapes_types_and_padding(windows: pipeline.Windows) -> None:
  last = windows[len(windows) - 1]
  assert {key: array.dtype for key, array in last.items()} == {
    'token_ids': np.int32,
    'targets': np.int32,
    'padding_mask': np.bool_,
  }
  assert all(value.shape == (L,) for value in last.values())
  real = windows.num_tokens - L * (len(windows) - 1)
  assert 0 < real < L  # the corpus of this test does not fill its last window
  np.testing.assert_array_equal(last['padding_mask'], np.arange(L) < real)
  assert not last['token_ids'][real:].any()
  assert not last['targets'][real:].any()


def test_number_outside_the_windows(windows: pipeline.Windows) -> None:
  for i in (-1, len(windows)):
    with pytest.raises(IndexError):
      windows[i]


def test_two_processes_read_what_one_reads(windows: pipeline.Windows) -> None:
  one = _train(windows, 12)
  halves = [_train(windows, 12, rows=range(h, h + 4)) for h in (0, 4)]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*halves, strict=True)
  ]
  _assert_same(one, joined)


def test_rows_in_the_order_asked_for(windows: pipeline.Windows) -> None:
  order = [5, 0, 2]
  expected = [
    {key: value[order] for key, value in batch.items()}
    for batch in _train(windows, 3)
  ]
  _assert_same(_train(windows, 3, rows=np.array(order)), expected)


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_resuming_goes_on_where_it_stopped(
  windows: pipeline.Windows, threads: int
) -> None:
  stream = pipeline.train_batches(
    windows, batch_size=8, rows=range(8), seed=0, start=0, threads=threads
  )
  straight = [next(stream) for _ in range(5)]
  assert stream.state() == {'step': 5}
  straight += [next(stream) for _ in range(7)]
  stream.close()
  _assert_same(straight[5:], _train(windows, 7, start=5, threads=threads))


def test_epochs_are_permutations_that_differ(
  windows: pipeline.Windows,
) -> None:
  # Three epochs of batches of one window each.
  count = len(windows)
  batches = _train(windows, 3 * count, batch_size=1, rows=[0])
  rows = [b['token_ids'].tobytes() + b['targets'].tobytes() for b in batches]
  plain = [
    windows[i]['token_ids'].tobytes() + windows[i]['targets'].tobytes()
    for i in range(count)
  ]
  epochs = [rows[i : i + count] for i in range(0, 3 * count, count)]
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(plain)
  assert len({tuple(epoch) for epoch in [plain, *epochs]}) == 4


def test_seed_decides_the_order(windows: pipeline.Windows) -> None:
  first, other = _train(windows, 2), _train(windows, 2, seed=7)
  assert (first[0]['token_ids'] != other[0]['token_ids']).any()
  _assert_same(_train(windows, 2, seed=-1), _train(windows, 2, seed=2**32 - 1))


def test_fewer_windows_than_a_batch(
  make_data: MakeData, names_of: NamesOf
) -> None:
  data = make_data({names_of('train', 1)[0]: b'a few words of text'})
  documents = corpora.open_documents(data, 'train')
  windows = pipeline.Windows(documents, TOKENIZER, L)
  assert len(windows) == 2
  # Four epochs in a batch: each window four times.
  (batch,) = _train(windows, 1)
  seen = collections.Counter(row.tobytes() for row in batch['token_ids'])
  assert sorted(seen.values()) == [4, 4]


@pytest.mark.parametrize('batch_size', [1, 6, 8, 1000])
def test_evaluation_reads_the_split_once(
  windows: pipeline.Windows, batch_size: int
) -> None:
  rows = range(batch_size)
  batches = list(
    pipeline.eval_batches(windows, batch_size=batch_size, rows=rows)
  )
  assert len(batches) == pipeline.num_batches(windows, batch_size)
  got = np.concatenate([b['targets'][b['padding_mask']] for b in batches])
  plain = [windows[i] for i in range(len(windows))]
  expected = np.concatenate([w['targets'][w['padding_mask']] for w in plain])
  np.testing.assert_array_equal(got, expected)
  assert batches[-1]['token_ids'].shape == (batch_size, L)
  filler = pipeline.num_batches(windows, batch_size) * batch_size - len(windows)
  assert not batches[-1]['padding_mask'][batch_size - filler :].any()


def test_evaluation_shared_by_two_processes(
  windows: pipeline.Windows,
) -> None:
  whole = pipeline.eval_batches(windows, batch_size=6, rows=range(6))
  halves = [
    pipeline.eval_batches(windows, batch_size=6, rows=range(h, h + 3))
    for h in (0, 3)
  ]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*halves, strict=True)
  ]
  _assert_same(list(whole), joined)


def test_small_cache_and_many_threads(
  documents: corpora.Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
    windows_lib, '_CACHE_BYTES', 200
  )  # two or three documents
  windows = pipeline.Windows(documents, TOKENIZER, L)
  order = np.random.default_rng(0).permutation(len(windows)).repeat(8)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    rows = list(pool.map(windows.__getitem__, order))
  stream = np.array(_stream(documents))
  for i, row in zip(order, rows, strict=True):
    expected = stream[i * L + 1 : (i + 1) * L + 1]
    np.testing.assert_array_equal(row['targets'][row['padding_mask']], expected)
  kept = windows._pieces
  assert kept._bytes == sum(array.nbytes for array in kept._kept.values())
  assert kept._bytes <= 200


def test_document_larger_than_the_cache_is_kept(
  documents: corpora.Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(windows_lib, '_CACHE_BYTES', 0)
  windows = pipeline.Windows(documents, TOKENIZER, L)
  assert windows._pieces[3] is windows._pieces[3]


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
  """Returns a list that grows with every document read."""
  reads = []
  read = corpora.Documents.__getitem__

  def counted(self: corpora.Documents, i: int) -> str:
    reads.append(i)
    return read(self, i)

  monkeypatch.setattr(corpora.Documents, '__getitem__', counted)
  return reads


def test_lengths_are_measured_once(
  documents: corpora.Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
  reads = _count_reads(monkeypatch)
  first = token_index.lengths(documents, TOKENIZER)
  assert len(reads) == len(documents)
  np.testing.assert_array_equal(
    token_index.lengths(documents, TOKENIZER), first
  )
  assert len(reads) == len(documents)
  (file,) = pathlib.Path(documents.folder).glob('lengths*')
  file.write_bytes(file.read_bytes()[:100])  # as a full disk leaves it
  np.testing.assert_array_equal(
    token_index.lengths(documents, TOKENIZER), first
  )
  assert len(reads) == 2 * len(documents)


def test_parts_of_a_split_have_their_own_lengths(
  make_data: MakeData, names_of: NamesOf
) -> None:
  files = dict(
    zip(names_of('train', 4), [b'a', b'bb', b'cc', b'd'], strict=True)
  )
  data = make_data(files)
  tokens = [
    pipeline.Windows(
      corpora.open_documents(data, split), TOKENIZER, L
    ).num_tokens
    for split in ('train[:2]', 'train[2:]', 'train')
  ]
  assert tokens[0] + tokens[1] == tokens[2] == 10


def test_data_folder_that_may_only_be_read(
  documents: corpora.Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
  expected = token_index._measure(documents, TOKENIZER)

  def refuse(self: epath.Path, target: epath.Path) -> None:
    raise PermissionError(target)

  monkeypatch.setattr(type(documents.folder), 'replace', refuse)
  got = token_index.lengths(documents, TOKENIZER)
  np.testing.assert_array_equal(got, expected)
  assert not list(pathlib.Path(documents.folder).glob('lengths*'))


def test_text_that_is_not_utf8_stops_before_training(
  make_data: MakeData, names_of: NamesOf
) -> None:
  good, bad = names_of('train', 2)
  data = make_data({good: b'fine', bad: b'\xc3('})
  documents = corpora.open_documents(data, 'train')
  with pytest.raises(errors.UserError, match=rf'\({bad}\) is not UTF-8 at by'):
    pipeline.Windows(documents, TOKENIZER, L)


def test_real_text(stdlib: ConfigDict) -> None:
  documents = corpora.open_documents(stdlib, 'validation')
  windows = pipeline.Windows(documents, TOKENIZER, 256)
  batches = pipeline.eval_batches(windows, batch_size=64, rows=range(64))
  got = np.concatenate([b['targets'][b['padding_mask']] for b in batches])
  np.testing.assert_array_equal(got, _stream(documents)[1:])
