"""Instruction data: what is rendered, and which of its tokens are targets."""

import itertools
import json
import pathlib
import pickle
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import (
  corpora,
  instructions,
  pipeline,
  sources,
  subwords,
  tokenizers,
)
from moe_jax.data.mixtures import Mixture
from moe_jax.data.token_cache import TokenCache
from tests.helpers import vocabularies

DataConfig = Callable[..., ConfigDict]
EOS = 256
ROWS = [
  {'instruction': 'Add {them}.', 'input': '1, 2', 'output': '3', 'id': 1},
  {'instruction': 'Say caf\xe9', 'input': '', 'output': 'caf\xe9\n\u2192'},
  {'instruction': 'Be brief', 'input': None, 'output': ' no '},
]
# Of each row, what is not predicted and what is, as they are published.
PROMPTS = [
  (
    'Below is an instruction that describes a task, paired with an input that '
    'provides further context. Write a response that appropriately completes '
    'the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n1, 2\n\n'
    '### Response:'
  ),
  *(
    'Below is an instruction that describes a task. Write a response that '
    'appropriately completes the request.\n\n### Instruction:\n'
    f'{instruction}\n\n### Response:'
    for instruction in ('Say caf\xe9', 'Be brief')
  ),
]
ALPACA = [
  [(prompt, False), (row['output'], True)]
  for prompt, row in zip(PROMPTS, ROWS, strict=True)
]
CHATS = [
  [('system', 'Short.'), ('user', 'Hi'), ('assistant', 'Hello')],
  [('user', 'One?'), ('assistant', '1'), ('user', 'Two?'), ('assistant', '2')],
  [('user', 'a'), ('assistant', 'b'), ('user', 'what is left out')],
]
CHAT = [
  [
    ('### System:\nShort.\n\n### User:\nHi\n\n### Assistant:\n', False),
    ('Hello', True),
  ],
  [
    ('### User:\nOne?\n\n### Assistant:\n', False),
    ('1', True),
    ('\n\n### User:\nTwo?\n\n### Assistant:\n', False),
    ('2', True),
  ],
  [('### User:\na\n\n### Assistant:\n', False), ('b', True)],
]


def _messages(role: str = 'role', content: str = 'content') -> list[list[dict]]:
  return [[{role: r, content: text} for r, text in chat] for chat in CHATS]


SHARED = [
  [
    message | {'from': {'user': 'human', 'assistant': 'gpt'}.get(role, role)}
    for message in messages
    for role in [message['from']]
  ]
  for messages in _messages('from', 'value')
]
# A format, its rows and the parts of each.
KINDS = {
  'alpaca': ('alpaca', ROWS, ALPACA),
  'chat': ('chat', [{'messages': m, 'n': 1} for m in _messages()], CHAT),
  'sharegpt': ('chat', [{'conversations': m} for m in SHARED], CHAT),
}


def _parquet(rows: list[dict]) -> bytes:
  sink = pyarrow.BufferOutputStream()
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, sink, row_group_size=2)
  return sink.getvalue().to_pybytes()


WAYS = {
  '.jsonl': lambda rows: '\n'.join(map(json.dumps, rows)).encode(),
  '.json': lambda rows: json.dumps(rows, indent=1).encode(),
  '.parquet': _parquet,
}


@pytest.fixture
def config_of(tmp_path: pathlib.Path, data_config: DataConfig) -> Callable:
  """Writes a file of training examples, and returns the config of it."""

  def make(content: bytes, name: str, format_: str) -> ConfigDict:
    folder = tmp_path / 'examples' / 'train'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    data = data_config(name='files', path=str(folder.parent), seq_len=16)
    data.format = format_
    return data

  return make


@pytest.fixture
def documents(config_of: Callable) -> sources.Documents:
  """The chats."""
  format_, rows, _ = KINDS['chat']
  data = config_of(WAYS['.jsonl'](rows), 'a.jsonl', format_)
  return sources.open_documents(data, 'train')


@pytest.mark.parametrize('ending', WAYS)
@pytest.mark.parametrize('kind', KINDS)
def test_rows_are_rendered(kind: str, ending: str, config_of: Callable) -> None:
  format_, rows, expected = KINDS[kind]
  data = config_of(WAYS[ending](rows), f'a{ending}', format_)
  documents = sources.open_documents(data, 'train')
  assert documents.parts(0, len(documents)) == expected
  texts = [''.join(text for text, _ in parts) for parts in expected]
  assert documents.read(0, len(documents)) == texts
  again = pickle.loads(pickle.dumps(documents))  # as helpers get them
  assert again.parts(0, len(again)) == expected


def _stream(
  examples: Iterable[list], encode: Callable, eos: int = EOS
) -> np.ndarray:
  """[tokens, 2]: ids, and whether each is to be predicted, part by part."""
  stream = [(eos, True)]
  for parts in examples:
    for text, response in parts:
      stream += [(int(i), response) for i in encode(text)]
      stream += [(eos, True)] * response  # the last one separates documents
  return np.array(stream)


class _Pairs(tokenizers.ByteTokenizer):
  """Makes a token of two bytes: encoded whole, boundaries would be lost."""

  name, vocab_size = 'pairs', 300

  def encode(self, text: str) -> np.ndarray:
    values = text.encode()
    pairs = itertools.zip_longest(values[::2], values[1::2], fillvalue=5)
    return np.array([(7 * a + b) % EOS for a, b in pairs], np.int32)


def _subwords() -> tokenizers.Tokenizer:
  return subwords.HuggingFaceTokenizer(vocabularies.content('bpe'))


@pytest.mark.parametrize('kind', ['alpaca', 'chat'])
@pytest.mark.parametrize('make', [tokenizers.ByteTokenizer, _Pairs, _subwords])
def test_targets_are_responses_and_what_ends_them(
  kind: str, make: Callable, config_of: Callable
) -> None:
  format_, rows, expected = KINDS[kind]
  data = config_of(WAYS['.jsonl'](rows), 'a.jsonl', format_)
  tokenizer = make()
  sequences = pipeline.TokenSequences.open(data, 'train', tokenizer)
  stream = _stream(expected, tokenizer.encode, tokenizer.eos_id)
  for begin in range(0, len(stream), 7):
    read = sequences.read(begin, 16)
    count = min(16, len(stream) - 1 - begin)
    assert read['padding_mask'].sum() == count
    np.testing.assert_array_equal(
      read['token_ids'][:count], stream[begin : begin + count, 0]
    )
    for key, column in ('targets', 0), ('target_mask', 1):
      np.testing.assert_array_equal(
        read[key][:count], stream[begin + 1 : begin + count + 1, column]
      )
      assert not read[key][count:].any()
    assert read['target_mask'].dtype == bool
  assert sequences.num_tokens == len(stream) - 1
  assert sequences.num_targets == stream[1:, 1].sum()
  of_responses = [t.encode() for e in expected for t, response in e if response]
  assert sequences.num_target_bytes == sum(map(len, of_responses))
  every = b''.join(t.encode() for e in expected for t, _ in e)
  assert sequences.num_bytes == len(every)


@pytest.mark.parametrize('order', ['shuffled', 'contiguous', 'packed'])
def test_every_target_once_whatever_the_order(
  order: str, documents: sources.Documents
) -> None:
  sequences = pipeline.TokenSequences(documents, tokenizers.ByteTokenizer(), 64)
  batches = pipeline.eval_batches(
    sequences, batch_size=2, rows=range(2), order=order
  )
  found = []
  for batch in batches:
    mask = batch['target_mask']
    assert not (mask & ~batch['padding_mask']).any()
    found += batch['targets'][mask].tolist()
  predicted = _stream(CHAT, tokenizers.ByteTokenizer().encode)[1:]
  assert sorted(found) == sorted(predicted[predicted[:, 1] == 1, 0])


def test_packed_examples_are_segments_of_their_own(
  documents: sources.Documents,
) -> None:
  tokenizer = tokenizers.ByteTokenizer()
  sequences = pipeline.TokenSequences(documents, tokenizer, 160)
  mixture = Mixture.of_one(sequences, order='packed', batch_size=1)
  stream = pipeline.train_batches(mixture, rows=[0], seed=0, start=0, threads=0)
  batch = {key: array[0] for key, array in next(stream).items()}
  ids = batch['segment_ids']
  assert ids.max() == len(CHAT)
  for number in range(1, len(CHAT) + 1):
    here = ids == number
    whole = np.stack([batch['targets'][here], batch['target_mask'][here]], 1)
    expected = (_stream([parts], tokenizer.encode)[1:] for parts in CHAT)
    assert any(np.array_equal(whole, each) for each in expected)


def test_words_have_a_vocabulary_of_examples(config_of: Callable) -> None:
  data = config_of(WAYS['.jsonl'](ROWS), 'a.jsonl', 'alpaca')
  data.tokenizer = 'words'
  tokenizer = tokenizers.build(data)
  sequences = pipeline.TokenSequences.open(data, 'train', tokenizer)
  read = sequences.read(0, 16)
  assert read['padding_mask'].all()
  # `1, 2` comes before `3`, its end of a line and the end of the example.
  assert sequences.num_targets == 3 + 5 + 3
  assert {'Response:', '3', '\u2192'} <= set(tokenizer.index)


def test_classes_are_those_of_the_tokens(documents: sources.Documents) -> None:
  sequences = pipeline.TokenSequences(documents, tokenizers.ByteTokenizer(), 64)
  same = sequences.of_classes(tokenizers.ByteTokenizer())
  for i in range(len(sequences)):
    for key, array in sequences[i].items():
      np.testing.assert_array_equal(same[i][key], array)


def test_the_mask_is_of_the_hash_and_checked(
  documents: sources.Documents,
) -> None:
  tokenizer = tokenizers.ByteTokenizer()
  sequences = pipeline.TokenSequences(documents, tokenizer, 64)
  stream = _stream(CHAT, tokenizer.encode)
  again = pipeline.TokenSequences(documents, tokenizer, 64)
  again._cache.targets = lambda begin, end: stream[begin:end, 0] < 0
  assert again.digest() != sequences.digest()
  [path] = pathlib.Path(documents.folder).rglob('*.ids')
  content = bytearray(path.read_bytes())
  content[2 * 20] ^= 1  # the bit of a token that is a target or is not
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match='is damaged: its block 0'):
    TokenCache.open(documents, tokenizer).read(0, 30)


def test_another_format_or_template_is_other_data(
  config_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
  row = ROWS[0] | {'messages': _messages()[0], 'text': 'a text'}
  found = []
  for format_ in ('text', 'alpaca', 'chat'):
    data = config_of(WAYS['.jsonl']([row]), 'a.jsonl', format_)
    tokenizer = tokenizers.ByteTokenizer()
    sequences = pipeline.TokenSequences.open(data, 'train', tokenizer)
    assert ('target_mask' in sequences[0]) == (format_ != 'text')
    assert (sequences.num_targets == sequences.num_tokens) == (
      format_ == 'text'
    )
    found.append(sequences.fingerprint())
  formats = instructions.FORMATS
  other = formats['chat']._replace(template='another')
  monkeypatch.setitem(formats, 'chat', other)
  again = sources.open_documents(data, 'train').full_name
  assert len({again, *(each['name'] for each in found)}) == 4
  assert len({each['content'] for each in found}) == 3


def test_what_has_no_response_is_left_out_and_told(
  config_of: Callable, capsys: pytest.CaptureFixture
) -> None:
  rows = [*ROWS, ROWS[0] | {'output': ' \n'}, ROWS[0] | {'output': '\ud800'}]
  data = config_of(WAYS['.jsonl'](rows), 'a.jsonl', 'alpaca')
  assert len(sources.open_documents(data, 'train')) == 3
  said = capsys.readouterr().err
  assert "1 skipped: an empty 'output' (train/a.jsonl:4)" in said
  assert '1 skipped: half a surrogate pair (train/a.jsonl:5)' in said
  chats = [
    {'messages': []},
    {'messages': [{'role': 'user', 'content': 'x'}]},
    {'messages': [{'role': 'assistant', 'content': ''}]},
    {'messages': _messages()[0]},
  ]
  data = config_of(WAYS['.jsonl'](chats), 'a.jsonl', 'chat')
  assert len(sources.open_documents(data, 'train')) == 1
  said = capsys.readouterr().err
  assert '2 skipped: no message of the assistant (first ' in said
  assert '1 skipped: an empty message of the assistant (' in said


def test_files_beside_them_that_are_no_rows(
  config_of: Callable, capsys: pytest.CaptureFixture
) -> None:
  config_of(b'what this is', 'README.md', 'alpaca')
  data = config_of(WAYS['.jsonl'](ROWS), 'a.jsonl', 'alpaca')
  assert len(sources.open_documents(data, 'train')) == 3
  said = '1 skipped: a file is not JSON lines, JSON or parquet (train/READ'
  assert said in capsys.readouterr().err


def _message(**changes: object) -> list[dict]:
  return [{'messages': [{'role': 'user', 'content': 'x'} | changes]}]


MISTAKES = {
  'no field': ('alpaca', [{'instruction': 'a', 'outputs': 'b'}], '.jsonl'),
  'no column': ('alpaca', [{'instruction': 'a', 'outputs': 'b'}], '.parquet'),
  'no messages': ('chat', [{'message': 'a'}], '.jsonl'),
  'a number': ('alpaca', [ROWS[0], ROWS[0] | {'output': 3}], '.jsonl'),
  'an item': ('alpaca', [ROWS[0] | {'input': ['a']}], '.json'),
  'a cell': ('alpaca', [ROWS[0] | {'instruction': 1.5}], '.parquet'),
  'null': ('alpaca', [ROWS[0] | {'instruction': None}], '.jsonl'),
  'no object': ('alpaca', ['a'], '.jsonl'),
  'a role': ('chat', _message(role='tool'), '.jsonl'),
  'no role': ('chat', _message(role=None), '.jsonl'),
  'no text': ('chat', _message(content=[{'type': 'image'}]), '.jsonl'),
  'no list': ('chat', [{'messages': 'hello'}], '.jsonl'),
  'no message': ('chat', [{'messages': [5]}], '.jsonl'),
  'nothing': ('chat', [{'messages': None}], '.jsonl'),
}
SAID = {
  'no field': (
    "a.jsonl:1 has no output; did you mean 'outputs'? (there: instruction, o"
  ),
  'no column': "a.parquet has no output; did you mean 'outputs'? (there: ",
  'no messages': 'a.jsonl:1 has no messages (nor conversations); did you mean',
  'a number': "a.jsonl:2 has no text in 'output', but a number",
  'an item': "a.json:item 1 has no text in 'input', but a list",
  'a cell': "a.parquet:row 1 has no text in 'instruction', but a number",
  'null': "a.jsonl:1 has no text in 'instruction', but null",
  'no object': 'a.jsonl:1 is no object with fields, but a text',
  'a role': (
    "a.jsonl:1 has the role 'tool' in messages[1]; the roles are system, user,"
  ),
  'no role': 'a.jsonl:1 has no text in messages[1].role, but null',
  'no text': 'a.jsonl:1 has no text in messages[1].content, but a list',
  'no list': "a.jsonl:1 has no list in 'messages', but a text",
  'no message': 'a.jsonl:1 has no object in messages[1], but a number',
  'nothing': "a.jsonl:1 has no list in 'messages', but null",
}


@pytest.mark.parametrize('kind', MISTAKES)
def test_mistakes_are_one_line_with_their_place(
  kind: str, config_of: Callable
) -> None:
  format_, rows, ending = MISTAKES[kind]
  data = config_of(WAYS[ending](rows), f'a{ending}', format_)
  with pytest.raises(errors.UserError) as caught:
    sources.open_documents(data, 'train')
  assert SAID[kind] in str(caught.value) and '\n' not in str(caught.value)


def test_text_in_parquet_that_is_not_utf8(config_of: Callable) -> None:
  content = _parquet([ROWS[0] | {'output': 'zzzz'}, ROWS[1]])
  content = content.replace(b'zzzz', b'zz\xffz')
  data = config_of(content, 'a.parquet', 'alpaca')
  with pytest.raises(errors.UserError, match='row group 0|:row 1 is not UTF-8'):
    sources.open_documents(data, 'train')


def test_hugging_face(
  data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  class Rows(list):
    column_names = tuple(ROWS[0])

    def select_columns(self, names: list[str]) -> 'list[dict]':
      assert names == ['instruction', 'input', 'output']
      return [{name: row.get(name) for name in names} for row in self]

  rows = Rows(ROWS)
  monkeypatch.setattr(
    corpora.HuggingFace, '_load', lambda self: {'train': rows}
  )
  data = data_config(name='huggingface:owner/alpaca')
  data.format = 'alpaca'
  documents = sources.open_documents(data, 'train')
  assert documents.parts(0, 3) == ALPACA
  rows.append({'instruction': 1})
  data.name = 'huggingface:owner/other'
  with pytest.raises(errors.UserError, match=r'train:row 4 has no text in'):
    sources.open_documents(data, 'train')
