"""Corpora of one text, their dictionaries, and rows that go on and on."""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import pipeline, sources, texts, tokenizers, vocabulary
from moe_jax.data.mixtures import Mixture
from moe_jax.data.orders import ContiguousRows

DataConfig = Callable[..., ConfigDict]

# 1000 bytes, so the splits begin at 900 and 950. Byte 900 lies inside a
# character of two bytes.
ENWIK = ('<page>\nnaïve → text\r\t' * 60).encode()[:899] + 'é'.encode() * 50
ENWIK = (ENWIK + b'\nend of it')[:1000].ljust(1000, b'.')
PARTS = {
  'train': ENWIK[:900],
  'validation': ENWIK[900:950],
  'test': ENWIK[950:],
}
WIKI = {
  'train': ' \n = Title = \n the <unk> of the café \n no end',
  'valid': ' the new \n',
  'test': ' of \n',
}


class Songs(tfds.core.GeneratorBasedBuilder):
  """Two texts a document, in splits of which TFDS's order is another."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'title': tfds.features.Text(), 'a/b': tfds.features.Text()}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    names = ('zero', 'test', 'extra', 'train')
    return {name: self._generate_examples(name) for name in names}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    yield 0, {'title': f'on {split}', 'a/b': f'la {split} la'}


@pytest.fixture
def enwik8(tmp_path: pathlib.Path, data_config: DataConfig) -> ConfigDict:
  path = tmp_path / 'enwik8.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('enwik8', ENWIK)
  return data_config(name='enwik8', path=str(path), tokenizer='enwik8')


@pytest.fixture
def wikitext(tmp_path: pathlib.Path, data_config: DataConfig) -> ConfigDict:
  path = tmp_path / 'wikitext-103-v1.zip'
  with zipfile.ZipFile(path, 'w') as archive:
    for name, text in WIKI.items():
      archive.writestr(f'wikitext-103/wiki.{name}.tokens', text)
  return data_config(name='wikitext103', path=str(path), tokenizer='words')


def stream(sequences: pipeline.TokenSequences) -> np.ndarray:
  return sequences._tokens(0, sequences.num_stream_tokens)


def open_sequences(
  data: ConfigDict, split: str, seq_len: int = 8
) -> pipeline.TokenSequences:
  documents = sources.open_documents(data, split)
  return pipeline.TokenSequences(documents, tokenizers.build(data), seq_len)


@pytest.mark.parametrize('split', PARTS)
def test_enwik8_is_its_bytes(
  enwik8: ConfigDict, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Many pieces, nothing between them, not even where a character is cut."""
  monkeypatch.setattr(texts, '_PIECE_BYTES', 16)
  sequences = open_sequences(enwik8, split)
  tokenizer = tokenizers.build(enwik8)
  values = np.frombuffer(PARTS[split], np.uint8)
  names = [vocabulary.EOS if v == 10 else str(v) for v in values]
  assert [tokenizer.tokens[i] for i in stream(sequences)] == names
  assert sequences.num_tokens == len(values) - 1
  assert sequences.num_bytes == len(values)
  if split == 'train':
    assert len(sources.open_documents(enwik8, split)) > 10


def test_ids_by_order_of_appearance(enwik8: ConfigDict) -> None:
  tokenizer = tokenizers.build(enwik8)
  order = list(dict.fromkeys(ENWIK))
  expected = [vocabulary.EOS if v == 10 else str(v) for v in order]
  assert tokenizer.tokens == expected
  assert tokenizer.vocab_size == len(set(ENWIK))
  assert tokenizer.tokens[tokenizer.eos_id] == vocabulary.EOS
  text = '<page>\nté'
  assert tokenizer.decode(tokenizer.encode(text)) == text
  with pytest.raises(errors.UserError, match='the byte 90 .0x5a. is in none'):
    tokenizer.encode('Z')


def test_words_as_the_released_vocabulary(wikitext: ConfigDict) -> None:
  """Its loop, restated: split every line, add <eos>, number as they appear."""
  index: dict[str, int] = {}
  ids = {}
  for name, text in WIKI.items():
    ids[name] = [
      index.setdefault(word, len(index))
      for line in text.splitlines()
      for word in [*line.split(), '<eos>']
    ]
  tokenizer = tokenizers.build(wikitext)
  assert tokenizer.tokens == list(index)
  for name, split in zip(WIKI, texts.SPLITS, strict=True):
    np.testing.assert_array_equal(
      stream(open_sequences(wikitext, split)), ids[name]
    )
  assert tokenizer.decode(ids['valid']) == 'the new\n'
  with pytest.raises(errors.UserError, match="the word 'unseen' is in none"):
    tokenizer.encode('the unseen')


def test_the_vocabulary_is_made_once(
  wikitext: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
  first = tokenizers.build(wikitext)

  def refuse(self: sources.Documents, i: int) -> str:
    raise AssertionError('read again')

  monkeypatch.setattr(sources.Documents, '__getitem__', refuse)
  assert tokenizers.build(wikitext).tokens == first.tokens


def test_a_vocabulary_is_kept_by_feature_and_kind(
  tmp_path: pathlib.Path,
) -> None:
  folder = epath.Path(tmp_path)

  def tokens(kind: type, text_key: str, *splits: list[str]) -> list[str]:
    return vocabulary.load_or_make(kind, folder, text_key, splits).tokens

  words, values = vocabulary.WordTokenizer, vocabulary.EnwikTokenizer
  made = tokens(words, 'text', ['b a\nb', 'c'], ['d a'])
  assert made == ['b', 'a', '<eos>', 'c', 'd']
  assert tokens(words, 'a/b', ['z']) == ['z', '<eos>']
  assert tokens(values, 'text', ['ba\n']) == ['98', '97', '<eos>']
  # As they were, whatever the splits hold now.
  assert tokens(words, 'text', ['q']) == made
  assert tokens(words, 'a/b', ['q']) == ['z', '<eos>']
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [
    'dictionary-a%2Fb-words.json',
    'dictionary-text-enwik8.json',
    'dictionary-text-words.json',
  ]
  assert json.loads((tmp_path / names[2]).read_text()) == made
  (tmp_path / names[2]).write_text('["b", "a"')  # cut short
  assert tokens(words, 'text', ['q']) == ['q', '<eos>']


def test_splits_are_opened_in_the_order_of_ids(data_config: DataConfig) -> None:
  data = data_config(name='songs', text_key='title')
  found = sources.open_splits(data)
  assert [each.split for each in found] == ['train', 'test', 'extra', 'zero']
  assert [each[0] for each in found] == [f'on {each.split}' for each in found]
  assert len({each.folder for each in found}) == 1


def test_every_text_of_a_data_set_has_its_vocabulary(
  data_config: DataConfig,
) -> None:
  keys = {'name': 'songs', 'tokenizer': 'words'}
  splits = ['test', 'extra', 'zero']
  for text_key, tokens in (
    ('title', ['on', 'train', '<eos>', *splits]),
    ('a/b', ['la', 'train', '<eos>', *splits]),
  ):
    data = data_config(**keys, text_key=text_key)
    assert tokenizers.build(data).tokens == tokens


def test_fingerprints_tell_tables_apart() -> None:
  def fingerprint(*tokens: str) -> str:
    return vocabulary.WordTokenizer(tokens).fingerprint

  assert fingerprint('a', 'b') == fingerprint('a', 'b', '<eos>')
  others = [fingerprint(*t) for t in (['a', 'b'], ['b', 'a'], ['a'], ['ab'])]
  assert len(set(others)) == 4
  assert fingerprint('caf\udce9')  # half a character of one text
  assert tokenizers.ByteTokenizer().fingerprint is None


def test_declared_sizes_need_no_data(data_config: DataConfig) -> None:
  absent = data_config(name='enwik8', path='/nowhere', tokenizer='enwik8')
  assert tokenizers.vocab_size(absent, 205) == 205
  assert tokenizers.vocab_size(data_config(tokenizer='bytes'), 300) == 257


def test_every_member_tells_zip_files_apart(
  tmp_path: pathlib.Path, data_config: DataConfig
) -> None:
  """Though folders and empty files all have the sum 0."""
  read = []
  for i, text in enumerate((ENWIK, ENWIK[::-1])):
    path = tmp_path / f'{i}.zip'
    with zipfile.ZipFile(path, 'w') as archive:
      for name in ('a/', 'b/', 'c', 'd'):
        archive.writestr(name, '')
      archive.writestr('a/enwik8', text)
    data = data_config(name='enwik8', path=str(path))
    text = sources.open_documents(data, 'train')[0]
    read.append(text.encode(errors='surrogateescape'))
  assert read == [ENWIK[:900], ENWIK[::-1][:900]]


def test_bad_zip_files(
  tmp_path: pathlib.Path, data_config: DataConfig, wikitext: ConfigDict
) -> None:
  with pytest.raises(errors.UserError, match='data.path = .*not a zip file'):
    sources.open_documents(
      data_config(name='enwik8', path=str(tmp_path / 'no.zip')), 'train'
    )
  other = data_config(name='enwik8', path=wikitext.path)
  with pytest.raises(errors.UserError, match=r'holds 0 files \*enwik8'):
    sources.open_documents(other, 'train')


@pytest.mark.parametrize('name', ['enwik8', 'wikitext103'])
def test_a_download_that_fails_says_what_to_put_where(
  name: str, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(self: object, url: str) -> None:
    raise tfds.download.DownloadError(f'no route to {url}')

  monkeypatch.setattr(tfds.download.DownloadManager, 'download', fail)
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data_config(name=name), 'train')
  message = str(caught.value)
  assert '\n' not in message
  for part in (name, texts.BUILDERS[name].URL, 'data.path'):
    assert part in message


def test_downloads_are_read(
  enwik8: ConfigDict, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(
    tfds.download.DownloadManager, 'download', lambda self, url: enwik8.path
  )
  digest = hashlib.sha256(pathlib.Path(enwik8.path).read_bytes()).hexdigest()
  monkeypatch.setattr(texts.Enwik8, 'SHA256', digest)
  data = data_config(name='enwik8', tokenizer='enwik8')
  assert open_sequences(data, 'train').num_bytes == 900


def test_a_download_of_another_file_is_refused(
  enwik8: ConfigDict, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  """It is removed, too: TFDS would take it the next time."""
  monkeypatch.setattr(
    tfds.download.DownloadManager, 'download', lambda self, url: enwik8.path
  )
  with pytest.raises(errors.UserError, match='another file, of SHA-256 .*5479'):
    sources.open_documents(data_config(name='enwik8'), 'train')
  assert not pathlib.Path(enwik8.path).exists()


def test_downloads_are_encrypted_and_pinned() -> None:
  for builder in texts.BUILDERS.values():
    assert builder.URL.startswith('https://')
    assert len(bytes.fromhex(builder.SHA256)) == 32


def epochs(
  sequences: pipeline.TokenSequences, rows: int, steps: int, **keys: int
) -> list[pipeline.Batch]:
  options = {'seed': 0, 'start': 0, 'threads': 1} | keys
  mixture = Mixture.of_one(sequences, order='contiguous', batch_size=rows)
  batches = pipeline.train_batches(mixture, rows=range(rows), **options)
  found = [next(batches) for _ in range(steps)]
  batches.close()
  return found


def test_rows_go_on_where_they_stopped(enwik8: ConfigDict) -> None:
  """Within an epoch; then from another offset, and with a fresh memory."""
  sequences = open_sequences(enwik8, 'train', seq_len=32)
  whole, row_tokens = stream(sequences), 900 // 4
  batches = epochs(sequences, rows=4, steps=40)
  offsets, fresh_at = [], []
  for step, batch in enumerate(batches):
    assert batch['padding_mask'].all()
    assert batch['segment_start'].dtype == bool
    assert len(set(batch['segment_start'])) == 1
    if batch['segment_start'][0]:
      fresh_at.append(step)
      first = batch['token_ids'][0]
      begins = [o for o in range(32) if (whole[o : o + 32] == first).all()]
      offsets.append(begins)
      begin = None
    for row in range(4):
      part = whole[row * row_tokens : (row + 1) * row_tokens]
      fits = [
        b
        for b in range(row_tokens - 32)
        if (part[b : b + 32] == batch['token_ids'][row]).all()
        and (part[b + 1 : b + 33] == batch['targets'][row]).all()
      ]
      assert fits
      if row == 0 and begin is not None:
        assert begin + 32 in fits
    begin = begin + 32 if begin is not None else begins[0]
  assert fresh_at[0] == 0
  assert 0 in offsets[0]
  # 225 tokens a row: 7 segments from offset 0, 6 from any other.
  assert np.diff(fresh_at).tolist()[:4] == [7, 6, 6, 6]


def test_contiguous_is_a_function_of_seed_and_step(enwik8: ConfigDict) -> None:
  sequences = open_sequences(enwik8, 'train', seq_len=32)
  straight = epochs(sequences, rows=4, steps=20)
  resumed = epochs(sequences, rows=4, steps=8, start=12)
  for a, b in zip(straight[12:], resumed, strict=True):
    for key, value in a.items():
      np.testing.assert_array_equal(value, b[key])
  other = epochs(sequences, rows=4, steps=20, seed=1)
  assert any(
    (a['token_ids'] != b['token_ids']).any()
    for a, b in zip(straight, other, strict=True)
  )


def test_two_processes_read_what_one_reads(enwik8: ConfigDict) -> None:
  sequences = open_sequences(enwik8, 'train', seq_len=32)
  one = epochs(sequences, rows=4, steps=15)
  halves = []
  for rows in (range(2), range(2, 4)):
    mixture = Mixture.of_one(sequences, order='contiguous', batch_size=4)
    batches = pipeline.train_batches(
      mixture, rows=rows, seed=0, start=0, threads=1
    )
    halves.append([next(batches) for _ in range(15)])
    batches.close()
  for whole, a, b in zip(one, *halves, strict=True):
    for key, value in whole.items():
      np.testing.assert_array_equal(value, np.concatenate([a[key], b[key]]))


def test_offsets_lie_below_a_segment(enwik8: ConfigDict) -> None:
  sequences = open_sequences(enwik8, 'train', seq_len=32)
  segments = ContiguousRows(sequences, 4, seed=3)
  offsets = [segments._locate(step)[1] for step in range(2000)]
  assert offsets[:7] == [0] * 7
  assert set(offsets) == set(range(32))


def test_rows_shorter_than_a_segment(enwik8: ConfigDict) -> None:
  sequences = open_sequences(enwik8, 'train', seq_len=32)
  with pytest.raises(errors.UserError, match='parts of 30, but data.seq_len ='):
    epochs(sequences, rows=30, steps=1)
  # 33 tokens: one segment, always the same.
  (only,) = {b['token_ids'].tobytes() for b in epochs(sequences, 27, 5)}
  assert only


@pytest.mark.parametrize('rows', [1, 3, 7, 64])
def test_contiguous_evaluation_predicts_every_token_once(
  enwik8: ConfigDict, rows: int
) -> None:
  sequences = open_sequences(enwik8, 'validation')
  batches = list(
    pipeline.eval_batches(
      sequences, batch_size=rows, rows=range(rows), order='contiguous'
    )
  )
  assert batches[0]['segment_start'].all()
  assert not any(batch['segment_start'].any() for batch in batches[1:])
  by_row = [
    np.concatenate([b['targets'][row][b['padding_mask'][row]] for b in batches])
    for row in range(rows)
  ]
  np.testing.assert_array_equal(np.concatenate(by_row), stream(sequences)[1:])
  for row in range(rows):
    masks = np.concatenate([b['padding_mask'][row] for b in batches])
    assert not masks[masks.sum() :].any()  # padding only at a row's end
