"""Sub-word tokenizers from files: Hugging Face's and SentencePiece's.

Ids are those of the library itself, without the special tokens that it would
put around a text. What a text spells like a special token is that token, as for
whoever reads an exported model with the same file.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import sentencepiece
import tokenizers as huggingface

from moe_jax import errors, files

# What models call the token that ends a document, the likeliest first.
_EOS = (
  '</s>',
  '<|endoftext|>',
  '<|end_of_text|>',
  '<eos>',
  '<|eos|>',
  '[EOS]',
  '<｜end▁of▁sentence｜>',
  '<EOS>',
  '[SEP]',
)
ADDED_EOS = '<|endoftext|>'


class SubwordTokenizer:
  """A tokenizer that is a file; safe in threads and after a fork.

  Attributes:
    content: The bytes of the file.
    eos: The token that ends a document, as the file spells it; `ADDED_EOS`
      where it has none, whose id is then the one behind the last.
    has_eos: Whether the file has it.
    name, vocab_size, eos_id, fingerprint: As in `tokenizers.Tokenizer`.
  """

  kind: ClassVar[str]
  file_name: ClassVar[str]

  def __init__(self, content: bytes, ids: Mapping[str, int]) -> None:
    """Takes the file and its ids; ValueError if it has none."""
    if not ids:
      raise ValueError('it has no token')
    size = max(ids.values()) + 1
    self.content = content
    self.fingerprint = hashlib.sha256(content).hexdigest()
    self.name = f'{self.kind}-{self.fingerprint[:12]}'
    self.eos = next((name for name in _EOS if name in ids), ADDED_EOS)
    self.has_eos = self.eos in ids
    self.eos_id = ids.get(self.eos, size)
    self.vocab_size = max(size, self.eos_id + 1)

  def __reduce__(self) -> tuple[type, tuple[bytes]]:
    """Makes other processes read the file as this one did."""
    return type(self), (self.content,)

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32 [tokens].

    The bytes of half a character, at an end of a split, are read as U+FFFD.

    Raises:
      UserError: The tokenizer has no id for a part of the text.
    """
    try:
      data = text.encode(errors='surrogateescape')
      return np.array(self._encoded(data.decode(errors='replace')), np.int32)
    except Exception as error:  # the libraries raise no narrower class
      raise errors.UserError(
        f'data.tokenizer: {self.name} cannot encode a text:'
        f' {errors.said(error)}; take a tokenizer that knows all bytes, or one'
        ' with an unknown token'
      ) from error

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; an `eos_id` between documents is dropped."""
    return self._decoded([int(i) for i in ids if i != self.eos_id])

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """Returns how the file spells each of `ids`."""
    return [self.eos if i == self.eos_id else self._piece(int(i)) for i in ids]

  def _encoded(self, text: str) -> list[int]:
    raise NotImplementedError

  def _decoded(self, ids: list[int]) -> str:
    raise NotImplementedError

  def _piece(self, i: int) -> str:
    raise NotImplementedError


class HuggingFaceTokenizer(SubwordTokenizer):
  """A `tokenizer.json`, read by the package `tokenizers`."""

  kind, file_name = 'huggingface', 'tokenizer.json'

  def __init__(self, content: bytes) -> None:
    """Reads the bytes of a file; raises what the library does."""
    # Its own threads deadlock after a fork; ours and other processes do not.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    self._tokenizer = huggingface.Tokenizer.from_str(content.decode('utf-8'))
    # A file may ask for them, and a document is neither cut nor filled up.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    super().__init__(content, self._tokenizer.get_vocab())

  def with_eos(self) -> bytes:
    """Returns the file, with the token that ends a document."""
    if self.has_eos:
      return self.content
    whole = huggingface.Tokenizer.from_str(self.content.decode('utf-8'))
    whole.add_special_tokens([self.eos])
    return whole.to_str(pretty=True).encode()

  def _encoded(self, text: str) -> list[int]:
    # `encode` also finds where in the text each token lies, and takes longer.
    made = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return made[0].ids

  def _decoded(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _piece(self, i: int) -> str:
    return self._tokenizer.id_to_token(i) or ''


class SentencePieceTokenizer(SubwordTokenizer):
  """A SentencePiece `.model`, read by the package `sentencepiece`."""

  kind, file_name = 'sentencepiece', 'tokenizer.model'

  def __init__(self, content: bytes) -> None:
    """Reads the bytes of a file; raises what the library does."""
    self._model = sentencepiece.SentencePieceProcessor()
    self._model.LoadFromSerializedProto(content)
    size = self._model.get_piece_size()
    super().__init__(content, {self._piece(i): i for i in range(size)})
    named = self._model.eos_id()
    if named >= 0:
      self.eos, self.has_eos, self.eos_id = self._piece(named), True, named
      self.vocab_size = size

  def _encoded(self, text: str) -> list[int]:
    return self._model.encode(text, add_bos=False, add_eos=False)

  def _decoded(self, ids: list[int]) -> str:
    return self._model.decode(ids)

  def _piece(self, i: int) -> str:
    return self._model.id_to_piece(i)


_KINDS: dict[str, type[HuggingFaceTokenizer | SentencePieceTokenizer]] = {
  kind.file_name: kind
  for kind in (HuggingFaceTokenizer, SentencePieceTokenizer)
}


def load(path: str, key: str = 'data.tokenizer') -> SubwordTokenizer:
  """Returns the tokenizer in a file, by the ending of its name.

  Args:
    path: A name of which `files.tokenizer_file` is not ''.
    key: What names the file, for the message.

  Raises:
    UserError: The file cannot be read, is damaged or of another kind.
  """
  path, where = files.expand(path), f'{key} = {path!r}'
  try:
    files.check_regular(path)
    with open(path, 'rb') as file:
      content = file.read()
  except OSError as error:
    raise errors.UserError(
      f'{where} cannot be read: {error.strerror}; give the path of a'
      ' tokenizer.json of Hugging Face or of a SentencePiece .model'
    ) from error
  kind = _KINDS[files.tokenizer_file(path)]
  try:
    return kind(content)
  except Exception as error:  # the libraries raise no narrower class
    raise errors.UserError(
      f'{where} is damaged, or no {kind.file_name} as {kind.kind} has it:'
      f' {errors.said(error)[:200]}'
    ) from error
