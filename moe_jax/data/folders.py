"""TFDS builders over folders of files: Python's own library, a user's texts.

A file is a document, and a hash of its name decides its split, so a document
stays in its split when other files come and go. The prepared data is keyed by
what was read: a change in the folder makes new data, never stale data.
"""

import ast
import codecs
import hashlib
import os
import pathlib
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing

from moe_jax import errors, files
from moe_jax.data import formats, records
from moe_jax.data.progress import counted

SPLITS = ('train', 'validation', 'test')  # 90, 5 and 5 of 100 names
_NOT_LIBRARY = ('site-packages', 'dist-packages')
_TOPICS = 'pydoc_data/topics.py'
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def split_of(name: str | bytes) -> str:
  """Returns the split of a file, by its relative name, or of a text."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  part = int.from_bytes(digest[:8], 'big') % 20
  return {0: 'validation', 1: 'test'}.get(part, 'train')


class FolderBuilder(records.StreamedBuilder):
  """Documents `text` and their relative posix names `name`, as stored."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self, *, folder: pathlib.Path, names: list[str], key: str, **kwargs: object
  ) -> None:
    """Describes the data set; nothing is read yet.

    Args:
      folder: The root of the names.
      names: The relative posix names of non-empty files.
      key: Tells this content from any other; it is part of the prepared data's
        path.
      **kwargs: The options of a TFDS builder: data_dir, file_format.
    """
    self._folder = folder
    self._names = names
    config = tfds.core.BuilderConfig(name=re.sub(r'[^\w.-]', '_', key))
    super().__init__(config=config, **kwargs)

  def _documents(self) -> Iterator[records.Named]:
    """Yields the documents of a split after the other, in TFDS's order."""
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in self._names:
      members[split_of(name)].append(name)
    for split, names in members.items():
      for name in counted(self.info.full_name, _in_order(split, names)):
        text = self._document(name, (self._folder / name).read_bytes())
        if text:
          yield split, os.fsencode(name), text

  def _document(self, name: str, content: bytes) -> bytes:
    """Returns the text of a file; b'' leaves it out.

    Text that is not UTF-8 is named to its owner when it is read.
    """
    del name
    return content


class PythonStdlib(FolderBuilder):
  """The source of the running Python's standard library: real text, at hand."""

  def __init__(self, **kwargs: object) -> None:
    """Finds the library's files; UserError if this Python has none."""
    folder = pathlib.Path(sysconfig.get_path('stdlib'))
    names = [n for n in find_files(folder, _NOT_LIBRARY) if n.endswith('.py')]
    if not names:
      raise errors.UserError(
        f'data.name = {self.name!r}: {folder} holds no .py files;'
        ' use a Python installed with its library, or another data set'
      )
    # No times: the files of one release differ in nothing else between hosts.
    stamp = fingerprint(folder, names, times=False)
    python = f'{sys.implementation.name}-{platform.python_version()}'
    key = f'{python}-{stamp}'
    super().__init__(folder=folder, names=names, key=key, **kwargs)

  def _document(self, name: str, content: bytes) -> bytes:
    """Leaves out the few test files that are meant not to be UTF-8."""
    del name
    try:
      content.decode()
    except UnicodeDecodeError:
      return b''
    return content


class PythonDocs(PythonStdlib):
  """The English of the running Python's library: docstrings and help topics.

  A document is what a source file says in its docstrings, in their order, or
  the texts of `pydoc`'s topics, which are parts of the language's reference.
  """

  def _document(self, name: str, content: bytes) -> bytes:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', SyntaxWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        module = ast.parse(content)
    except (SyntaxError, ValueError):
      return b''  # one of the tests' files that are meant to be wrong
    texts = _topics(module) if name == _TOPICS else _docstrings(module)
    return '\n\n'.join(texts).encode(errors='ignore')


class TextFolder(FolderBuilder):
  """Every regular, non-hidden file of a folder and its sub-folders.

  Symbolic links to files and folders are followed. A byte order mark is no part
  of a text.
  """

  VERSION = tfds.core.Version('1.1.0')

  def __init__(self, *, path: str, **kwargs: object) -> None:
    """Finds the files below `path`; UserError if there are none."""
    folder = pathlib.Path(files.expand(path))
    if not path or not folder.is_dir():
      raise errors.UserError(
        f'data.path = {path!r} is not a folder;'
        " data.name = 'text_folder' reads the text files in data.path"
      )
    names = list(find_files(folder, links=True))
    if not names:
      raise errors.UserError(
        f'data.path = {path!r} holds no text: put at least one non-empty,'
        ' non-hidden UTF-8 file there'
      )
    for name in names:
      if kind := formats.data_format(name):
        raise _no_text(str(folder / name), kind)
    key = fingerprint(folder, names, times=True)
    super().__init__(folder=folder, names=names, key=key, **kwargs)

  def _document(self, name: str, content: bytes) -> bytes:
    listed = name.lower().endswith('.json') and formats.looks_like_rows(content)
    if listed or not formats.looks_like_text(content):
      raise _no_text(name, 'JSON of many objects' if listed else 'not text')
    return content.removeprefix(codecs.BOM_UTF8)


class GivenTexts(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
  """Documents `text` that a program gives, of whatever splits it has."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self, documents: Mapping[str, Iterable[str]], *, key: str, **kwargs: object
  ) -> None:
    """Describes the data set; the documents are read when it is prepared.

    Args:
      documents: The texts of every split.
      key: Tells this content from any other; it is part of the prepared data's
        path, and what is there already is not read again.
      **kwargs: The options of a TFDS builder: data_dir, file_format.
    """
    self._documents = documents
    config = tfds.core.BuilderConfig(name=re.sub(r'[^\w.-]', '_', key))
    super().__init__(config=config, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
    del dl_manager
    return {
      split: self._generate_examples(texts)
      for split, texts in self._documents.items()
    }

  def _generate_examples(
    self, texts: Iterable[str]
  ) -> Iterator[tuple[int, dict[str, str]]]:
    for i, text in enumerate(texts):
      yield i, {'text': text}


def find_files(
  folder: pathlib.Path, skip: tuple[str, ...] = (), links: bool = False
) -> Iterator[str]:
  """Yields the relative posix names of the non-empty files, in fixed order.

  Hidden files are left out, and what is neither a file nor a folder.

  What lies behind symbolic links to folders comes last, and only if `links`. No
  folder is read twice, so links may go round in circles.
  """
  waiting, read = [str(folder)], set()
  while waiting:
    for parent, folders, names in os.walk(waiting.pop(0), onerror=_raise):
      if os.path.realpath(parent) in read:
        folders.clear()
        continue
      read.add(os.path.realpath(parent))
      folders[:] = sorted(
        f for f in folders if not f.startswith('.') and f not in skip
      )
      if links:
        paths = [os.path.join(parent, name) for name in folders]
        waiting += filter(os.path.islink, paths)
      for name in sorted(n for n in names if not n.startswith('.')):
        path = pathlib.Path(parent, name)
        if path.is_file() and path.stat().st_size:
          yield path.relative_to(folder).as_posix()


def _in_order(split: str, names: list[str]) -> list[str]:
  """Returns the names as TFDS would shuffle them."""
  hasher = hashing.Hasher(split)
  # Bytes, because a file name need not be valid UTF-8.
  return sorted(names, key=lambda name: hasher.hash_key(os.fsencode(name)))


def _no_text(name: str, kind: str) -> errors.UserError:
  """Returns the refusal of a file that is no document in itself."""
  return errors.UserError(
    f'{errors.printable(name)} is {kind}, and data.name ='
    " 'text_folder' takes every file for one text: data.name = 'files' reads"
    ' the documents in such files, and leaves out what is not text'
  )


def _docstrings(module: ast.Module) -> Iterator[str]:
  """Yields the docstrings of a module, its classes and functions, in order."""
  waiting: list[ast.AST] = [module]
  while waiting:
    node = waiting.pop()
    if isinstance(node, _DOCUMENTED):
      text = ast.get_docstring(node)
      if text:
        yield text
    waiting += reversed(list(ast.iter_child_nodes(node)))


def _topics(module: ast.Module) -> Iterator[str]:
  """Yields the texts of the dict that `pydoc_data.topics` is."""
  for node in ast.walk(module):
    if isinstance(node, ast.Dict):
      yield from (ast.literal_eval(value) for value in node.values)


def _raise(error: OSError) -> None:
  """Raises the error of a folder, which `os.walk` would pass over."""
  raise error


def fingerprint(folder: pathlib.Path, names: list[str], times: bool) -> str:
  """Returns 16 hex digits of the names, sizes and, if `times`, change times."""
  digest = hashlib.sha256()
  for name in names:
    stat = (folder / name).stat()
    time = stat.st_mtime_ns if times else 0
    digest.update(os.fsencode(name) + f'\0{stat.st_size}\0{time}\n'.encode())
  return digest.hexdigest()[:16]
