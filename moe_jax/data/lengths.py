"""How long every document of a split is: what random access by token needs."""

import contextlib
import os
import urllib.parse
import uuid

import numpy as np
from etils import epath

from moe_jax import errors
from moe_jax.data.progress import counted
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer


def document_lengths(documents: Documents, tokenizer: Tokenizer) -> np.ndarray:
  """Returns int64 [documents, 2]: tokens and UTF-8 bytes of every document.

  The first call reads the whole split and leaves the result beside the
  prepared data set, for the next run and for other processes.

  Raises:
    UserError: A document is not UTF-8, or all of them are empty.
  """
  path = _path(documents, tokenizer)
  found = _load(path, len(documents))
  if found is None:
    found = _measure(documents, tokenizer)
    _save(path, found)
  return found


def _measure(documents: Documents, tokenizer: Tokenizer) -> np.ndarray:
  """Reads every document once."""
  measured = np.zeros((len(documents), 2), np.int64)
  what = f'the lengths of {documents.full_name}, split {documents.split}'
  for i in counted(what, range(len(documents))):
    text = documents[i]
    ids = tokenizer.encode(text)
    _check_ids(ids, tokenizer)
    num_bytes = len(text.encode(errors='surrogateescape'))
    measured[i] = len(ids), num_bytes
  if not measured.any():
    raise errors.UserError(
      f'split {documents.split!r} of {documents.full_name} holds no text:'
      f' its {len(documents)} documents are empty'
    )
  return measured


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
  """Refuses ids that the model would not have, and that would wrap around."""
  if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
    raise errors.UserError(
      f'data.tokenizer = {tokenizer.name!r} makes ids from {ids.min()} to'
      f' {ids.max()}, and says that it has {tokenizer.vocab_size}: 0 to'
      f' {tokenizer.vocab_size - 1}; mend one of them'
    )


def _path(documents: Documents, tokenizer: Tokenizer) -> epath.Path:
  """Returns the file of this split, feature and tokenizer."""
  parts = [documents.split, documents.text_key, tokenizer.name]
  if tokenizer.fingerprint is not None:
    parts.append(tokenizer.fingerprint[:16])
  name = '-'.join(urllib.parse.quote(part, safe='') for part in parts)
  return documents.folder / f'lengths-{name}.npy'


def _load(path: epath.Path, documents: int) -> np.ndarray | None:
  """Returns what an earlier run saved, None if it cannot be used."""
  try:
    with path.open('rb') as file:
      found = np.load(file)
  except (OSError, EOFError, ValueError):
    return None
  right = found.shape == (documents, 2) and found.dtype == np.int64
  return found if right and (found >= 0).all() else None


def _save(path: epath.Path, measured: np.ndarray) -> None:
  """Saves in one move, so that no process reads half a file."""
  aside = path.parent / f'{path.name}.{os.getpid()}-{uuid.uuid4().hex}'
  try:
    with aside.open('wb') as file:
      np.save(file, measured)
    aside.replace(path)
  except OSError:
    # A data folder that may only be read: every run measures anew.
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)
