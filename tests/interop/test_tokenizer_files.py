"""Exported tokenizers, and transformers' reading of them where installed."""

import json
import random
from pathlib import Path

import pytest
import tokenizers as huggingface
from absl import flags

from moe_jax.data import subwords, tokenizers, vocabulary
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.interop import tokenizer_files
from moe_jax.programs import generate
from tests.helpers import vocabularies


def random_text(seed: int) -> str:
  rng = random.Random(seed)
  ranges = (0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)
  return ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(300))


TEXTS = ('', ' a  b\n\n', *vocabularies.TEXTS[:3], *map(random_text, range(30)))


def without_eos() -> subwords.HuggingFaceTokenizer:
  values = json.loads(vocabularies.content('bpe'))
  values['added_tokens'] = []
  vocabulary = values['model']['vocab']
  vocabulary['other'] = vocabulary.pop('<|endoftext|>')
  return subwords.HuggingFaceTokenizer(json.dumps(values).encode())


TOKENIZERS = {
  'bytes': tokenizers.ByteTokenizer,
  'bpe': lambda: subwords.HuggingFaceTokenizer(vocabularies.content('bpe')),
  'bpe, no eos': without_eos,
  'unigram': lambda: subwords.SentencePieceTokenizer(
    vocabularies.content('unigram')
  ),
}


def test_bytes_are_the_bytes_of_utf8() -> None:
  made = huggingface.Tokenizer.from_str(tokenizer_files.of_bytes().decode())
  ours = tokenizers.ByteTokenizer()
  for text in TEXTS:
    ids = made.encode(text).ids
    assert ids == ours.encode(text).tolist()
    assert made.decode(ids) == text
  assert made.get_vocab_size() == ours.vocab_size
  assert made.token_to_id(subwords.ADDED_EOS) == ours.eos_id


def test_a_tokenizer_json_is_written_as_it_is(tmp_path: Path) -> None:
  tokenizer = TOKENIZERS['bpe']()
  name = tokenizer_files.write(tmp_path, tokenizer, 64)
  assert (tmp_path / name).read_bytes() == vocabularies.content('bpe')
  said = json.loads((tmp_path / 'generation_config.json').read_text())
  ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), 0)
  assert ids.items() <= said.items()
  assert said['max_length'] == 64
  said = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert said['padding_side'] == 'left' and said['pad_token'] == '<|endoftext|>'


def test_sampling_is_that_of_the_program(tmp_path: Path) -> None:
  tokenizer_files.write(tmp_path, tokenizers.ByteTokenizer(), 64)
  said = json.loads((tmp_path / 'generation_config.json').read_text())
  values = flags.FlagValues()
  generate.define_flags(values)
  for name in ('temperature', 'top_k', 'top_p'):
    assert said[name] == values[name].default
  assert said['do_sample'] == (values['temperature'].default > 0)


def test_what_transformers_has_not_is_not_written(tmp_path: Path) -> None:
  words = vocabulary.WordTokenizer(['the', 'words'])
  assert tokenizer_files.write(tmp_path, words, 64) == ''
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('model_type', ['llama', 'mixtral', 'llama_moe_rnn'])
@pytest.mark.parametrize('name', TOKENIZERS)
def test_auto_tokenizer_makes_our_ids(
  name: str, model_type: str, tmp_path: Path
) -> None:
  transformers = pytest.importorskip('transformers')
  tokenizer: Tokenizer = TOKENIZERS[name]()
  tokenizer_files.write(tmp_path, tokenizer, 64)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    ids = tokenizer.encode(text).tolist()
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
  assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos_id
  assert theirs.pad_token_id == tokenizer.eos_id
  assert theirs.padding_side == 'left'
  assert len(theirs) == tokenizer.vocab_size
  assert theirs.model_max_length == 64
  config = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert config.eos_token_id == tokenizer.eos_id
