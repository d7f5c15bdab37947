"""Files of any format: the same documents however they are written."""

import gzip
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import corpora, folders, formats, sources

DataConfig = Callable[..., ConfigDict]

PACKINGS = {
  '': lambda content: content,
  '.gz': gzip.compress,
  # Two frames, as `cat` and parallel packers make.
  '.zst': lambda content: _zstd(content[:100]) + _zstd(content[100:]),
}
TEXTS = [
  'plain',
  'of two\nlines',
  'caf\xe9 \u2192 \U0001f600 "quoted" \\ \u2028',
  ' ',
  '\ufeffa mark',
  'x' * 5000,
  *(f'document {i}' for i in range(200)),
]


def _zstd(content: bytes) -> bytes:
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as packed:
    packed.write(content)
  return sink.getvalue().to_pybytes()


def _parquet(table: pyarrow.Table, **options: object) -> bytes:
  sink = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(table, sink, **options)
  return sink.getvalue().to_pybytes()


def _lines(texts: list[str], **dumps: object) -> bytes:
  rows = ({'id': i, 'body': text} for i, text in enumerate(texts))
  return ''.join(json.dumps(row, **dumps) + '\n' for row in rows).encode()


def _table(texts: list[str]) -> bytes:
  columns = {'id': range(len(texts)), 'body': texts}
  return _parquet(pyarrow.table(columns), row_group_size=70)


def _listed(texts: list[str], **dumps: object) -> bytes:
  return json.dumps([{'body': text} for text in texts], **dumps).encode()


FORMATS = {
  '.jsonl': _lines,
  '.ndjson': lambda texts: _lines(texts, ensure_ascii=False),
  '.parquet': _table,
  '.json': lambda texts: _listed(texts, indent=1),
}
VARIANTS = {
  'lines in .json': ('.json', _lines),
  'one line': ('.json', _listed),
  'a mark': ('.jsonl', lambda texts: b'\xef\xbb\xbf' + _lines(texts)),
  'blank lines': ('.jsonl', lambda t: _lines(t).replace(b'\n', b'\r\n\r\n')),
  'no last end': ('.jsonl', lambda texts: _lines(texts)[:-1]),
  'dictionary': (
    '.parquet',
    lambda texts: _parquet(
      pyarrow.table({'body': pyarrow.array(texts).dictionary_encode()})
    ),
  ),
  'binary': (
    '.parquet',
    lambda texts: _parquet(
      pyarrow.table({'body': [text.encode() for text in texts]})
    ),
  ),
}


@pytest.fixture
def read(tmp_path: pathlib.Path, data_config: DataConfig) -> Callable:
  """Writes files and returns what is read of them, by split."""

  def read(
    contents: dict[str, bytes], path: str = '', key: str = 'body'
  ) -> dict[str, list[str]]:
    root = tmp_path / 'corpus'
    for name, content in contents.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(content)
    data = data_config(name='files', path=str(root / path), text_key=key)
    splits = sources.open_splits(data)
    return {d.split: [d[i] for i in range(len(d))] for d in splits}

  return read


@pytest.fixture
def refused(read: Callable) -> Callable:
  """Writes files and returns the one line that is said of them."""

  def refused(contents: dict[str, bytes], **options: str) -> str:
    with pytest.raises(errors.UserError) as caught:
      read(contents, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  return refused


def _in_splits(texts: list[str]) -> dict[str, list[str]]:
  """The rule, written anew: a hash of the text, and the order of the file."""
  found: dict[str, list[str]] = {}
  for text in texts:
    digest = hashlib.sha256(text.encode()).hexdigest()
    part = {0: 'validation', 1: 'test'}.get(int(digest[:16], 16) % 20, 'train')
    found.setdefault(part, []).append(text)
  return found


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('ending', FORMATS)
def test_every_format(ending: str, packing: str, read: Callable) -> None:
  content = PACKINGS[packing](FORMATS[ending](TEXTS))
  assert read({f'a{ending}{packing}': content}) == _in_splits(TEXTS)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_way_to_write_it(variant: str, read: Callable) -> None:
  ending, write = VARIANTS[variant]
  assert read({f'a{ending}': write(TEXTS)}) == _in_splits(TEXTS)


@pytest.mark.parametrize('block', [1, 7, 100])
def test_where_a_block_ends_does_not_matter(
  block: int, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(formats, '_BLOCK_BYTES', block)
  texts = TEXTS[:5] + TEXTS[6:20]
  contents = {
    'a.jsonl': _lines(texts, ensure_ascii=False),
    'b.json': _listed(texts, ensure_ascii=False),
    'c.md': b'\xef\xbb\xbf' + '\n'.join(texts).encode(),
  }
  found = read(contents)
  every = sorted(itertools.chain.from_iterable(found.values()))
  assert every == sorted([*texts, *texts, '\n'.join(texts)])


@pytest.mark.parametrize('packing', PACKINGS)
def test_texts(packing: str, read: Callable) -> None:
  contents = {
    f'{i}{ending}{packing}': PACKINGS[packing](text.encode())
    for i, text in enumerate(TEXTS[:4])
    for ending in ('.txt', '.py', '')
  }
  found = read(contents)
  every = sorted(itertools.chain.from_iterable(found.values()))
  assert every == sorted(3 * TEXTS[:4])


@pytest.mark.parametrize('mark', ['\n\n', '\n', ' ', ''])
def test_a_long_text_is_cut(
  mark: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Nothing is lost, and the cuts are where the text has them."""
  monkeypatch.setattr(formats, '_BLOCK_BYTES', 5000)
  rng = random.Random(0)
  parts = ('\xe9' * rng.randrange(100, 4000) for _ in range(400))
  text = mark.join(parts)
  path = tmp_path / 'long.txt'
  path.write_text(text, encoding='utf-8')
  file = formats.File(path, 'long.txt', '')
  found = [(place, piece.decode()) for place, piece in file.documents()]
  pieces = [piece for _, piece in found]
  assert ''.join(pieces) == text
  assert all(2**14 <= len(piece) <= 2**15 for piece in pieces[:-1])
  assert all(piece.endswith(mark) for piece in pieces[:-1])
  before = itertools.accumulate((p.count('\n') for p in pieces), initial=1)
  assert [int(place) for place, _ in found] == list(before)[:-1]


def test_one_text_has_a_validation_split(read: Callable) -> None:
  """As long as the collected works of one poet."""
  rng = random.Random(0)
  words = [f'word{rng.randrange(5000)}' for _ in range(130_000)]
  found = read({'one.txt': ' '.join(words).encode()}, 'one.txt')
  assert set(found) == {'train', 'validation', 'test'}


def test_a_document_stays_in_its_split(read: Callable) -> None:
  before = read({'a.jsonl': _lines(TEXTS)})
  shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
  after = read({'a.jsonl': b'', 'z.parquet': _table(shuffled)})
  assert {s: sorted(t) for s, t in after.items()} == {
    s: sorted(t) for s, t in before.items()
  }


def test_folders_are_splits_where_there_is_a_train(
  read: Callable, capfd: pytest.CaptureFixture
) -> None:
  contents = {
    'train/a.jsonl': _lines(['one']),
    'train/b.txt': b'two',
    'valid/c.jsonl.gz': gzip.compress(_lines(['three'])),
    'test/deep/d.txt': b'four',
    'README.md': b'none',
    'other/e.txt': b'none',
  }
  expected = {
    'train': ['one', 'two'],
    'validation': ['three'],
    'test': ['four'],
  }
  assert read(contents) == expected
  said = capfd.readouterr().err
  assert '2 skipped: a file beside train/ (first README.md)' in said


def test_a_folder_of_tests_is_no_split(read: Callable) -> None:
  found = read({'test/a.jsonl': _lines(TEXTS), 'b.txt': b'two'})
  assert sum(map(len, found.values())) == len(TEXTS) + 1
  assert len(found['train']) > len(found['test'])


def test_what_is_told(read: Callable, capfd: pytest.CaptureFixture) -> None:
  rows = [{'body': 'one'}, {'bdy': 1}, {'body': None}, {'body': ''}, 3]
  rows += [{'body': [1]}, {'body': '\ud800'}, {'body': 'two'}]
  lines = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  contents = {
    'a.jsonl.zst': _zstd(lines),
    'b.png': b'\x89PNG\r\n\x1a\n',
    'c.txt': b'one\ncaf\xe9',
    'd.txt': b'three',
    'e.dat': b'a\0b',
    'g.txt.gz': b'plain',
    'f.json': b'{\n "body": "a package"\n}',
  }
  found = read(contents)
  assert sorted(itertools.chain.from_iterable(found.values())) == [
    'one', 'three', 'two',
  ]  # fmt: skip
  said = capfd.readouterr().err
  assert '3 documents, 11 bytes (files: 1 jsonl.zst, 1 txt), ' in said
  assert re.search(r' \d+\.\d MB/s\n', said)
  for line in (
    "3 skipped: no 'body' (first a.jsonl.zst:2)",
    "1 skipped: 'body' is an empty text (a.jsonl.zst:4)",
    "1 skipped: 'body' is not a text (a.jsonl.zst:6)",
    "1 skipped: 'body' has half a surrogate pair (a.jsonl.zst:7)",
    '2 skipped: a file is not text (first b.png)',
    '1 skipped: a file is not UTF-8 (c.txt:2)',
    '1 skipped: a file is not gzip (g.txt.gz)',
    '1 skipped: a file is not a JSON list of objects, nor JSON with one a line'
    ' (f.json)',
  ):
    assert f'         {line}\n' in said, said
  read({})
  assert capfd.readouterr().err == ''  # it is prepared


def test_the_field_decides_what_is_prepared(read: Callable) -> None:
  contents = {'a.jsonl': b'{"body": "one", "title": "two"}\n'}
  assert list(read(contents).values()) == [['one']]
  assert list(read(contents, key='title').values()) == [['two']]


def test_a_field_of_any_name(read: Callable) -> None:
  for key in ('name', 'a/b', 'a.b', '\xe9 "x"'):
    lines = json.dumps({key: 'one'}).encode()
    table = _parquet(pyarrow.table({key: ['one']}))
    found = read({'a.jsonl': lines, 'b.parquet': table}, key=key)
    assert list(found.values()) == [['one', 'one']]


def test_patterns(read: Callable, tmp_path: pathlib.Path) -> None:
  contents = {
    'a.txt': b'a', 'b.md': b'b', 'x/c.txt': b'c', 'x/y/d.txt': b'd',
    'x/y/e.md': b'e', 'odd[1]/f.txt': b'f', '.hidden/g.txt': b'g',
  }  # fmt: skip
  read(contents)
  root = tmp_path / 'corpus'
  # Both lead in circles, of which glob alone finds no end.
  for link in ('up', 'again'):
    (root / 'x' / link).symlink_to(root, target_is_directory=True)
  (root / 'x' / 'self').symlink_to('self')
  os.mkfifo(root / 'pipe.txt')
  for pattern, expected in {
    '*.txt': 'a',
    'x/*/*.txt': 'd',
    'x/y/*': 'de',
    'x/y': 'de',
    '**/*.md': 'be',
    'x/**': 'cde',
    '*/y/[!d]*': 'e',
    'odd[1]': 'f',
    'odd[1]/f.txt': 'f',
    'odd[[]1]/*': 'f',
    '?.*': 'ab',
  }.items():
    found = read({}, pattern)
    texts = set(itertools.chain.from_iterable(found.values()))
    assert set(expected) <= texts, pattern
    links = 'x/' in pattern or '**' in pattern or '*/' in pattern
    assert links or texts == set(expected), pattern


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    ('*.jsonl', 'matches no file that has something in it'),
    ('odd[1]/*', 'write [[] for a [ in a name'),
    ('missing.jsonl', 'cannot be read: No such file'),
    ('missing/', 'cannot be read: No such file'),
    ('pipe', 'cannot be read: Not a regular file'),
    ('loop', 'cannot be read: Too many levels of symbolic links'),
    ('nothing', 'has no text: name a file, a folder or a pattern'),
    ('empty.txt', 'has no text: name a file, a folder or a pattern'),
    ('pip?', 'matches no file that has something in it'),
  ],
)
def test_paths_that_name_nothing(
  path: str, said: str, refused: Callable, tmp_path: pathlib.Path
) -> None:
  root = tmp_path / 'corpus'
  (root / 'nothing').mkdir(parents=True)
  os.mkfifo(root / 'pipe')
  (root / 'loop').symlink_to('loop')
  assert said in refused({'empty.txt': b'', 'odd[1]/a': b'a'}, path=path)


def _cut(content: bytes) -> bytes:
  return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
  return content[:4] + b'\xff' * 20 + content[24:]


BROKEN = {
  'cut line': ('a.jsonl', _lines(TEXTS)[:-5], 'a.jsonl:206 is not JSON ('),
  'no JSON': ('a.jsonl', b'{"body": "a"}\nplain\n', 'a.jsonl:2 is not JSON ('),
  'deep': ('a.jsonl', b'[' * 10**5, 'a.jsonl:1 is not JSON (maximum recursion'),
  'a long number': ('a.jsonl', b'1' * 5000, 'a.jsonl:1 is not JSON (Exceeds'),
  'one object': ('a.json', b'{\n"a": 1\n}', 'a.json is not a JSON list of ob'),
  'cut list': (
    'a.json',
    # The list begins on line 1, and an item has three.
    _listed(TEXTS, indent=1)[:-5],
    'a.json:617 is not a JSON list of objects (item 206: it is cut)',
  ),
  'list of texts': ('a.json', b'["a"]', 'item 1: it is not an object'),
  'broken item': (
    'a.json',
    b'[{"body": "a"},\n{"body": x}' + b' ' * 50 + b']',
    'a.json:2 is not a JSON list of objects (item 2: Expecting value)',
  ),
  'no comma': ('a.json', b'[{} {}]', "item 2: '{' instead of a comma"),
  'after the list': ('a.json', b'[{"body": "a"}] x', 'something follows the'),
  'deep list': ('a.json', b'[{"a":' * 10**5, 'a.json:1 is not a JSON list'),
  'bad UTF-8': (
    'a.jsonl',
    _lines(['a', 'b']).replace(b'"b"', b'"b\xff"'),
    'a.jsonl:2 is not UTF-8 at byte 20 of the line (0xff)',
  ),
  'cut UTF-8': ('a.jsonl', b'{}\n\xe9', 'a.jsonl:2 is not UTF-8 at byte 0 of'),
  'bad text': (
    'a.txt',
    b'line\n' * 1000 + b'caf\xe9!',
    'a.txt:1001 is not UTF-8 at byte 3 of the line (0xe9)',
  ),
  'zeros': (
    'a.txt',
    bytes(100),
    'a.txt is not text; save it as that or leave it',
  ),
  'a zip': ('a.txt', b'PK\x03\x04', 'a.txt is not text'),
  'no parquet': ('a.parquet', b'x' * 100, 'a.parquet is not parquet that can'),
  'cut parquet': ('a.parquet', _cut(_table(TEXTS)), 'is not parquet that can'),
  'bad parquet': (
    'a.parquet',
    b'PAR1' + b'\xff' * 900 + _table(TEXTS)[904:],
    'a.parquet: row group 0 cannot be read (',
  ),
  'text in parquet': (
    'a.parquet',
    _parquet(pyarrow.table({'body': ['a', 'b'], 'n': [1, 2]})).replace(
      b'\x01\x00\x00\x00b', b'\x01\x00\x00\x00\xff'
    ),
    'a.parquet:row 2 is not UTF-8 at byte 0 (0xff)',
  ),
  'numbers': (
    'a.parquet',
    _parquet(pyarrow.table({'body': [1]})),
    "has no text in its column data.text_key = 'body', but int64",
  ),
  'no column': (
    'a.parquet',
    _parquet(pyarrow.table({'bdy': ['a'], 'n': [1]})),
    "data.text_key = 'body'; did you mean 'bdy'? (columns: bdy, n)",
  ),
  'no field': (
    'a.jsonl',
    b'{"bodi": "a", "n": 1}\n' * 3,
    "3 skipped: no 'body' (first a.jsonl:1); data.text_key = 'body' is to name"
    " the text; did you mean 'bodi'? (there: bodi, n)",
  ),
  'no field in many': (
    'a.jsonl',
    b'{"bodi": "a"}\n' * 2000,
    "1,000 skipped: no 'body' (first a.jsonl:1)",
  ),
  'only blanks': ('a.jsonl', b'\n\n', 'holds no document: its files are empty'),
  'empty texts': ('a.jsonl', b'{"body": ""}', "'body' is an empty text (a."),
} | {
  f'{damage.__name__[1:]} {packing}': (
    f'a.jsonl{packing}',
    damage(PACKINGS[packing](os.urandom(3000).hex().encode())),
    f'a.jsonl{packing} cannot be unpacked to its end (',
  )
  for packing in ('.gz', '.zst')
  for damage in (_cut, _flipped)
}


@pytest.mark.parametrize('kind', BROKEN)
def test_what_is_broken_is_refused(
  kind: str, refused: Callable, tmp_path: pathlib.Path
) -> None:
  name, content, said = BROKEN[kind]
  found = refused({name: content})
  assert said in found
  assert not list(tmp_path.rglob('dataset_info.json'))


def test_bombs(refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(formats, '_SURELY_SMALL', 2**21)
  for pack in (gzip.compress, _zstd):
    packed = pack(b' ' * 2**23)
    for name in ('a.txt', 'a.jsonl', 'a.json', 'a.parquet'):
      ending = '.gz' if pack is gzip.compress else '.zst'
      said = refused({name + ending: packed}, path=name + ending)
      assert f'{len(packed):,} to above 2,097,152 bytes: no text does' in said
  table = pyarrow.table({'body': ['a' * 2**23]})
  content = _parquet(table, use_dictionary=False, compression='zstd')
  said = refused({'b.parquet': content}, path='b.parquet')
  assert 'would unpack row group 0 from ' in said


def test_files_that_change_are_not_taken(
  read: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
  documents = formats.File.documents

  def growing(self: formats.File) -> object:
    yield from documents(self)
    with self._path.open('ab') as file:
      file.write(_lines(['more']))

  with monkeypatch.context() as patch:
    patch.setattr(formats.File, 'documents', growing)
    assert 'has changed while it was read' in refused(
      {'a.jsonl': _lines(['b'])}
    )
  found = read({})
  assert sorted(itertools.chain.from_iterable(found.values())) == ['b', 'more']


class Killed(BaseException):
  """What ends a process."""


def test_half_prepared_is_prepared_anew(
  read: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  split_of = folders.split_of

  def killed(text: bytes) -> str:
    if text == TEXTS[-1].encode():
      raise Killed
    return split_of(text)

  with monkeypatch.context() as patch:
    patch.setattr(folders, 'split_of', killed)
    # A process that is killed removes nothing.
    patch.setattr('etils.epath.gpath._GPath.rmtree', lambda *_, **__: None)
    with pytest.raises(Killed):
      read({'a.jsonl': _lines(TEXTS)})
  assert list(tmp_path.rglob('*incomplete*'))
  assert read({}) == _in_splits(TEXTS)


def test_shards(read: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr('moe_jax.data.records._SHARD_BYTES', 1000)
  assert read({'a.jsonl': _lines(TEXTS)}) == _in_splits(TEXTS)


@pytest.mark.parametrize(
  ('name', 'content', 'kind'),
  [
    ('a.jsonl', b'{}', 'jsonl'),
    ('b/a.NDJSON', b'{}', 'ndjson'),
    ('a.txt.gz', b'x', 'txt.gz'),
    ('a.zst', b'x', 'zst'),
    ('a.parquet', b'x', 'parquet'),
    ('a.zip', b'x', 'zip'),
    ('a.json', b'[\n {"text": 1}]', 'JSON of many objects'),
    ('a.json', b'{"text": 1}\n{"text": 2}\n', 'JSON of many objects'),
    ('a', b'\x1f\x8b\x08', 'not text'),
    ('a.txt', b'a\0b', 'not text'),
  ],
)
def test_text_folder_refuses_what_is_no_text(
  name: str, content: bytes, kind: str, make_data: Callable
) -> None:
  data = make_data({'1.txt': b'text', name: content})
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data, 'all')
  said = str(caught.value)
  assert f'{name} is {kind}, and data.name = ' in said
  assert "data.name = 'files' reads" in said


def test_text_folder_reads_json_that_is_a_text(make_data: Callable) -> None:
  data = make_data({'package.json': b'{\n "name": "x"\n}\n', 'a.json': b'[1]'})
  assert len(sources.open_documents(data, 'all')) == 2


def test_hugging_face_needs_a_package(
  data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  data = data_config(name='huggingface:owner/name')
  for version in ('3.6.0', 'x'):
    monkeypatch.setattr('importlib.metadata.version', lambda _, v=version: v)
    message = "needs the package datasets, version 4 .* pip install 'datasets>="
    with pytest.raises(errors.UserError, match=message):
      sources.open_documents(data, 'train')


class _Rows(list):
  column_names = ('verse', 'id')

  def select_columns(self, names: list[str]) -> 'list[dict]':
    return [{name: row[name] for name in names} for row in self]


def test_hugging_face(
  data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = []

  def load(self: corpora.HuggingFace) -> dict[str, _Rows]:
    asked.append((self._repository, self._subset))
    rows = [{'verse': 'a rose', 'id': 1}, {'verse': None, 'id': 2}]
    return {'train': _Rows(rows), 'test.x': _Rows(rows)}

  monkeypatch.setattr(corpora.HuggingFace, '_load', load)
  for name in ('wikitext', 'owner/name', 'owner/name/a-config'):
    data = data_config(name=f'huggingface:{name}', text_key='verse')
    for split in ('train', 'test_x'):
      documents = sources.open_documents(data, split)
      assert [documents[i] for i in range(len(documents))] == ['a rose']
  data.text_key = 'vers'
  with pytest.raises(errors.UserError, match="did you mean 'verse'.*verse, id"):
    sources.open_documents(data, 'train')
  assert asked[:3] == [
    ('wikitext', None),
    ('owner/name', None),
    ('owner/name', 'a-config'),
  ]
