"""How long every document of a split is: what random access by token needs."""

import contextlib
import os
import urllib.parse
import uuid

import numpy as np
from etils import epath

from moe_jax import errors
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer


def document_lengths(documents: Documents, tokenizer: Tokenizer) -> np.ndarray:
  """Returns int64 [documents, 2]: tokens and UTF-8 bytes of every document.

  The first call reads the whole split and leaves the result beside the
  prepared data set, for the next run and for other processes.

  Raises:
    UserError: a document is not UTF-8, or all of them are empty.
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
  for i in range(len(documents)):
    text = documents[i]
    num_bytes = len(text.encode(errors='surrogateescape'))
    measured[i] = len(tokenizer.encode(text)), num_bytes
  if not measured.any():
    raise errors.UserError(
      f'split {documents.split!r} of {documents.full_name} holds no text:'
      f' its {len(documents)} documents are empty'
    )
  return measured


def _path(documents: Documents, tokenizer: Tokenizer) -> epath.Path:
  """Returns the file of this split, feature and tokenizer."""
  parts = (documents.split, documents.text_key, tokenizer.name)
  name = '-'.join(urllib.parse.quote(part, safe='') for part in parts)
  return documents.folder / f'lengths-{name}.npy'


def _load(path: epath.Path, documents: int) -> np.ndarray | None:
  """Returns what an earlier run saved, None if it cannot be used."""
  try:
    with path.open('rb') as file:
      found = np.load(file)
  except (OSError, EOFError, ValueError):
    return None
  return found if found.shape == (documents, 2) else None


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
