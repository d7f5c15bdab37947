"""Several sources at once: shares, order, and what is refused."""

import itertools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import errors
from moe_jax.config import loading, mixture, saved
from moe_jax.data import mixtures, pipeline, tokenizers
from moe_jax.data.mixtures import WINDOW, Mixture
from moe_jax.data.orders import ORDERS

L = 32
TOKENIZER = tokenizers.ByteTokenizer()


def _lines(name: str, count: int, form: str) -> str:
  """Returns a corpus of JSON lines, each of them different."""
  rng = np.random.default_rng(len(name))
  rows = []
  for i in range(count):
    text = f'{name} {i} ' + 'x' * int(rng.integers(0, 60))
    row: dict[str, object] = {'text': text}
    if form == 'chat':
      said = [('user', name), ('assistant', text)]
      row = {'messages': [{'role': r, 'content': c} for r, c in said]}
    rows.append(json.dumps(row))
  return '\n'.join(rows)


@pytest.fixture
def data(tmp_path: pathlib.Path) -> Callable[..., ConfigDict]:
  """Returns a function from sources' keys to `config.data` of a mixture."""

  def make(sources: dict[str, dict[str, object]], **keys: object) -> ConfigDict:
    given = {}
    for number, (name, values) in enumerate(sources.items(), start=1):
      path = tmp_path / f'{name}.jsonl'
      form = str(values.get('format', 'text'))
      path.write_text(_lines(name, 120 * number, form))
      given[name] = {'path': str(path), **values}
    config = config_lib.get_config()
    config.data.update(keys)
    config.data.dir = str(tmp_path / 'prepared')
    config.data.seq_len = L
    config.data.mixture = mixture.inlined(json.dumps(given))
    return config.data

  return make


def _batches(
  made: Mixture, steps: int, start: int = 0, threads: int = 0, hosts: int = 1
) -> list[pipeline.Batch]:
  """Returns batches as so many hosts together read them."""
  size, parts = made.batch_size // hosts, []
  for host in range(hosts):
    rows = range(host * size, (host + 1) * size)
    stream = pipeline.train_batches(
      made, rows=rows, seed=3, start=start, threads=threads
    )
    parts.append(list(itertools.islice(stream, steps)))
    stream.close()
  return [
    {key: np.concatenate([each[key] for each in of]) for key in of[0]}
    for of in zip(*parts, strict=True)
  ]


@pytest.mark.parametrize('order', ['shuffled', 'packed'])
def test_a_window_has_the_shares_and_each_source_its_own_order(
  data: Callable[..., ConfigDict], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Row n of a source is row n of that source alone, whatever lies between."""
  window = 1024
  monkeypatch.setattr(mixtures, 'WINDOW', window)
  weights = {'a': {'weight': 1}, 'b': {'weight': 3}, 'c': {'weight': 0.5}}
  made = Mixture.open(data(weights, order=order), TOKENIZER, 8)
  expected = np.array([1, 3, 0.5]) / 4.5 * window
  assert sum(made.shares) == window
  assert np.abs(np.array(made.shares) - expected).max() < 1
  read = made.rows(3)
  alone = [
    ORDERS[order](each, 1, mixtures._seed_of(name, 3))
    for name, each in zip(made.names, made.sequences, strict=True)
  ]
  counts = [0, 0, 0]
  for n in range(2 * window):
    row = read(*divmod(n, 8))
    source = int(row.pop('source'))
    for key, value in alone[source](counts[source], 0).items():
      assert value.tobytes() == row[key].tobytes(), (n, key)
    counts[source] += 1
    if n + 1 == window:
      assert counts == made.shares
  assert counts == [2 * share for share in made.shares]


def test_no_stretch_lacks_a_source(data: Callable[..., ConfigDict]) -> None:
  """A permutation, not an alternation: a device's rows are of all sources."""
  made = Mixture.open(
    data({'a': {'weight': 1}, 'b': {'weight': 1}}), TOKENIZER, 8
  )
  source = np.array([b['source'] for b in _batches(made, 500)])
  # Within five deviations of a fair coin, in every row of the batch.
  assert np.abs(source.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(500)
  assert len({row.tobytes() for row in source}) > 100


def test_rows_of_a_contiguous_order_keep_their_source(
  data: Callable[..., ConfigDict],
) -> None:
  weights = {'a': {'weight': 1}, 'b': {'weight': 2.9}}
  made = Mixture.open(data(weights, order='contiguous'), TOKENIZER, 8)
  assert made.shares == [2, 6]
  batches = _batches(made, 12)
  for batch in batches:
    np.testing.assert_array_equal(batch['source'], batches[0]['source'])
  assert np.bincount(batches[0]['source']).tolist() == made.shares
  # Spread: every half of the batch, so every half of the devices, has both.
  assert {*batches[0]['source'][:4]} == {*batches[0]['source'][4:]} == {0, 1}
  for before, after in itertools.pairwise(batches):
    goes_on = ~after['segment_start']
    np.testing.assert_array_equal(
      after['token_ids'][goes_on, 0], before['targets'][goes_on, -1]
    )


@pytest.mark.parametrize(
  ('keys', 'temperature', 'expected'),
  [
    # Sources of 120 and 240 documents: by what they hold, and by its root.
    ((('a', {}), ('b', {})), 1.0, (1, 2)),
    ((('a', {}), ('b', {})), 2.0, (1, 2**0.5)),
    ((('a', {'epochs': 4}), ('b', {})), 1.0, (4, 2)),
    ((('a', {'weight': 9}), ('b', {'weight': 1})), 1.0, (9, 1)),
    ((('a', {'weight': 9}), ('b', {'weight': 1})), 2.0, (3, 1)),
  ],
)
def test_shares(
  data: Callable[..., ConfigDict],
  keys: tuple[tuple[str, dict[str, object]], ...],
  temperature: float,
  expected: tuple[float, float],
) -> None:
  made = Mixture.open(data(dict(keys), temperature=temperature), TOKENIZER, 4)
  ratio = made.shares[0] / made.shares[1]
  by_size = 'weight' not in keys[0][1]  # documents differ in length
  assert ratio == pytest.approx(
    expected[0] / expected[1], rel=0.1 if by_size else 1e-3
  )
  epochs = made.epochs(1000)
  for name, n in zip(made.names, epochs, strict=True):
    rows = len(made.sequences[made.names.index(name)])
    share = made.shares[made.names.index(name)] / WINDOW
    assert n == pytest.approx(4000 * share / rows)


@pytest.mark.parametrize('form', ['text', 'chat'])
@pytest.mark.parametrize('order', ['shuffled', 'packed'])
@pytest.mark.parametrize('count', [1, 2])
def test_hosts_and_readers_change_nothing(
  data: Callable[..., ConfigDict], order: str, count: int, form: str
) -> None:
  """Hosts x readers x packing x mixture x format, resumed at three places."""
  sources = {'a': {'weight': 1, 'format': form}, 'b': {'weight': 2}}
  made = Mixture.open(
    data(dict(list(sources.items())[:count]), order=order), TOKENIZER, 8
  )
  straight = _batches(made, 40)
  assert ('target_mask' in straight[0]) == (form == 'chat')
  for hosts, threads in itertools.product((1, 2, 4), (1, 3)):
    for start in (0, 7, 33):
      found = _batches(made, 7, start, threads, hosts)
      for expected, batch in zip(straight[start:], found, strict=False):
        assert expected.keys() == batch.keys()
        for key, value in expected.items():
          assert value.tobytes() == batch[key].tobytes(), key


def test_seeking_reads_no_earlier_row(data: Callable[..., ConfigDict]) -> None:
  made = Mixture.open(data({'a': {}, 'b': {}}, order='packed'), TOKENIZER, 8)
  [far] = _batches(made, 1, start=10**7)
  assert far['token_ids'].shape == (8, L)


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('{"a": {"path": "x"', 'data.mixture is not JSON'),
    ('[1]', 'must be JSON, {...}, or the path of a .json'),
    ('{}', 'must map the names of sources to their keys'),
    ('{"a/b": {"path": "x"}}', "a source is named 'a/b'"),
    ('{"a": "python_stdlib"}', "a is 'python_stdlib' and not the keys"),
    ('{"a": {"weight": 1}}', 'a has neither a name, as data.name, nor a path'),
    ('{"a": {"path": "x", "weigth": 1}}', "key = 'weigth'.*mean 'weight'"),
    ('{"a": {"path": "x", "weight": -1}}', 'a: weight = -1 must be above 0'),
    ('{"a": {"path": "x", "weight": NaN}}', 'a: weight = nan must be above 0'),
    ('{"a": {"path": "x", "weight": true}}', 'weight = True must be a number'),
    ('{"a": {"path": 3}}', 'a: path = 3 must be a path'),
    ('{"a": {"path": "x", "format": "xml"}}', "format = 'xml' is not known"),
    ('{"a": {"path": "x"}, "a": {"path": "y"}}', "it has 'a' twice"),
    ('missing.json', "data.mixture = 'missing.json' cannot be read"),
  ],
)
def test_what_is_no_mixture(text: str, match: str) -> None:
  with pytest.raises(errors.UserError, match=match):
    mixture.inlined(text)


@pytest.mark.parametrize(
  ('sources', 'match'),
  [
    ({'a': {'weight': 1}, 'b': {'epochs': 2}}, 'has weights and epochs'),
    ({'a': {'weight': 1}, 'b': {}}, 'b lacks a weight'),
    ({'a': {'weight': 1e9}, 'b': {'weight': 1}}, 'b would have 1.6e-05 of'),
    ({'a': {}, 'b': {'text_key': 'body'}}, "data.mixture: b: .*'body'"),
    ({'a': {}, 'b': {'train_split': 'tarin'}}, "data.mixture: b: .*'tarin'"),
  ],
)
def test_mixtures_that_mean_nothing(
  data: Callable[..., ConfigDict],
  sources: dict[str, dict[str, object]],
  match: str,
) -> None:
  with pytest.raises(errors.UserError, match=match):
    Mixture.open(data(sources), TOKENIZER, 8)


def test_more_sources_than_rows(data: Callable[..., ConfigDict]) -> None:
  three = {name: {'weight': 1} for name in 'abc'}
  with pytest.raises(errors.UserError, match='rows of a batch'):
    Mixture.open(
      data(three | {'d': {'weight': 0.1}}, order='contiguous'), TOKENIZER, 3
    )


@pytest.mark.parametrize(
  ('keys', 'match'),
  [
    ({'tokenizer': 'words'}, 'makes its vocabulary of one data set'),
    ({'mixture': '', 'temperature': 2.0}, 'is of the shares of a mixture'),
    (
      {'mixture': '{"a": {"name": "text_folder"}}'},
      "data.mixture: a: data.path = '' must name a folder",
    ),
  ],
)
def test_refused_configs(keys: dict[str, object], match: str) -> None:
  config = config_lib.get_config()
  config.data.mixture = '{"a": {"name": "python_stdlib"}}'
  config.data.update(keys)
  with pytest.raises(errors.UserError, match=match):
    config_lib.validate(config, 1)


def test_a_file_becomes_part_of_the_config(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'mix.json'
  path.write_text('{"a": {"name": "python_docs"},\n "b": {"path": "~/x"}}')
  config = config_lib.get_config()
  config.data.mixture = str(path)
  loading.expand_paths(config)
  path.unlink()
  assert saved.from_json(saved.to_json(config)) == config
  first, second = mixture.sources(config.data)
  assert (first.name, first.data.name) == ('a', 'python_docs')
  assert (second.name, second.data.name) == ('b', 'files')
  assert second.data.path == str(pathlib.Path.home() / 'x')


def test_what_may_change_on_resume() -> None:
  """Where files lie may; what is read may not, unless that is meant."""

  def changed(text: str, **keys: object) -> list[str]:
    old = config_lib.get_config()
    old.data.mixture = '{"a": {"path": "x", "weight": 1}}'
    new = config_lib.get_config()
    new.data.mixture = text
    new.data.update(keys)
    return saved.changed_meaning(old.to_dict(), new.to_dict())

  assert not changed('{"a": {"path": "y", "weight": 1}}')
  heavier = '{"a": {"path": "x", "weight": 2}}'
  assert changed(heavier) == ['data.mixture']
  assert changed(heavier, temperature=2.0) == [
    'data.mixture',
    'data.temperature',
  ]
  assert not changed(heavier, changed='allow')


def test_a_source_too_small_for_its_rows(
  data: Callable[..., ConfigDict],
) -> None:
  made = data({'a': {'weight': 1}, 'b': {'weight': 1}}, order='contiguous')
  made.seq_len = 900
  with pytest.raises(errors.UserError, match='data.mixture: a: .* 8 rows, of'):
    Mixture.open(made, TOKENIZER, 16).rows(0)
