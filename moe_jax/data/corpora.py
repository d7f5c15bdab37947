"""TFDS builders of a user's files in any format, and of Hugging Face's data.

A document of files is a text, or the text of a row. A hash of it decides its
split, so that it stays there whatever file it comes in; where there is a folder
`train/`, the folders are the splits.
"""

import collections
import fnmatch
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from moe_jax import errors, files
from moe_jax.data import folders, formats, instructions, progress, records
from moe_jax.data.checks import one_line

HUGGING_FACE = 'huggingface:'

_FOLDERS = {
  'train': 'train',
  'validation': 'validation',
  'valid': 'validation',
  'val': 'validation',
  'dev': 'validation',
  'test': 'test',
}
# If there is no text in that many rows, there will be none in the rest.
_ROWS_WITHOUT = 1000
_LABELS = 8
_MOST_FIELDS = 50  # that a message lists
_OLDEST = 4  # of `datasets`: earlier ones run scripts of the Hub
_INSTALL = "pip install 'datasets>=4,<6'"


class Files(records.StreamedBuilder):
  """The documents of files: text, JSON lines, JSON, parquet; .gz and .zst."""

  def __init__(
    self,
    *,
    path: str,
    text_key: str,
    rows: str = 'text',
    **kwargs: object,
  ) -> None:
    """Finds the files.

    Args:
      path: A file, a folder or a pattern.
      text_key: The field or column of the text.
      rows: What rows are, as `data.format` says it.
      **kwargs: The options of a TFDS builder: data_dir, file_format.

    Raises:
      UserError: There is none, or `path` is not given.
    """
    if path == files.REQUIRED:
      raise errors.UserError(
        'data.path is not given: add --config.data.path=PATH, a file, a folder'
        ' or a pattern'
      )
    self._path = path
    self._rows, self.masked = rows, rows in instructions.FORMATS
    self._root, self._names = _find(path)
    if not self._names:
      raise errors.UserError(
        f'data.path = {path!r} has no text: name a file, a folder or a pattern'
        ' such as texts/*.jsonl.zst, with at least one file in it that is'
        ' neither hidden nor empty'
      )
    self._text_key = text_key
    self._by_folder = any(name.startswith('train/') for name in self._names)
    self._stamp = self._fingerprint()
    super().__init__(config=_config(self._stamp), **kwargs)

  def _fingerprint(self) -> str:
    """Returns what tells these files, read in this way, from any others."""
    found = folders.fingerprint(self._root, self._names, times=True)
    read = f'{found} {self._text_key}'
    if self.masked:
      read += f' {self._rows} {instructions.FORMATS[self._rows].template}'
    return hashlib.sha256(read.encode()).hexdigest()[:16]

  def _documents(self) -> Iterator[records.Named]:
    told = _Told(f'data.path = {self._path!r}', self._text_key)
    sizes = {n: (self._root / n).stat().st_size for n in self._names}
    told_bytes = progress.ByteProgress(self.info.full_name, sum(sizes.values()))
    done = 0
    for name, size in sizes.items():
      file = formats.File(self._root / name, name, self._text_key, self._rows)
      for place, text in self._of_file(file, name, told):
        told_bytes.tell(done + file.position)
        split = self._split(name, text)
        yield split, os.fsencode(f'{name}:{place}'), text
      done += size
    if self._fingerprint() != self._stamp:
      raise errors.UserError(
        f'data.path = {self._path!r} has changed while it was read; start again'
        ' when its files are written'
      )
    told.end()

  def _of_file(
    self, file: formats.File, name: str, told: '_Told'
  ) -> Iterator[tuple[str, bytes]]:
    """Yields the texts of a file, and counts what is left out."""
    if not self._split(name, b''):
      told.skip('a file beside train/', file.name)
      return
    try:
      for place, text in file.documents():
        if isinstance(text, formats.Skipped):
          told.skip(text, f'{file.name}:{place}', text.fields)
        else:
          told.documents += 1
          told.bytes += len(text)
          yield place, text
    except formats.NotText as error:
      if len(self._names) == 1:
        raise
      told.skip(f'a file is {error.reason}', error.place)
    else:
      told.labels[file.label] += 1

  def _split(self, name: str, text: bytes) -> str:
    """Returns the split of a text of that file; '' if it is in none."""
    if not self._by_folder:
      return folders.split_of(text)
    folder, _, below = name.partition('/')
    return _FOLDERS.get(folder, '') if below else ''


class HuggingFace(records.StreamedBuilder):
  """A text data set of the Hugging Face Hub; its code is never run."""

  def __init__(
    self,
    *,
    name: str,
    text_key: str,
    rows: str = 'text',
    **kwargs: object,
  ) -> None:
    """Describes the data set; nothing is asked of the Hub yet.

    Args:
      name: OWNER/NAME, or OWNER/NAME/CONFIG.
      text_key: The column of the text.
      rows: What rows are, as `data.format` says it.
      **kwargs: The options of a TFDS builder: data_dir, file_format.

    Raises:
      UserError: It is no such name.
    """
    if not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*){0,2}', name):
      raise errors.UserError(
        f'data.name = {HUGGING_FACE + name!r} is no name of a data set; write'
        f" '{HUGGING_FACE}OWNER/NAME' or '{HUGGING_FACE}OWNER/NAME/CONFIG'"
      )
    owner, _, rest = name.partition('/')
    name_, _, subset = rest.partition('/')
    self._repository = f'{owner}/{name_}' if name_ else owner
    self._subset = subset or None
    self._text_key = text_key
    self._format = instructions.FORMATS.get(rows)
    key = text_key
    if self._format:
      self.masked = True
      template = hashlib.sha256(self._format.template.encode()).hexdigest()
      key = f'{rows}-{template[:8]}'
    super().__init__(config=_config(f'{name}-{key}'), **kwargs)

  def _documents(self) -> Iterator[records.Named]:
    where = f'data.name = {HUGGING_FACE + self._repository!r}'
    told = _Told(where, self._text_key)
    try:
      for split, rows in self._load().items():
        wanted = self._format.fields if self._format else (self._text_key,)
        there = [name for name in wanted if name in (rows.column_names or ())]
        if there:
          rows = rows.select_columns(there)
        for number, row in enumerate(rows, 1):
          text = self._document(row, f'{where}: {split}:row {number}')
          if isinstance(text, formats.Skipped):
            told.skip(text, f'{split}:row {number}', text.fields)
            continue
          told.documents += 1
          told.bytes += len(text)
          yield split.replace('.', '_'), f'{split}:{number}'.encode(), text
    except (errors.UserError, MemoryError):
      raise
    except Exception as error:  # of a library that has many
      raise one_line(f'{where} cannot be read', error) from error
    told.end()

  def _document(self, row: object, where: str) -> bytes | formats.Skipped:
    try:
      return formats.document(row, self._text_key, self._format)
    except instructions.BadRow as error:
      raise errors.UserError(f'{where} {error}') from error

  def _load(self) -> Any:
    """Returns the rows of every split, which are read as they are used."""
    try:
      major = int(importlib.metadata.version('datasets').split('.')[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
      major = 0
    if major < _OLDEST:
      raise errors.UserError(
        f'data.name = {HUGGING_FACE + self._repository!r} needs the package'
        f' datasets, version {_OLDEST} or later, which runs no code of the'
        f' Hub; {_INSTALL}'
      )
    import datasets

    return datasets.load_dataset(self._repository, self._subset, streaming=True)


class _Told:
  """What was read and what was left out, for the user.

  Attributes:
    documents: How many there are.
    bytes: Their UTF-8 bytes.
    labels: How many files of a format there are.
  """

  def __init__(self, where: str, text_key: str) -> None:
    self.documents = self.bytes = 0
    self.labels: collections.Counter[str] = collections.Counter()
    self._where = where
    self._text_key = text_key
    self._skipped: collections.Counter[str] = collections.Counter()
    self._first: dict[str, str] = {}
    self._fields: dict[str, None] = {}
    self._began = time.monotonic()

  def skip(
    self, why: str, place: str, fields: tuple[str, ...] | None = None
  ) -> None:
    """Counts what is left out.

    Args:
      why: The reason, one of few.
      place: Where it is.
      fields: The names of the row, if it is one.

    Raises:
      UserError: Nothing was found yet, in many rows.
    """
    self._skipped[why] += 1
    self._first.setdefault(why, place)
    if fields is not None and len(self._fields) < _MOST_FIELDS:
      self._fields |= dict.fromkeys(fields)
    if not self.documents and self._skipped[why] == _ROWS_WITHOUT and fields:
      raise self._nothing()

  def end(self) -> None:
    """Prints what there was, and a line for each reason to leave things out.

    Raises:
      UserError: There was no document.
    """
    if not self.documents:
      raise self._nothing()
    seconds = max(time.monotonic() - self._began, 1e-6)
    counts = [f'{n:,} {label}' for label, n in self.labels.most_common()]
    others = [f'{len(counts) - _LABELS} other kinds'] * (len(counts) > _LABELS)
    labels = ', '.join(counts[:_LABELS] + others)
    print(
      f'read     {self._where}: {self.documents:,} documents,'
      f' {self.bytes:,} bytes'
      f'{f" (files: {labels})" if labels else ""},'
      f' {self.bytes / 1e6 / seconds:.1f} MB/s',
      *self._lines(),
      sep='\n         ',
      file=sys.stderr,
    )

  def _lines(self) -> list[str]:
    return [
      f'{n:,} skipped: {why} ({"" if n == 1 else "first "}{self._first[why]})'
      for why, n in self._skipped.most_common()
    ]

  def _nothing(self) -> errors.UserError:
    """Returns what is said where there is no document."""
    fields = [f for f in self._fields if f != self._text_key]
    key = f'data.text_key = {self._text_key!r}'
    near = errors.nearest(self._text_key, fields)
    listed = errors.printable(', '.join(fields), 400)
    named = f'; {key} is to name the text{near} (there: {listed})'
    return errors.UserError(
      f'{self._where} holds no document: '
      + ('; '.join(self._lines()) or 'its files are empty')
      + (named if fields else '')
    )


def _config(key: str) -> tfds.core.BuilderConfig:
  return tfds.core.BuilderConfig(name=re.sub(r'[^\w.-]', '_', key))


def _find(path: str) -> tuple[pathlib.Path, list[str]]:
  """Returns a root and the files that a path names, relative to it.

  Raises:
    UserError: There is nothing of that name.
  """
  given = files.expand(path)
  what = f'data.path = {path!r}'
  if os.path.isdir(given):
    folder = pathlib.Path(given)
    return folder, list(folders.find_files(folder, links=True))
  if not os.path.lexists(given) and glob.escape(given) != given:
    found = _matching(given)
    if not found[1]:
      raise errors.UserError(
        f'{what} matches no file that has something in it'
        + ('; write [[] for a [ in a name' if '[' in given else '')
      )
    return found
  try:
    files.check_regular(given)
  except OSError as error:
    raise errors.UserError(
      f"{what} cannot be read: {error.strerror}; data.name = 'files' reads a"
      ' file, a folder or a pattern such as texts/*.jsonl.zst'
    ) from error
  parent, name = os.path.split(given)
  return pathlib.Path(parent or '.'), [name] if os.path.getsize(given) else []


def _matching(pattern: str) -> tuple[pathlib.Path, list[str]]:
  """Returns what a pattern matches, and what is below the folders among it.

  Not by `glob` alone, which goes in circles where links do.
  """
  parts = pattern.split('/')
  fixed = next(i for i, p in enumerate(parts) if glob.escape(p) != p)
  deep = parts.index('**') if '**' in parts else len(parts)
  root = _joined(parts[:fixed])
  names = set()
  for start in glob.glob(_joined(parts[:deep])):
    if os.path.isfile(start) and os.path.getsize(start):
      names.add(os.path.relpath(start, root))
    elif os.path.isdir(start):
      rest = ['**', *(parts[deep + 1 :] or ['*'])]
      for name in folders.find_files(pathlib.Path(start), links=True):
        if _fits(name.split('/'), rest):
          names.add(os.path.relpath(os.path.join(start, name), root))
  return pathlib.Path(root), sorted(names)


def _joined(parts: list[str]) -> str:
  """Returns the path of these parts: / of the empty one, . of none."""
  return '/'.join(parts) or ('/' if parts else '.')


def _fits(parts: list[str], patterns: list[str]) -> bool:
  """Returns whether a name fits a pattern, both in parts."""
  if not patterns:
    return not parts
  if patterns[0] == '**':
    return any(_fits(parts[i:], patterns[1:]) for i in range(len(parts)))
  return (
    bool(parts)
    and fnmatch.fnmatchcase(parts[0], patterns[0])
    and _fits(parts[1:], patterns[1:])
  )
