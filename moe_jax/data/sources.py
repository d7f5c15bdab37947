"""Documents by the name of their data set, read at random from ArrayRecord.

`python_stdlib`, `python_docs` and `text_folder` (`folders.py`), `files` and
`huggingface:NAME` (`corpora.py`), `enwik8` and `wikitext103` (`texts.py`) are
ours; any other name is TFDS's own. TensorFlow is not imported for any of this.

A user's own is a function of `config.data` and of the options of a TFDS builder
that returns one, registered in a config file:

  @DATA_SOURCES.register('mine')
  def mine(data, **options):
    return GivenTexts({'train': [...]}, key='mine-1', **options)
"""

import contextlib
import dataclasses
import errno
import importlib
import io
import logging
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict
from tensorflow_datasets.core.utils import file_utils

from moe_jax import disk, errors, files
from moe_jax.data import corpora, folders, texts
from moe_jax.data.checks import (
  check_features,
  check_name,
  one_line,
  prepared_files,
  undamaged,
)
from moe_jax.data.folders import GivenTexts
from moe_jax.data.instructions import Part, parts_of
from moe_jax.registry import DATA_SOURCES

__all__ = [
  'DATA_SOURCES',
  'Documents',
  'GivenTexts',
  'open_documents',
  'open_splits',
]

# Where TFDS keeps the builders of text; it stops registering at the first area
# whose own dependencies are missing, which may come before these.
_TEXT_AREAS = ('text', 'summarization', 'question_answering', 'translate')


DATA_SOURCES.register('python_stdlib')(
  lambda data, **options: folders.PythonStdlib(**options)
)
DATA_SOURCES.register('python_docs')(
  lambda data, **options: folders.PythonDocs(**options)
)
DATA_SOURCES.register('text_folder')(
  lambda data, **options: folders.TextFolder(path=data.path, **options)
)
DATA_SOURCES.register('files')(
  lambda data, **options: corpora.Files(
    path=data.path,
    text_key=data.text_key,
    rows=data.format,
    **options,
  )
)
DATA_SOURCES.register('enwik8')(
  lambda data, **options: texts.Enwik8(path=data.path, **options)
)
DATA_SOURCES.register('wikitext103')(
  lambda data, **options: texts.Wikitext103(path=data.path, **options)
)


@dataclasses.dataclass(frozen=True)
class Documents:
  """The texts of one split, by number; safe to read from several threads.

  Attributes:
    records: The split's examples, each a dict with `text_key` as bytes.
    full_name: The data set, its config and version.
    split: The split, in TFDS's notation.
    text_key: The feature that holds the text.
    folder: Where the prepared data set lies.
    single_document: Whether the documents are pieces of one text, with nothing
      in between. Where its split begins or ends inside a character, the bytes
      of that are escaped: `encode(errors='surrogateescape')` gives them back.
    masked: Whether the documents are examples, of which only responses are to
      be predicted.
  """

  records: Sequence[dict]
  full_name: str
  split: str
  text_key: str
  folder: epath.Path
  single_document: bool
  masked: bool = False

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, i: int) -> str:
    """Returns document `i`.

    Raises:
      UserError: Its text is not UTF-8, or the prepared data is damaged.
    """
    return self.read(i, i + 1)[0]

  def read(self, begin: int, end: int) -> list[str]:
    """Returns documents [begin, end): faster than one by one if they are small.

    Raises:
      UserError: As `__getitem__`.
    """
    return [text for text, _ in self._read(begin, end)]

  def parts(self, begin: int, end: int) -> list[list[Part]]:
    """Returns documents [begin, end) in the parts that are encoded apart.

    Raises:
      UserError: As `__getitem__`.
    """
    found = self._read(begin, end)
    if not self.masked:
      return [[(text, False)] for text, _ in found]
    return [
      parts_of(text, [int(place) for place in record['responses'].split()])
      for text, record in found
    ]

  def _read(self, begin: int, end: int) -> list[tuple[str, dict]]:
    """Returns texts, and the records that they are of."""
    numbers = range(begin, end)
    with undamaged(self.folder):
      together = getattr(self.records, '__getitems__', None)
      if together is None or len(numbers) == 1:
        found = [self.records[i] for i in numbers]
      else:
        found = together(numbers)
      for i, record in zip(numbers, found, strict=True):
        if record[self.text_key] is None:
          raise EOFError(f'document {i} of split {self.split!r} is not there')
    return [
      (self._text(i, record), record)
      for i, record in zip(numbers, found, strict=True)
    ]

  def _text(self, i: int, record: dict) -> str:
    """Returns the text of an example."""
    mistakes = 'surrogateescape' if self.single_document else 'strict'
    try:
      return record[self.text_key].decode(errors=mistakes)
    except UnicodeDecodeError as error:
      name = record.get('name', b'').decode(errors='backslashreplace')
      label = f'document {i}' + (f' ({name})' if name else '')
      raise errors.UserError(
        f'{self.full_name}, split {self.split!r}: {label} is not UTF-8 at byte'
        f' {error.start} (0x{error.object[error.start]:02x});'
        ' save its text as UTF-8'
      ) from error

  def __reduce__(self) -> tuple[Callable, tuple]:
    """Pickles where the documents lie: a builder of TFDS cannot be pickled."""
    return _reopened, (
      self.full_name,
      self.split,
      self.text_key,
      self.folder,
      self.single_document,
      self.masked,
    )


def _reopened(*described: object) -> Documents:
  """Returns pickled documents, read from the same folder.

  Raises:
    UserError: What is prepared there cannot be read, or names other modules.
  """
  found = Documents((), *described)  # type: ignore[arg-type]
  check_features(pathlib.Path(found.folder) / 'features.json')
  with undamaged(found.folder):
    builder = tfds.builder_from_directory(found.folder)
    return dataclasses.replace(
      found, records=builder.as_data_source(found.split)
    )


def open_documents(data: ConfigDict, split: str) -> Documents:
  """Returns the documents of a split, preparing the data set if needed.

  Processes that start together on one shared folder may each prepare the data;
  the first to finish is kept and the others use it.

  Args:
    data: The section `config.data`: name, dir, path, text_key, format,
      allow_community.
    split: A split in TFDS's notation: 'train', 'train[:10%]', 'train+test'.

  Raises:
    UserError: The data set, split or text feature is not known, is empty, or
      could not be prepared; or what was prepared earlier is damaged.
  """
  with _quiet():
    builder = _prepared(data)
    _check_split(builder, split)
    text_key, masked = data.text_key, False
    if isinstance(builder, corpora.Files | corpora.HuggingFace):
      # It has chosen among the fields of the source already.
      text_key, masked = 'text', builder.masked
    _check_text_key(builder, text_key)
    with undamaged(builder.data_path):
      examples = builder.as_data_source(split)
  info = builder.info
  return Documents(
    examples,
    info.full_name,
    split,
    text_key,
    builder.data_path,
    is_one_text(data),
    masked,
  )


def is_one_text(data: ConfigDict) -> bool:
  """Returns whether all documents of a data set are pieces of one text."""
  return data.name in texts.BUILDERS


def open_splits(data: ConfigDict) -> list[Documents]:
  """Returns every split of a data set: train, validation, test, then others.

  Raises:
    UserError: As `open_documents`.
  """
  with _quiet():
    names = list(_prepared(data).info.splits)
  order = {name: i for i, name in enumerate(texts.SPLITS)}
  names.sort(key=lambda name: (order.get(name, len(order)), name))
  return [open_documents(data, name) for name in names]


def _prepared(data: ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the builder of a data set that is on disk."""
  builder = _builder(data)
  if not builder.is_prepared():
    _prepare(builder, data)
    # A builder reads what is prepared only when it is made.
    builder = _builder(data)
  if not builder.info.splits:
    with undamaged(builder.data_path):
      raise FileNotFoundError('its dataset_info.json names no split')
  return builder


def _builder(data: ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the builder that the config names; UserError if there is none."""
  own = data.name in DATA_SOURCES
  make = DATA_SOURCES[data.name] if own else _registered
  where = files.expand(data.dir) or None
  if where:
    files.refuse_ambiguous('data.dir', where)
  try:
    return make(data, data_dir=where, file_format='array_record')
  except errors.UserError:
    raise
  except OSError as error:
    raise one_line(
      f'data.name = {data.name!r} cannot be read', error
    ) from error
  except Exception as error:  # of the parsers of what is prepared
    folder = _folder(make, data) if own else None
    if folder is None or not folder.exists():
      raise
    with undamaged(folder):
      raise error


def _folder(make: Callable, data: ConfigDict) -> epath.Path | None:
  """Returns where a data set is prepared; None if its maker fails anyway."""
  root = file_utils.list_data_dirs(files.expand(data.dir) or None)[0]
  with tempfile.TemporaryDirectory() as empty:
    try:
      elsewhere = make(data, data_dir=empty, file_format='array_record')
    except Exception:  # whatever it is, it is not of damaged files
      return None
    return epath.Path(root) / elsewhere.data_path.relative_to(empty)


def _registered(
  data: ConfigDict, **kwargs: str | None
) -> tfds.core.DatasetBuilder:
  """Returns TFDS's builder of that name, from its code or prepared files."""
  if data.name.startswith(corpora.HUGGING_FACE):
    name = data.name.removeprefix(corpora.HUGGING_FACE)
    return corpora.HuggingFace(
      name=name, text_key=data.text_key, rows=data.format, **kwargs
    )
  for area in _TEXT_AREAS:
    importlib.import_module(f'tensorflow_datasets.{area}')
  where = f'data.name = {data.name!r}'
  try:
    check_name(data, kwargs['data_dir'])
    return tfds.builder(data.name, **kwargs)
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    raise errors.UserError(
      f'{where} is not known'
      f'{errors.nearest(data.name, [*DATA_SOURCES, *known])}'
      f' ({", ".join(DATA_SOURCES)}, or one of {len(known)} TFDS data sets)'
    ) from error
  except (OSError, errors.UserError):
    raise
  except Exception as error:  # of its many builders, and of prepared files
    mistake = one_line(f'{where} cannot be opened', error)
    found = list(prepared_files(data.name, kwargs['data_dir']))
    if found:
      mistake = errors.UserError(
        f'{mistake}; if {found[0].parent} is damaged, remove that folder'
      )
    raise mistake from error


def _prepare(builder: tfds.core.DatasetBuilder, data: ConfigDict) -> None:
  """Downloads and writes the data set, or finds that another process has."""
  if builder.name not in DATA_SOURCES:
    name, folder = builder.info.full_name, builder.data_path
    print(f'downloading {name} to {folder}', file=sys.stderr)
  try:
    builder.download_and_prepare(file_format='array_record')
  except (OSError, ImportError, AssertionError, RuntimeError) as error:
    # TFDS writes aside and renames: whoever comes second finds the name taken.
    if not builder.is_prepared():
      if disk.is_full(error):  # in array_record's words, perhaps
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise disk.refused(str(builder.data_path), full) from error
      where = f'data.name = {data.name!r} cannot be prepared'
      raise one_line(f'{where} in {builder.data_path}', error) from error


def _check_split(builder: tfds.core.DatasetBuilder, split: str) -> None:
  """Raises UserError unless `split` is known and holds a document."""
  splits = builder.info.splits
  known = {name: info.num_examples for name, info in splits.items()}
  listed = ', '.join(f'{name}: {n} documents' for name, n in known.items())
  base = re.split(r'[\[+]', split)[0]
  where = f'split {split!r} of {builder.info.full_name}'
  if base in known or base == 'all':
    try:
      parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
      # Of a part that ends before it begins, TFDS itself reads something; one
      # that begins where the split ends, it cannot open.
      if all(
        (p.from_ or 0) < (known[p.splitname] if p.to is None else p.to)
        for p in parts
      ):
        return
    except ValueError as error:
      raise one_line(where, error) from error
  elif builder.name not in DATA_SOURCES or base not in folders.SPLITS:
    raise errors.UserError(
      f'{where} is not known{errors.nearest(base, known)} ({listed})'
    )
  raise errors.UserError(f'{where} is empty ({listed}); {_advice(known)}')


def _advice(known: dict[str, int]) -> str:
  """Returns what to do about an empty split of these numbers of documents."""
  name = max(known, key=known.__getitem__)
  part = max(1, known[name] // 10)
  if known[name] > part:
    return (
      f"take part of another split, as in '{name}[-{part}:]' with"
      f" data.train_split = '{name}[:-{part}]', or add documents"
    )
  return (
    'a document is not cut: write the text as several files, or train on all'
    " of it, with data.train_split = 'all' and eval.every = 0"
  )


def _text_features(builder: tfds.core.DatasetBuilder) -> list[str]:
  """Returns the names of the features that hold one string."""
  string = tfds.features.Text().np_dtype
  return [
    key
    for key, feature in builder.info.features.items()
    if feature.shape == () and feature.np_dtype == string
  ]


def _check_text_key(builder: tfds.core.DatasetBuilder, key: str) -> None:
  """Raises UserError unless the feature `key` is one string."""
  known = _text_features(builder)
  if key not in known:
    raise errors.UserError(
      f'data.text_key = {key!r} is not a text feature of'
      f' {builder.info.full_name}{errors.nearest(key, known)}'
      f' (text features: {", ".join(known) or "none"})'
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS's progress bars, prints and warnings off the terminal."""
  log = logging.getLogger('absl')
  level = log.level
  log.setLevel(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    log.setLevel(level)
