import hashlib
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import folders, sources

MakeData = Callable[[dict[str, bytes]], ConfigDict]
DataConfig = Callable[..., ConfigDict]
NamesOf = Callable[[str, int], list[str]]


class Poems(tfds.core.GeneratorBasedBuilder):
  """A data set as others make them, its text under a name of its own."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'verse': tfds.features.Text(),
      'words': tfds.features.Scalar(np.int64),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict]]:
    for i, verse in enumerate([b'a rose is', b'caf\xe9']):
      yield i, {'verse': verse, 'words': len(verse.split())}


@pytest.fixture
def every_split(names_of: NamesOf) -> dict[str, bytes]:
  """Returns three files for each split, each saying which it is."""
  return {
    name: f'{split} {i}'.encode()
    for split in folders.SPLITS
    for i, name in enumerate(names_of(split, 3))
  }


@pytest.fixture
def nine(make_data: MakeData, every_split: dict[str, bytes]) -> ConfigDict:
  """Returns the config of a folder of these nine files."""
  return make_data(every_split)


def _texts(data: ConfigDict, split: str) -> list[str]:
  documents = sources.open_documents(data, split)
  return [documents[i] for i in range(len(documents))]


def test_split_is_a_fixed_function_of_the_name() -> None:
  # Written down once: prepared data and results depend on them.
  expected = {
    'ast.py': 'train',
    'runpy.py': 'validation',
    'uu.py': 'test',
  }
  assert {name: folders.split_of(name) for name in expected} == expected
  for name in [f'folder/{i}.py' for i in range(300)]:
    first_8_bytes = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
    part = {0: 'validation', 1: 'test'}.get(first_8_bytes % 20, 'train')
    assert folders.split_of(name) == part


def test_folder_is_split_by_name(nine: ConfigDict) -> None:

  for split in folders.SPLITS:
    expected = {f'{split} {i}' for i in range(3)}
    assert set(_texts(nine, split)) == expected


def test_folder_leaves_out_hidden_and_empty_files(
  make_data: MakeData, names_of: NamesOf
) -> None:
  name, other = names_of('train', 2)
  files = {f'.{name}': b'a', f'.git/{name}': b'b', other: b'', name: b'kept'}
  assert _texts(make_data(files), 'all') == ['kept']


def test_folder_reads_any_depth_and_any_file_name(make_data: MakeData) -> None:
  odd = os.fsdecode(b'b/\xff.dat')
  data = make_data({'a/b/c.txt': b'one', 'no_suffix': b'two', odd: b'three'})
  assert set(_texts(data, 'all')) == {'one', 'two', 'three'}


def test_changed_folder_is_read_anew(
  make_data: MakeData, names_of: NamesOf
) -> None:
  name, other = names_of('train', 2)
  data = make_data({name: b'before'})
  assert _texts(data, 'train') == ['before']
  make_data({name: b'after!'})  # as many bytes: only the time differs
  assert _texts(data, 'train') == ['after!']
  make_data({other: b'new'})
  assert set(_texts(data, 'train')) == {'after!', 'new'}


def test_order_is_the_same_in_another_folder(
  nine: ConfigDict, tmp_path: pathlib.Path
) -> None:

  first = _texts(nine, 'all')
  nine.dir = str(tmp_path / 'elsewhere')
  assert _texts(nine, 'all') == first


def test_order_is_tfds_own(nine: ConfigDict) -> None:
  """By a hash of the name, without its writer: that wants memory for a split.

  Above a gigabyte it would import TensorFlow, too.
  """
  documents = sources.open_documents(nine, 'train')
  names = [record['name'] for record in documents.records]
  hasher = tfds.core.hashing.Hasher('train')
  assert names == sorted(names, key=hasher.hash_key)


@pytest.mark.parametrize(
  ('split', 'count'), [('train[:2]', 2), ('train[:34%]', 1), ('train+test', 6)]
)
def test_parts_of_splits(nine: ConfigDict, split: str, count: int) -> None:
  assert len(_texts(nine, split)) == count


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    ('validatoin', "'validatoin' of .*did you mean 'validation'.*train: 3 doc"),
    ('train[:0%]', r"'train\[:0%\]' of .* is empty \(train: 3 documents"),
    ('train[2:1]', r"'train\[2:1\]' of .* is empty"),
    ('train[5:9]', r"'train\[5:9\]' of .*5:9.* incompatible with 3 examples"),
    ('train[', r"'train\[' of .*Unrecognized split format"),
    ('train+x', r"'train\+x' of "),
    ('', "'' of .* is not known"),
  ],
)
def test_bad_split(nine: ConfigDict, split: str, message: str) -> None:
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_documents(nine, split)
  assert '\n' not in str(caught.value)


def test_split_without_files_is_called_empty(
  make_data: MakeData, names_of: NamesOf
) -> None:
  data = make_data({names_of('train', 1)[0]: b'text'})
  message = (
    r"'test' of text_folder.* is empty \(train: 1 documents\); a document is"
  )
  with pytest.raises(errors.UserError, match=message):
    sources.open_documents(data, 'test')


def test_text_that_is_not_utf8_is_named(
  make_data: MakeData, names_of: NamesOf
) -> None:
  (name,) = names_of('train', 1)
  data = make_data({name: b'caf\xe9 au lait'})
  documents = sources.open_documents(data, 'train')
  message = (
    rf"text_folder/.*, split 'train': document 0 \({name}\) is not UTF-8 at"
    r' byte 3 \(0xe9\); save its text as UTF-8'
  )
  with pytest.raises(errors.UserError, match=message):
    documents[0]


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'name': 'pyton_stdlib'}, "data.name = 'pyton.*mean 'python_stdlib'"),
    ({'name': 'no_such_corpus_at_all'}, 'data.name .*is not known'),
    ({'name': 'wiki40b/xx'}, 'cannot be opened: .*BuilderConfig xx not found'),
    ({'name': 'a b!'}, "data.name = 'a b!' cannot be opened"),
    ({'path': ''}, "data.path = '' is not a folder"),
    ({'path': '/no/such'}, "data.path = '/no/such' is not a folder"),
  ],
)
def test_bad_name_or_path(
  data_config: DataConfig, keys: dict[str, str], message: str
) -> None:
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_documents(data_config(**keys), 'train')
  assert '\n' not in str(caught.value)


def test_folder_without_text(make_data: MakeData) -> None:
  with pytest.raises(errors.UserError, match='holds no text'):
    sources.open_documents(make_data({'empty.txt': b''}), 'train')


def test_unknown_text_key(nine: ConfigDict) -> None:

  nine.text_key = 'txt'
  message = "'txt' is not a text feature of .*mean 'text'.*features: text, name"
  with pytest.raises(errors.UserError, match=message):
    sources.open_documents(nine, 'train')


def test_data_folder_that_cannot_be_made(nine: ConfigDict) -> None:

  nine.dir = str(pathlib.Path(nine.path, '0.txt', 'below'))
  with pytest.raises(errors.UserError, match='cannot be'):
    sources.open_documents(nine, 'train')


def test_losing_the_race_to_prepare(
  nine: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:

  documents = folders.FolderBuilder._documents
  started = []

  def overtaken(self: folders.FolderBuilder) -> Iterator[tuple]:
    """Lets another process begin and end after this one has begun."""
    started.append(self)
    if len(started) == 1:
      assert len(sources.open_documents(nine, 'train')) == 3
    return documents(self)

  monkeypatch.setattr(folders.FolderBuilder, '_documents', overtaken)
  assert len(_texts(nine, 'train')) == 3
  assert len(started) == 2
  left = list(pathlib.Path(nine.dir).rglob('incomplete*'))
  assert not left, left


def test_silence(nine: ConfigDict, capfd: pytest.CaptureFixture) -> None:
  sources.open_documents(nine, 'train')
  printed = capfd.readouterr()
  assert printed.out == printed.err == ''


def test_stdlib_is_the_running_pythons(stdlib: ConfigDict) -> None:
  documents = sources.open_documents(stdlib, 'train')
  assert platform.python_version() in documents.full_name
  names = {record['name'].decode() for record in documents.records}
  assert 'ast.py' in names
  assert all(name.endswith('.py') for name in names)
  assert not any('-packages' in name for name in names)
  i = [record['name'] for record in documents.records].index(b'ast.py')
  source = pathlib.Path(os.__file__).with_name('ast.py')
  assert documents[i] == source.read_bytes().decode()


def test_stdlib_shares(stdlib: ConfigDict) -> None:
  counts = [len(sources.open_documents(stdlib, s)) for s in folders.SPLITS]
  shares = np.array(counts) / sum(counts)
  # 500 files or more: three deviations of a share of 5 % are 3 %.
  np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.04)


def test_stdlib_without_tests_or_utf8(
  tmp_path: pathlib.Path,
  data_config: DataConfig,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  library = tmp_path / 'python3'
  texts = {
    'a.py': b'a', 'b.py': b'b', 'bad.py': b'\xff', 'data.txt': b'no',
    'site-packages/c.py': b'no', 'x/dist-packages/d.py': b'no',
  }  # fmt: skip
  for name, text in texts.items():
    (library / name).parent.mkdir(parents=True, exist_ok=True)
    (library / name).write_bytes(text)
  monkeypatch.setattr(folders.sysconfig, 'get_path', lambda _: str(library))
  data = data_config(name='python_stdlib')
  assert sorted(_texts(data, 'all')) == ['a', 'b']


_DOCUMENTED = b'''"""Of a module."""

x = """no"""


class A:
  """Of a class:

    more.

  End.
  """

  def f(self):
    """Of a \\d method: \xc3\xa9."""
    return "no"

  async def g(self):
    """Of a coroutine."""


def last():
  """Of a function."""
'''


def test_docs_are_the_english_of_the_library(
  tmp_path: pathlib.Path,
  data_config: DataConfig,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  texts = {
    'a.py': _DOCUMENTED,
    'none.py': b'x = 1',
    'bad.py': b'x = (',
    'pydoc_data/topics.py': b"""topics = {'if': 'The "if"', 'in': 'in it'}""",
  }
  library = tmp_path / 'python3'
  for name, text in texts.items():
    (library / name).parent.mkdir(parents=True, exist_ok=True)
    (library / name).write_bytes(text)
  monkeypatch.setattr(folders.sysconfig, 'get_path', lambda _: str(library))
  of_a = (
    'Of a module.\n\nOf a class:\n\n  more.\n\nEnd.\n\nOf a \\d method: \xe9.'
    '\n\nOf a coroutine.\n\nOf a function.'
  )
  topics = 'The "if"\n\nin it'
  data = data_config(name='python_docs')
  assert sorted(_texts(data, 'all')) == sorted([of_a, topics])


def test_tensorflow_is_not_imported(stdlib: ConfigDict) -> None:
  sources.open_documents(stdlib, 'train')
  code = (
    'import sys\n'
    'from ml_collections import ConfigDict\n'
    'from moe_jax.data import sources, pipeline, tokenizers\n'
    "assert not any(m.startswith('moe_jax.') and m.split('.')[1] not in"
    " ('config', 'data', 'disk', 'errors', 'files', 'registry',"
    " 'strict_json')"
    ' for m in sys.modules)\n'
    f'data = ConfigDict({stdlib.to_dict()!r})\n'
    "documents = sources.open_documents(data, 'validation')\n"
    'tokenizer = tokenizers.ByteTokenizer()\n'
    'sequences = pipeline.TokenSequences(documents, tokenizer, 64)\n'
    'next(pipeline.eval_batches(sequences, batch_size=2, rows=[0, 1]))\n'
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_any_registered_data_set(data_config: DataConfig) -> None:
  data = data_config(name='poems', text_key='verse')
  documents = sources.open_documents(data, 'train')
  good = 0 if documents.records[0]['words'] == 3 else 1
  assert documents[good] == 'a rose is'
  message = rf"poems/1.0.0, split 'train': document {1 - good} is not UTF-8"
  with pytest.raises(errors.UserError, match=message):
    documents[1 - good]
  with pytest.raises(errors.UserError, match='.words. is not a text feature'):
    sources.open_documents(data_config(name='poems', text_key='words'), 'train')
  with pytest.raises(errors.UserError, match='.validation. .* is not known'):
    sources.open_documents(data, 'validation')


def test_data_set_prepared_in_another_format(data_config: DataConfig) -> None:
  data = data_config(name='poems', text_key='verse')
  documents = sources.open_documents(data, 'train')
  info = pathlib.Path(documents.folder, 'dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(errors.UserError, match='cannot be opened: .*TFRECORD'):
    sources.open_documents(data, 'train')
