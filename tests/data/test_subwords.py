"""Tokenizers from files: the libraries' own ids, and what is no tokenizer."""

import json
import multiprocessing
import pathlib
import pickle
import random
from collections.abc import Callable
from concurrent import futures

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface
from ml_collections import ConfigDict

from moe_jax.data import subword_training, subwords, tokenizers
from moe_jax.data.pipeline import TokenSequences
from moe_jax.data.sources import Documents
from moe_jax.errors import UserError
from tests.helpers import vocabularies

TEXTS = (*vocabularies.TEXTS[:3], '', ' a  b\n\n', 'x\x00y', '日本語 ☃')


def build(path: object) -> tokenizers.Tokenizer:
  return tokenizers.build(ConfigDict({'tokenizer': str(path)}))


def random_text(seed: int, length: int = 400) -> str:
  """Characters of every size in UTF-8."""
  rng = random.Random(seed)
  ranges = (0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)
  return ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def test_ids_are_those_of_hugging_face(tmp_path: pathlib.Path) -> None:
  path = vocabularies.write(tmp_path, 'bpe')
  theirs = huggingface.Tokenizer.from_file(str(path))
  ours = build(path)
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
  assert ours.vocab_size == theirs.get_vocab_size()
  assert ours.eos_id == theirs.token_to_id('<|endoftext|>')


def test_ids_are_those_of_sentencepiece(tmp_path: pathlib.Path) -> None:
  path = vocabularies.write(tmp_path, 'unigram')
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ours = build(path)
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs.encode(text)
  assert ours.vocab_size == theirs.get_piece_size()
  assert ours.eos_id == theirs.eos_id()


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_what_is_encoded_is_decoded_again(
  kind: str, tmp_path: pathlib.Path
) -> None:
  tokenizer = build(vocabularies.write(tmp_path, kind))
  for text in (*TEXTS[:4], 'x\x00y', *map(random_text, range(20))):
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_a_file_that_cuts_fills_up_and_adds_tokens_is_read_whole() -> None:
  made = huggingface.Tokenizer.from_str(vocabularies.content('bpe').decode())
  plain = made.encode('one two').ids
  made.enable_truncation(2)
  made.enable_padding(length=50)
  made.post_processor = huggingface.processors.TemplateProcessing(
    single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)]
  )
  tokenizer = subwords.HuggingFaceTokenizer(made.to_str().encode())
  assert tokenizer.encode('one two').tolist() == plain


def test_an_eos_that_is_missing_is_the_id_behind_the_last() -> None:
  values = json.loads(vocabularies.content('bpe'))
  values['added_tokens'] = []
  values['model']['vocab']['other'] = values['model']['vocab'].pop(
    '<|endoftext|>'
  )
  tokenizer = subwords.HuggingFaceTokenizer(json.dumps(values).encode())
  size = vocabularies.SIZES['bpe']
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1)
  assert tokenizer.decode([size, *tokenizer.encode('a text'), size]) == 'a text'
  whole = huggingface.Tokenizer.from_str(tokenizer.with_eos().decode())
  assert whole.token_to_id(tokenizer.eos) == size


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_half_a_character_is_replaced(
  kind: str, tmp_path: pathlib.Path
) -> None:
  tokenizer = build(vocabularies.write(tmp_path, kind))
  half = 'β'.encode()[1:] + b' text'
  ids = tokenizer.encode(half.decode(errors='surrogateescape'))
  assert tokenizer.decode(ids) == '\ufffd text'


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_threads_and_forks_make_the_same_ids(
  kind: str, tmp_path: pathlib.Path
) -> None:
  tokenizer = build(vocabularies.write(tmp_path, kind))
  texts = [random_text(seed) for seed in range(40)]
  expected = [tokenizer.encode(text).tolist() for text in texts]
  with futures.ThreadPoolExecutor(4) as pool:
    assert [i.tolist() for i in pool.map(tokenizer.encode, texts)] == expected
  # After this process has encoded, and in the midst of its threads.
  with multiprocessing.get_context('fork').Pool(1) as forked:
    waiting = forked.map_async(tokenizer.encode, texts)
    assert [ids.tolist() for ids in waiting.get(timeout=60)] == expected


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_another_process_gets_the_same_tokenizer(
  kind: str, tmp_path: pathlib.Path
) -> None:
  tokenizer = build(vocabularies.write(tmp_path, kind))
  sent = pickle.loads(pickle.dumps(tokenizer))
  assert sent.name == tokenizer.name
  assert sent.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


def test_bytes_of_a_split_are_exact_whatever_the_tokenizer(
  documents: Documents, tmp_path: pathlib.Path
) -> None:
  """Bits per byte divide by these: an independent count, of the texts."""
  texts = [documents[i] for i in range(len(documents))]
  num_bytes = sum(len(text.encode()) for text in texts)
  counted = {}
  for kind in ('bpe', 'unigram'):
    tokenizer = build(vocabularies.write(tmp_path, kind))
    sequences = TokenSequences(documents, tokenizer, 16)
    assert sequences.num_bytes == num_bytes
    counted[kind] = sequences.num_tokens
    # A separator before each document and one at the end; the first predicts.
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert sequences.num_tokens == tokens + len(texts)
  assert counted['bpe'] != counted['unigram']


@pytest.mark.parametrize('kind', subword_training.KINDS)
def test_the_same_texts_make_the_same_file(kind: str) -> None:
  again = subword_training.train(
    list(vocabularies.TEXTS), kind, vocabularies.SIZES[kind]
  )
  assert again == vocabularies.content(kind)


def test_words_are_counted_and_others_unknown(tmp_path: pathlib.Path) -> None:
  tokenizer = build(vocabularies.write(tmp_path, 'words'))
  assert tokenizer.vocab_size == vocabularies.SIZES['words']
  ids = tokenizer.encode('the words of nobody')
  assert tokenizer.pieces(ids) == ['the', 'words', 'of', '<unk>']


def not_utf8() -> list[str]:
  raise UserError('document 3 is not UTF-8')
  yield


@pytest.mark.parametrize('kind', subword_training.KINDS)
def test_what_is_wrong_with_a_document_is_told_as_it_is(kind: str) -> None:
  with pytest.raises(UserError, match='^document 3 is not UTF-8$'):
    subword_training.train(not_utf8(), kind, 300)


@pytest.mark.parametrize(
  ('kind', 'size', 'message'),
  [
    ('bpe', 256, '--size = 256 must be at least 257 for --kind=bpe'),
    ('unigram', 260, '--size = 260 does not do for --kind=unigram'),
    ('bpee', 300, "--kind = 'bpee' is not known; did you mean 'bpe'"),
  ],
)
def test_sizes_that_do_not_do_are_refused(
  kind: str, size: int, message: str
) -> None:
  with pytest.raises(UserError, match=message):
    subword_training.train(vocabularies.TEXTS, kind, size)


def absent(folder: pathlib.Path) -> pathlib.Path:
  return folder / 'none.json'


def a_folder(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'folder.model').mkdir()
  return folder / 'folder.model'


def cut_short(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'cut.json').write_bytes(vocabularies.content('bpe')[:5000])
  return folder / 'cut.json'


def half_a_model(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'cut.model').write_bytes(vocabularies.content('unigram')[:1001])
  return folder / 'cut.model'


def another_json(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  return folder / 'config.json'


def a_json_model(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'bpe.model').write_bytes(vocabularies.content('bpe'))
  return folder / 'bpe.model'


def a_model_json(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'unigram.json').write_bytes(vocabularies.content('unigram'))
  return folder / 'unigram.json'


def no_tokens(folder: pathlib.Path) -> pathlib.Path:
  model = {'type': 'BPE', 'vocab': {}, 'merges': []}
  (folder / 'empty.json').write_text(json.dumps({'model': model}))
  return folder / 'empty.json'


def nothing(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'nothing.model').touch()
  return folder / 'nothing.model'


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (absent, 'cannot be read: No such file'),
    (a_folder, 'cannot be read: Is a directory'),
    (cut_short, 'is damaged, or no tokenizer.json'),
    (half_a_model, 'is damaged, or no tokenizer.model'),
    (another_json, 'is damaged, or no tokenizer.json'),
    (a_json_model, 'is damaged, or no tokenizer.model'),
    (a_model_json, 'is damaged, or no tokenizer.json'),
    (no_tokens, 'is damaged, or no tokenizer.json .* it has no token'),
    (nothing, 'is damaged, or no tokenizer.model'),
  ],
)
def test_what_is_no_tokenizer_is_one_line(
  make: Callable[[pathlib.Path], pathlib.Path],
  message: str,
  tmp_path: pathlib.Path,
) -> None:
  path = make(tmp_path)
  with pytest.raises(UserError, match=message) as caught:
    build(path)
  said = str(caught.value)
  assert said.startswith(f"data.tokenizer = '{path}'") and '\n' not in said


def test_a_text_without_ids_is_one_line(tmp_path: pathlib.Path) -> None:
  model = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': '<unk>'}
  path = tmp_path / 'closed.json'
  path.write_text(json.dumps({'version': '1.0', 'model': model}))
  with pytest.raises(UserError, match='cannot encode a text: .*UNK'):
    build(path).encode('b')


def test_a_name_that_is_none_lists_paths_too() -> None:
  with pytest.raises(UserError, match=r'words, PATH\.json, PATH\.model'):
    build('tokenizer.txt')
