"""The token ids of a split, written once and mapped into memory.

They lie beside the prepared data, in a folder of each split, text feature and
tokenizer. Its `plan.json` says which documents go into which file, `0000.ids`
and so on (`parts.py`); the split is whole when all of them are. Processes that
open one split at the same time, on however many hosts, each encode files that
no other one is at (`encoding.py`). What a killed run has left is gone on with,
and a file that is damaged is encoded again, and no other.

Of examples only responses are to be predicted. Which tokens these are is the
lowest bit of what is kept of each token; the others are its id.

A folder that may only be read is taken as it is where it is whole. Where it is
not, each process encodes into a temporary folder of its own, which has no name
any more once it is mapped.
"""

import bisect
import os
import tempfile
import urllib.parse

import numpy as np

from moe_jax import errors
from moe_jax.data.encoding import Encoding, Plan
from moe_jax.data.parts import Part, ReadOnlyError
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer


class TokenCache:
  """The stream of a split: `eos doc eos doc ... eos`, or `doc doc ... doc`.

  Attributes:
    lengths: Tokens and UTF-8 bytes of every document, int64 [documents, 2]; of
      examples [documents, 4], with the tokens and bytes to be predicted.
    starts: Where in the stream every document begins, with the separator before
      it, and where the last one ends; int64 [documents + 1].
    separated: Whether an `eos_id` stands before each document and at the end.
    masked: Whether the documents are examples.
  """

  def __init__(
    self, parts: list[Part], separated: bool, masked: bool = False
  ) -> None:
    """Joins the files of a split."""
    self._parts = parts
    self._begins = np.cumsum([0, *map(len, parts)]).tolist()
    self.lengths = np.concatenate([part.lengths for part in parts])
    self.separated = separated
    self.masked = masked
    sizes = self.lengths[:, 0] + separated
    self.starts = np.concatenate([[0], np.cumsum(sizes)])

  @classmethod
  def open(cls, documents: Documents, tokenizer: Tokenizer) -> 'TokenCache':
    """Returns the cache of a split; the first call encodes it.

    Raises:
      UserError: A document is not UTF-8, the tokenizer makes an id that it says
        it does not have, all documents are empty, or nothing can be written.
      RetryableError: The disk is full; what is whole will not be made again.
    """
    eos_id = None if documents.single_document else tokenizer.eos_id
    folder = os.path.join(
      os.fspath(documents.folder), _name(documents, tokenizer)
    )
    try:
      if '://' in folder:  # a bucket, of which nothing can be mapped
        raise ReadOnlyError(folder)
      parts = _parts(folder, documents, tokenizer, eos_id)
    except ReadOnlyError:
      with tempfile.TemporaryDirectory(prefix='moe_jax-ids-') as private:
        parts = _parts(private, documents, tokenizer, eos_id)
    found = cls(parts, eos_id is not None, documents.masked)
    if not found.lengths.any():
      raise errors.UserError(
        f'split {documents.split!r} of {documents.full_name} holds no text:'
        f' its {len(documents)} documents are empty'
      )
    return found

  def __len__(self) -> int:
    """Returns the number of tokens of the stream."""
    return self._begins[-1]

  def read(self, begin: int, end: int) -> np.ndarray:
    """Returns tokens [begin, end) of the stream, of an unsigned type.

    Raises:
      UserError: The file was damaged since it was written.
    """
    kept = self._kept(begin, end)
    return kept >> 1 if self.masked else kept

  def targets(self, begin: int, end: int) -> np.ndarray:
    """Returns which tokens [begin, end) of examples are to be predicted, bool.

    Raises:
      UserError: As `read`.
    """
    return (self._kept(begin, end) & 1).astype(bool)

  def _kept(self, begin: int, end: int) -> np.ndarray:
    """Returns what is kept of tokens [begin, end)."""
    k = min(bisect.bisect_right(self._begins, begin), len(self._parts)) - 1
    pieces: list[np.ndarray] = []
    while True:
      offset, next_ = self._begins[k], self._begins[k + 1]
      piece = self._parts[k].read(begin - offset, min(end, next_) - offset)
      if end <= next_ and not pieces:
        return piece
      pieces.append(piece)
      if end <= next_:
        return np.concatenate(pieces)
      begin, k = next_, k + 1


def _name(documents: Documents, tokenizer: Tokenizer) -> str:
  """Returns the name of the folder of this split, feature and tokenizer."""
  parts = [documents.split, documents.text_key, tokenizer.name]
  if tokenizer.fingerprint is not None:
    parts.append(tokenizer.fingerprint[:16])
  return 'ids-' + '-'.join(urllib.parse.quote(part, safe='') for part in parts)


def _parts(
  folder: str, documents: Documents, tokenizer: Tokenizer, eos_id: int | None
) -> list[Part]:
  """Returns the files of a folder, which are made if they are not there."""
  plan = Plan.of(folder, documents, tokenizer.vocab_size, eos_id)
  return Encoding(folder, documents, tokenizer, plan).parts()
