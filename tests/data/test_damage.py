"""Data that is damaged or dangerous is one line, and what it advises works."""

import errno
import json
import os
import pathlib
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import (
  checks,
  folders,
  mixtures,
  pipeline,
  sources,
  texts,
  tokenizers,
)

MakeData = Callable[[dict[str, bytes]], ConfigDict]
DataConfig = Callable[..., ConfigDict]
NamesOf = Callable[[str, int], list[str]]
Damage = Callable[[pathlib.Path], None]


@pytest.fixture
def prepared(make_data: MakeData) -> ConfigDict:
  """A folder that is prepared, encoded, and whose words are numbered."""
  data = make_data({f'{i}.txt': b'words of %d\n' % i for i in range(60)})
  data.tokenizer, data.seq_len = 'words', 8
  _read(data)
  return data


def _read(data: ConfigDict) -> list[int]:
  """The tokens of the training split."""
  tokenizer = tokenizers.build(data)
  sequences = pipeline.TokenSequences.open(data, 'train', tokenizer)
  return sequences._tokens(0, sequences.num_stream_tokens).tolist()


def _folder(data: ConfigDict) -> pathlib.Path:
  """Where the data is prepared."""
  [info] = pathlib.Path(data.dir).rglob('dataset_info.json')
  return info.parent


def _refused(data: ConfigDict) -> str:
  """The one line that is said."""
  with pytest.raises(errors.UserError) as caught:
    _read(data)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def _cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: pathlib.Path) -> None:
  path.write_bytes(b'')


def _garble(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  content[-40] ^= 0xFF
  path.write_bytes(content)


def _list(path: pathlib.Path) -> None:
  path.write_text('[]')


def _deep(path: pathlib.Path) -> None:
  path.write_text('[' * 100_000)


@pytest.mark.parametrize('damage', [_cut, _empty, _garble, os.remove])
@pytest.mark.parametrize('encoded', [True, False])
def test_damaged_records(
  damage: Damage, encoded: bool, prepared: ConfigDict
) -> None:
  before = _read(prepared)
  folder = _folder(prepared)
  if not encoded:
    for path in folder.glob('ids-*'):
      shutil.rmtree(path)
  [records] = folder.glob('*train.array_record*')
  damage(records)
  if not encoded:  # the ids are another file, and whole
    said = _refused(prepared)
    assert f'prepared in {folder} is damaged: remove that folder' in said
    shutil.rmtree(folder)
  assert _read(prepared) == before


def test_what_may_be_sound_is_not_called_damaged(
  tmp_path: pathlib.Path,
) -> None:
  with (
    pytest.raises(OSError, match='Stale'),
    checks.undamaged(epath.Path(tmp_path)),
  ):
    raise OSError(errno.ESTALE, 'Stale file handle')


@pytest.mark.parametrize(
  'damage', [_cut, _empty, _garble, _list, _deep, os.remove]
)
def test_damaged_descriptions(damage: Damage, prepared: ConfigDict) -> None:
  before = _read(prepared)
  folder = _folder(prepared)
  damage(folder / 'dataset_info.json')
  said = _refused(prepared)
  assert f'prepared in {folder} is damaged: remove that folder' in said
  shutil.rmtree(folder)
  assert _read(prepared) == before


@pytest.mark.parametrize('damage', [_cut, _empty, _garble, _list, os.remove])
def test_descriptions_of_features_are_not_needed(
  damage: Damage, prepared: ConfigDict
) -> None:
  before = _read(prepared)
  damage(_folder(prepared) / 'features.json')
  assert _read(prepared) == before


@pytest.mark.parametrize(
  'content', ['3', 'null', '{}', '[]', '["a", "a"]', '[1]', '"a"', '[' * 10**5]
)
def test_what_is_no_vocabulary_is_made_anew(
  content: str, prepared: ConfigDict
) -> None:
  before = _read(prepared)
  [path] = _folder(prepared).glob('dictionary-*')
  text = path.read_text()
  path.write_text(content)
  assert _read(prepared) == before
  assert path.read_text() == text


@pytest.mark.parametrize('token', ['256', '-1', 'x'])
def test_what_is_no_byte_is_made_anew(token: str, prepared: ConfigDict) -> None:
  prepared.tokenizer = 'enwik8'
  before = _read(prepared)
  [path] = _folder(prepared).glob('dictionary-*-enwik8.json')
  path.write_text(json.dumps([token]))
  assert _read(prepared) == before


def _zip(path: pathlib.Path, text: bytes, kind: int = 8) -> pathlib.Path:
  with zipfile.ZipFile(path, 'w', kind) as archive:
    archive.writestr('enwik8', text)
  return path


def _patched(path: pathlib.Path, offset: int, change: bytes) -> None:
  """Changes both headers of the only member, as its bytes say where."""
  content = bytearray(path.read_bytes())
  central = content.index(b'PK\x01\x02')
  content[offset : offset + len(change)] = change
  content[central + offset + 2 : central + offset + 2 + len(change)] = change
  path.write_bytes(content)


def _bad_checksum(path: pathlib.Path) -> None:
  _patched(path, 14, b'\0\0\0\0')


def _encrypted(path: pathlib.Path) -> None:
  _patched(path, 6, b'\1\0')


def _unknown_method(path: pathlib.Path) -> None:
  _patched(path, 8, b'\x63\0')


def _bad_stream(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[60:90] = b'\xff' * 30
  path.write_bytes(content)


def _short_member(path: pathlib.Path) -> None:
  """The archive says that more follows than does."""
  content = bytearray(path.read_bytes())
  central = content.index(b'PK\x01\x02')
  del content[60:central]
  end = content.index(b'PK\x05\x06')
  content[end + 16 : end + 20] = struct.pack('<I', 60)
  path.write_bytes(content)


@pytest.mark.parametrize(
  'damage',
  [_bad_checksum, _encrypted, _unknown_method, _bad_stream, _short_member],
)
def test_damaged_zip_files(
  damage: Damage, tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  text = np.random.default_rng(0).bytes(1000).hex().encode()
  path = _zip(tmp_path / 'enwik8.zip', text)
  damage(path)
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data_config(name='enwik8', path=str(path)), 'train')
  said = str(caught.value)
  assert '\n' not in said
  assert f'{path} cannot be read to its end (' in said
  assert f'get {texts.Enwik8.URL} anew' in said
  left = [p for p in pathlib.Path(tmp_path).rglob('*') if p.is_file()]
  assert left == [path]


def test_zip_bombs(tmp_path: pathlib.Path, data_config: DataConfig) -> None:
  """By what the archive says, before anything is unpacked."""
  path = _zip(tmp_path / 'bomb.zip', bytes(2**25))
  with pytest.raises(errors.UserError, match='from 32,.* to 33,554,432 bytes'):
    sources.open_documents(data_config(name='enwik8', path=str(path)), 'train')


def test_a_zip_that_says_less_than_it_holds(
  tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  """No more is read than was said."""
  path = _zip(tmp_path / 'liar.zip', bytes(2**25))
  _patched(path, 22, struct.pack('<I', 1000))
  with pytest.raises(errors.UserError, match='to its end .*Bad CRC-32'):
    sources.open_documents(data_config(name='enwik8', path=str(path)), 'train')


@pytest.mark.parametrize('size', [0, 10])
def test_a_zip_of_too_little(
  size: int, tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  path = _zip(tmp_path / 'small.zip', b'a' * size)
  with pytest.raises(errors.UserError, match='too little text for a split'):
    sources.open_documents(data_config(name='enwik8', path=str(path)), 'train')


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_advice_on_an_empty_split_works(
  split: str, make_data: MakeData, names_of: NamesOf
) -> None:
  """Of a few documents, all in one split."""
  others = {s: names_of(s, 3) for s in folders.SPLITS if s != split}
  there, names = others.popitem()
  data = make_data(dict.fromkeys(names, b'text'))
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data, split)
  part, rest = f'{there}[-1:]', f'{there}[:-1]'
  assert f"'{part}' with data.train_split = '{rest}'" in str(caught.value)
  assert len(sources.open_documents(data, part)) == 1
  assert len(sources.open_documents(data, rest)) == 2


def test_advice_on_one_document_works(
  make_data: MakeData, names_of: NamesOf
) -> None:
  data = make_data({names_of('validation', 1)[0]: b'text'})
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data, 'train')
  said = str(caught.value)
  assert 'a document is not cut: write the text as several files' in said
  assert "data.train_split = 'all' and eval.every = 0" in said
  assert len(sources.open_documents(data, 'all')) == 1


def test_links_are_followed(
  make_data: MakeData, tmp_path: pathlib.Path
) -> None:
  """Each folder once, and under its own name if it has one below the root."""
  data = make_data({'b/1.txt': b'one', 'b/c/2.txt': b'two'})
  root, outside = pathlib.Path(data.path), tmp_path / 'outside'
  (outside / 'deep').mkdir(parents=True)
  (outside / 'deep' / '3.txt').write_bytes(b'three')
  (root / 'a').symlink_to('b', target_is_directory=True)
  (root / 'b' / 'c' / 'up').symlink_to(root, target_is_directory=True)
  (root / 'link').symlink_to(outside, target_is_directory=True)
  (root / 'twice').symlink_to(outside, target_is_directory=True)
  (outside / 'deep' / 'self').symlink_to('.', target_is_directory=True)
  (root / 'gone').symlink_to('nowhere')
  os.mkfifo(root / 'pipe')
  documents = sources.open_documents(data, 'all')
  names = {record['name'].decode() for record in documents.records}
  assert names == {'b/1.txt', 'b/c/2.txt', 'link/deep/3.txt'}


def test_a_byte_order_mark_is_no_text(make_data: MakeData) -> None:
  files = {
    'a': b'\xef\xbb\xbftext',
    'b': b'\xef\xbb\xbf',
    'c': b'a\xef\xbb\xbf',
  }
  documents = sources.open_documents(make_data(files), 'all')
  found = sorted(documents[i] for i in range(len(documents)))
  assert found == ['a\ufeff', 'text']


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('kaggle:lm1b', "of the community 'kaggle', of which .* runs it"),
    ('huggingface:lm1b/x:1.0.0', 'is no name of a data set'),
    ('lm1b/version=2.0.0', 'cannot be opened: .*2.0.0'),
    ('lm1b/data_dir=x', 'sets data_dir: a name may have'),
    ('text_folder/x', 'is not known|cannot be opened'),
    ('wikitext103/x', 'is not known|cannot be opened'),
    ('lm1b/../x', 'cannot be opened'),
  ],
)
def test_names_that_are_not_opened(
  name: str, said: str, data_config: DataConfig
) -> None:
  with pytest.raises(errors.UserError, match=said) as caught:
    sources.open_documents(data_config(name=name), 'train')
  assert '\n' not in str(caught.value)


def test_a_community_that_is_allowed(data_config: DataConfig) -> None:
  data = data_config(name='kaggle:lm1b', allow_community=True)
  checks.check_name(data, data.dir)


@pytest.mark.parametrize('name', ['strange', 'Strange', 'strange:1.0.0'])
def test_prepared_data_imports_no_module(
  name: str, data_config: DataConfig, tmp_path: pathlib.Path
) -> None:
  """The features.json of a stranger's data would have it run."""
  data = data_config(name=name)
  folder = pathlib.Path(data.dir) / 'strange' / '1.0.0'
  folder.mkdir(parents=True)
  (tmp_path / 'evil.py').write_text('raise SystemExit("run")')
  own = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
  inside = {'pythonClassName': 'evil.Feature'}
  content = {
    'pythonClassName': own,
    'featuresDict': {'features': {'a': inside}},
  }
  (folder / 'features.json').write_text(json.dumps(content))
  (folder / 'dataset_info.json').write_text(
    json.dumps({'name': 'strange', 'version': '1.0.0'})
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(tmp_path))
    with pytest.raises(errors.UserError, match='names the class evil.Feature'):
      sources.open_documents(data, 'train')


def test_a_folder_whose_name_is_a_pattern(
  make_data: MakeData, tmp_path: pathlib.Path
) -> None:
  data = make_data({f'{i}.txt': b'text' for i in range(3)})
  for name in ('exp[1]', 'a*', 'q?'):
    data.dir = str(tmp_path / name)
    assert len(sources.open_documents(data, 'all')) == 3
  for name in ('s**t', '[a]'):
    (tmp_path / 'a').mkdir(exist_ok=True)
    data.dir = str(tmp_path / name)
    with pytest.raises(errors.UserError, match='data.dir .* is also a pattern'):
      sources.open_documents(data, 'all')


def test_home_is_expanded(
  make_data: MakeData, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  data = make_data({'1.txt': b'text'})
  monkeypatch.setenv('HOME', str(tmp_path))
  data.path, data.dir = '~/texts', '~/here'
  assert len(sources.open_documents(data, 'all')) == 1
  assert (tmp_path / 'here').is_dir()
  data.path = '~nobody-of-this-name/texts'
  with pytest.raises(errors.UserError, match='there is no home of ~nobody-of'):
    sources.open_documents(data, 'all')


def test_a_zip_that_is_a_pipe(
  tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  os.mkfifo(tmp_path / 'enwik8.zip')
  data = data_config(name='enwik8', path=str(tmp_path / 'enwik8.zip'))
  with pytest.raises(errors.UserError, match='Not a regular file'):
    sources.open_documents(data, 'train')


def test_a_split_of_one_token(
  tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  """Neither training nor evaluation can predict anything there."""
  path = _zip(tmp_path / 'tiny.zip', b'ab' * 10)
  data = data_config(
    name='enwik8', path=str(path), tokenizer='enwik8', seq_len=8
  )
  tokenizer = tokenizers.build(data)
  with pytest.raises(errors.UserError, match="'validation' of .* has no token"):
    mixtures.open_sequences(data, 'validation', tokenizer)


def test_damage_of_a_data_set_of_others(
  data_config: DataConfig, tmp_path: pathlib.Path
) -> None:
  data = data_config(name='verses')
  folder = _folder_of_verses(data)
  _cut(folder / 'dataset_info.json')
  with pytest.raises(errors.UserError, match=f'if {folder} is damaged, remove'):
    sources.open_documents(data, 'train')
  shutil.rmtree(folder)
  assert sources.open_documents(data, 'train')[0] == 'a rose'


def _folder_of_verses(data: ConfigDict) -> pathlib.Path:
  return pathlib.Path(sources.open_documents(data, 'train').folder)


class Verses(tfds.core.GeneratorBasedBuilder):
  """A data set as others make them."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict]]:
    yield 0, {'text': 'a rose'}
