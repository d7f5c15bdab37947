import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import tokenizers

TEXT = 'def f(x):\n\treturn "αβ→ \U0001f600" \x00'


def test_ids_are_the_bytes_of_utf8() -> None:
  ids = tokenizers.ByteTokenizer().encode(TEXT)
  assert ids.dtype == np.int32
  assert ids.tolist() == list(TEXT.encode('utf-8'))


def test_round_trip_with_eos_dropped() -> None:
  tokenizer = tokenizers.ByteTokenizer()
  ids = np.append(tokenizer.encode(TEXT), tokenizer.eos_id)
  assert tokenizer.decode(ids) == TEXT
  assert ids.max() < tokenizer.vocab_size


def test_half_a_character_is_replaced() -> None:
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizer.decode(tokenizer.encode('aβ')[:-1]) == 'a\ufffd'


def test_empty_text() -> None:
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizer.encode('').shape == (0,)
  assert tokenizer.decode([]) == ''


def test_unknown_tokenizer_names_the_nearest() -> None:
  with pytest.raises(errors.UserError, match="'byte' .*did you mean 'bytes'"):
    tokenizers.build(ConfigDict({'tokenizer': 'byte'}))
