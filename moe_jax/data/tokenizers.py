"""Text to token ids and back."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from moe_jax import errors


class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer.

  Attributes:
    name: names the files that depend on it, so two tokenizers that encode
      differently have different names.
    vocab_size: every id is in [0, vocab_size).
    eos_id: the id that stands between documents; `encode` never makes it.
  """

  name: str
  vocab_size: int
  eos_id: int

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32 [tokens], without `eos_id`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, `eos_id` dropped."""


class ByteTokenizer:
  """One token per byte of the text's UTF-8, and one that ends a document."""

  name = 'bytes'
  vocab_size = 257
  eos_id = 256

  def encode(self, text: str) -> np.ndarray:
    """Returns the UTF-8 bytes of `text`, int32 [bytes]."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    kept = bytes(int(i) for i in ids if i != self.eos_id)
    return kept.decode(errors='replace')


TOKENIZERS = {ByteTokenizer.name: ByteTokenizer}


def build(name: str) -> Tokenizer:
  """Returns the tokenizer of that name; UserError if there is none."""
  return TOKENIZERS[errors.choose('data.tokenizer', name, TOKENIZERS)]()
