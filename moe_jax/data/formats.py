"""The documents of one file: text, JSON lines, JSON or parquet, packed or not.

A file is read in blocks, so a long one needs no more memory than a short one. A
row without a text is left out with the reason; what is broken is a UserError
that names the file and the place in it. Rows of instruction data are rendered
(`instructions.py`): their texts are `Example`s.
"""

import codecs
import contextlib
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import pyarrow
import pyarrow.parquet

from moe_jax import files
from moe_jax.data import instructions
from moe_jax.errors import UserError, nearest, printable, said

_PACKINGS = {'.gz': 'gzip', '.zst': 'zstd'}
# How they begin; zstd may have frames to skip, as parallel packers write.
_PACKED = {
  'gzip': re.compile(rb'\x1f\x8b'),
  'zstd': re.compile(rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'),
}
_KINDS = {
  '.jsonl': 'lines',
  '.ndjson': 'lines',
  '.json': 'json',
  '.parquet': 'parquet',
}
_ARCHIVES = ('.zip', '.tar', '.tgz', '.bz2', '.xz', '.7z')

_BLOCK_BYTES = 2**20
_BATCH_ROWS = 64  # of parquet, held at once
_MOST_CHARACTERS = 2**30  # of a document, which is held in memory

# Text packs to a third or a fifth; what packs so much better is a bomb.
_MOST_PACKED = 200
_SURELY_SMALL = 2**24

# A text above the first is cut into documents of once to twice the second, so
# that one long file has documents for every split.
_WHOLE_CHARACTERS = 2**18
_PIECE_CHARACTERS = 2**14

# No text begins so, whatever its name ends with; nor has it a zero byte early.
_BEGINNINGS = (
  *(b'\x1f\x8b', b'\x28\xb5\x2f\xfd', b'PK\x03\x04', b'PAR1', b'BZh'),
  *(b'\xfd7zXZ', b'%PDF-', b'\x89PNG', b'\xff\xd8\xff', b'\x7fELF'),
)
_ZERO_WITHIN = 8192

# A list of objects, or an object a line.
_JSON_DATA = re.compile(rb'\s*(\[\s*\{|\{[^\n]*\}[ \t\r]*\n\s*\{)')
_SPACE = re.compile(r'[ \t\r\n]*')
# A text that ends too early is found wrong at its end, or a word before.
_WORD = 16


class NotText(UserError):
  """A text file that is none.

  Attributes:
    reason: What it is instead.
    place: Its name, and where that was found.
  """

  def __init__(self, reason: str, place: str, detail: str = '') -> None:
    super().__init__(
      f'{place} is {reason}{detail}; save it as that or leave it out'
    )
    self.reason = reason
    self.place = place


class BadUtf8(NotText):
  """A file that is not UTF-8."""


class Skipped(str):
  """Why a row has no document.

  Attributes:
    fields: The names that the row has.
  """

  fields: tuple[str, ...] = ()


Document = tuple[str, bytes | Skipped]


class File:
  """One file of documents.

  Attributes:
    name: Its name in messages.
    label: Its format and packing, as `jsonl.zst`.
  """

  def __init__(
    self, path: pathlib.Path, name: str, text_key: str, rows: str = 'text'
  ) -> None:
    """Tells the format from the name; nothing is read yet.

    Args:
      path: Where it lies.
      name: Its name in messages.
      text_key: The field or column of the text; text files need none.
      rows: What rows are, as `data.format` says it.
    """
    packing, ending = _endings(path.name)
    self.name = printable(name)
    self.label = f'{ending}{packing}'[1:] or 'text'
    self._packing = _PACKINGS.get(packing, '')
    self._kind = _KINDS.get(ending, 'text')
    self._path = path
    self._text_key = text_key
    self._format = instructions.FORMATS.get(rows)
    self._raw: BinaryIO | None = None

  @property
  def position(self) -> int:
    """How many bytes of the file were read."""
    return self._raw.tell() if self._raw and not self._raw.closed else 0

  def documents(self) -> Iterator[Document]:
    """Yields the place and the UTF-8 text of every document, in order.

    A place is a line, or `item 3` or `row 3`, counted from 1.

    Raises:
      NotText: A text file is not one; it has yielded nothing then.
      UserError: What the file holds is broken, or has no such column.
      OSError: It cannot be read, or is no regular file.
    """
    files.check_regular(self._path)
    if self._kind == 'text' and self._format:
      raise NotText('not JSON lines, JSON or parquet', self.name)
    if self._kind == 'parquet':
      yield from self._table()
    elif self._kind == 'text':
      yield from self._text()
    else:
      try:
        yield from self._rows()
      except BadUtf8 as error:  # no reason to leave out all of its rows
        raise UserError(str(error)) from error

  def _refuse(self, place: object, what: str) -> NoReturn:
    raise UserError(f'{self.name}{f":{place}" if place else ""} {what}')

  def _blocks(self) -> Iterator[bytes]:
    """Yields what the file holds, unpacked, from its beginning."""
    with self._path.open('rb') as self._raw:
      size = os.fstat(self._raw.fileno()).st_size
      most, done = max(_MOST_PACKED * size, _SURELY_SMALL), 0
      source = self._raw
      if self._packing:
        source = pyarrow.CompressedInputStream(self._raw, self._packing)
      while block := self._block(source):
        done += len(block)
        if self._packing and done > most:
          what = f'unpacks from {size:,} to above {most:,} bytes'
          self._refuse('', f'{what}: no text does; leave it out')
        yield block

  def _block(self, source: Any) -> bytes:
    """Reads a block, and reports a damaged packing in one line."""
    try:
      return source.read(_BLOCK_BYTES)
    except OSError as error:
      if error.errno:
        raise
      what = f'{self._packing}: {said(error)}'
      raise UserError(
        f'{self.name} cannot be unpacked to its end ({what}); get it anew or'
        ' leave it out'
      ) from error

  def _decoded(self, blocks: Iterator[bytes]) -> Iterator[str]:
    """Yields what blocks of the file hold, without a byte order mark."""
    line, column, rest = 1, 0, b''
    mark = '\ufeff'
    for block in itertools.chain(blocks, [b'']):
      content = rest + block
      try:
        text, used = codecs.utf_8_decode(content, 'strict', not block)
      except UnicodeDecodeError as error:
        before = content[: error.start]
        ends = before.count(b'\n')
        column = len(before) - before.rfind(b'\n') - 1 + (0 if ends else column)
        raise BadUtf8(
          'not UTF-8',
          f'{self.name}:{line + ends}',
          f' at byte {column} of the line (0x{content[error.start]:02x})',
        ) from error
      line += text.count('\n')
      last = content.rfind(b'\n', 0, used)
      column = used - last - 1 if last >= 0 else column + used
      rest = content[used:]
      yield text.removeprefix(mark)
      mark = mark if not text else ''

  def _text(self) -> Iterator[Document]:
    """Yields a text, or the pieces of a long one."""
    if self._packing:
      with self._path.open('rb') as file:
        if not _PACKED[self._packing].match(file.read(4)):
          raise NotText(f'not {self._packing}', self.name)
    blocks = self._blocks()
    head, more = next(blocks, b''), next(blocks, b'')
    if not looks_like_text(head):
      raise NotText('not text', self.name)
    if more:
      for _ in self._decoded(self._blocks()):
        pass  # so that a file is taken whole or not at all
    texts = self._decoded(self._blocks() if more else iter([head]))
    line = 1
    for piece in _pieces(texts):
      yield str(line), piece.encode()
      line += piece.count('\n')

  def _rows(self) -> Iterator[Document]:
    """Yields the texts of JSON lines, or of a list."""
    texts = self._decoded(self._blocks())
    first = next(texts)
    while not first.strip() and (more := next(texts, '')):
      first += more
    listed = self._kind == 'json' and first.lstrip().startswith('[')
    read = self._items if listed else self._lines
    for place, row in read(itertools.chain([first], texts)):
      yield place, self._of_row(row, place)

  def _of_row(self, row: object, place: str) -> bytes | Skipped:
    """Returns the document of a row."""
    try:
      return document(row, self._text_key, self._format)
    except instructions.BadRow as error:
      self._refuse(place, f'{error}')

  def _lines(self, texts: Iterator[str]) -> Iterator[tuple[str, object]]:
    """Yields the values of JSON lines."""
    for number, line in enumerate(self._split(texts), 1):
      if line and not line.isspace():
        try:
          yield str(number), json.loads(line)
        except (ValueError, RecursionError) as error:
          if self._kind == 'json' and number == 1:
            rows = 'not a JSON list of objects, nor JSON with one a line'
            raise NotText(rows, self.name) from error
          what = getattr(error, 'msg', said(error))
          column = getattr(error, 'colno', 1)
          self._refuse(
            number,
            f'is not JSON ({what}, column {column}); mend it or leave it out',
          )

  def _split(self, texts: Iterator[str]) -> Iterator[str]:
    """Yields the lines of a text."""
    kept: list[str] = []
    for text in texts:
      first, *others = text.split('\n')
      kept.append(first)
      if sum(map(len, kept)) > _MOST_CHARACTERS:
        self._refuse('', f'has a line above {_MOST_CHARACTERS:,} characters')
      if others:
        yield ''.join(kept)
        yield from others[:-1]
        kept = others[-1:]
    yield ''.join(kept)

  def _items(self, texts: Iterator[str]) -> Iterator[tuple[str, object]]:
    """Yields the objects of a JSON list, of which one is held at a time."""
    list_ = _JsonList(texts)
    for number in itertools.count(1):
      try:
        item = list_.next_item()
      except (ValueError, RecursionError) as error:
        what = getattr(error, 'msg', said(error))
        self._refuse(
          list_.line(getattr(error, 'pos', None)),
          f'is not a JSON list of objects (item {number}: {what}); mend it or'
          ' leave it out',
        )
      if item is None:
        return
      yield f'item {number}', item

  def _table(self) -> Iterator[Document]:
    """Yields the documents of the rows of parquet."""
    source: BinaryIO
    with contextlib.ExitStack() as stack:
      if self._packing:
        source = stack.enter_context(tempfile.TemporaryFile())
        for block in self._blocks():
          source.write(block)
      else:
        source = self._raw = stack.enter_context(self._path.open('rb'))
      try:
        table = pyarrow.parquet.ParquetFile(
          source, buffer_size=_BLOCK_BYTES, page_checksum_verification=True
        )
      except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
          f'{self.name} is not parquet that can be read ({said(error)[:200]});'
          ' get it anew or leave it out'
        ) from error
      columns = self._columns(table.schema_arrow)
      row = 0
      for group in range(table.num_row_groups):
        self._check_group(table.metadata.row_group(group), group, columns)
        for cell in self._group(table, group, columns):
          row += 1
          yield f'row {row}', self._cell(cell, row)

  def _columns(self, schema: pyarrow.Schema) -> list[str]:
    """Returns the columns that are read; refuses parquet without them."""
    if self._format is None:
      self._check_column(schema)
      return [self._text_key]
    try:
      self._format.check(schema.names)
    except instructions.BadRow as error:
      self._refuse('', f'{error}')
    return [name for name in self._format.fields if name in schema.names]

  def _check_column(self, schema: pyarrow.Schema) -> None:
    """Refuses parquet without the column of texts, or with no text in it."""
    key = self._text_key
    if key not in schema.names:
      self._refuse(
        '',
        f'has no column data.text_key = {key!r}{nearest(key, schema.names)}'
        f' (columns: {_listed(schema.names)})',
      )
    kind = schema.field(key).type
    if pyarrow.types.is_dictionary(kind):
      kind = kind.value_type
    if str(kind).removeprefix('large_') not in _TEXT_TYPES:
      self._refuse(
        '', f'has no text in its column data.text_key = {key!r}, but {kind}'
      )

  def _check_group(self, group: Any, number: int, columns: list[str]) -> None:
    """Refuses a column that says it would unpack to what no text does."""
    for i in range(group.num_columns):
      column = group.column(i)
      packed, size = (
        column.total_compressed_size,
        column.total_uncompressed_size,
      )
      name = column.path_in_schema
      read = name in columns or name.split('.')[0] in columns
      if read and size > max(_MOST_PACKED * packed, _SURELY_SMALL):
        self._refuse(
          '',
          f'would unpack row group {number} from {packed:,} to {size:,} bytes:'
          ' no text does; leave it out',
        )

  def _group(self, table: Any, group: int, columns: list[str]) -> Iterator[Any]:
    """Yields the texts of a row group, or its rows, each a table."""
    batches = table.iter_batches(
      _BATCH_ROWS,
      row_groups=[group],
      columns=columns,
      use_threads=False,
    )
    while True:
      try:
        batch = next(batches, None)
        if batch is None:
          return
        cells = self._cells(batch)
      except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
          f'{self.name}: row group {group} cannot be read'
          f' ({said(error)[:200]}); get it anew or leave it out'
        ) from error
      yield from cells

  def _cells(self, batch: Any) -> list[Any]:
    """Returns what `_cell` takes of each row."""
    if self._format:
      return [batch.slice(row, 1) for row in range(batch.num_rows)]
    column = batch.column(0)
    if pyarrow.types.is_dictionary(column.type):
      column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()

  def _cell(self, text: Any, row: int) -> bytes | Skipped:
    """Returns the document of a row."""
    if self._format:
      try:
        return self._of_row(text.to_pylist()[0], f'row {row}')
      except UnicodeDecodeError:
        self._refuse(f'row {row}', 'is not UTF-8; mend it or leave it out')
    if not text:
      return _skipped(self._text_key, text)
    try:
      text.decode()
    except UnicodeDecodeError as error:
      self._refuse(
        f'row {row}',
        f'is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}) of'
        f' {self._text_key!r}; mend it or leave it out',
      )
    return text


class _JsonList:
  """The objects of a list, decoded one after the other."""

  def __init__(self, texts: Iterator[str]) -> None:
    self._texts = texts
    self._text, self._at, self._line = '', 0, 1
    self._decoder = json.JSONDecoder()
    self._begun = False

  def line(self, position: int | None = None) -> int:
    """Returns the line of a position in what is held, or of the next item."""
    at = self._at if position is None else position
    return self._line + self._text.count('\n', 0, at)

  def next_item(self) -> dict | None:
    """Returns the next object; None after the last.

    Raises:
      ValueError: There is none, or something else.
      RecursionError: It is nested too deeply.
    """
    mark = self._character()
    if mark == ']' and self._begun:
      self._at += 1
      if self._character():
        raise ValueError('something follows the list')
      return None
    if mark != (',' if self._begun else '['):
      raise ValueError(f'{mark!r} instead of a comma' if mark else 'it is cut')
    self._at += 1
    if self._character() == ']' and not self._begun:
      self._begun = True
      return self.next_item()
    self._begun = True
    if self._character() != '{':
      raise ValueError('it is not an object')
    return self._object()

  def _character(self) -> str:
    """Moves to the next character that is no space; '' at the end."""
    while True:
      match = _SPACE.match(self._text, self._at)
      assert match
      self._at = match.end()
      if self._at < len(self._text) or not self._more():
        return self._text[self._at : self._at + 1]

  def _more(self) -> bool:
    """Reads on, as much as is held, so that long items stay cheap."""
    held = len(self._text) - self._at
    if held > _MOST_CHARACTERS:
      raise ValueError(f'it has above {_MOST_CHARACTERS:,} characters')
    count = max(1, held // _BLOCK_BYTES)
    more = ''.join(itertools.islice(self._texts, count))
    self._line = self.line()
    self._text, self._at = self._text[self._at :] + more, 0
    return bool(more)

  def _object(self) -> dict:
    """Decodes the object that begins here."""
    while True:
      try:
        item, self._at = self._decoder.raw_decode(self._text, self._at)
        return item
      except json.JSONDecodeError as error:
        cut = error.msg.startswith('Unterminated string')
        if not cut and error.pos < len(self._text) - _WORD:
          raise
        if not self._more():
          raise ValueError('it is cut') from error


_TEXT_TYPES = ('string', 'binary', 'string_view', 'binary_view')


def _endings(name: str) -> tuple[str, str]:
  """Returns the ending of a packing and of a format, each '' if not there."""
  stem, ending = os.path.splitext(name.lower())
  if ending in _PACKINGS:
    return ending, os.path.splitext(stem)[1]
  return '', ending


def data_format(name: str) -> str:
  """Returns the format of a file whose bytes are no text of its own, else ''.

  Args:
    name: The file's name.
  """
  packing, ending = _endings(name)
  if packing or ending in _ARCHIVES:
    return f'{ending}{packing}'[1:]
  return ending[1:] if _KINDS.get(ending, 'json') != 'json' else ''


def looks_like_text(head: bytes) -> bool:
  """Returns whether a file that begins so may be text.

  Args:
    head: Its first bytes.
  """
  return not head.startswith(_BEGINNINGS) and b'\0' not in head[:_ZERO_WITHIN]


def looks_like_rows(head: bytes) -> bool:
  """Returns whether JSON that begins so is a list of objects or one a line.

  Args:
    head: Its first bytes.
  """
  return bool(_JSON_DATA.match(head))


def document(
  row: object, key: str, format_: instructions.Format | None
) -> bytes | Skipped:
  """Returns the document of a row.

  Args:
    row: An object of JSON, or a row of a table.
    key: The field of the text.
    format_: What the row is, if it is no text.

  Raises:
    BadRow: It is no such example.
  """
  if format_ is None:
    return picked(row, key)
  try:
    return format_.example(row)
  except instructions.NoResponse as error:
    return Skipped(str(error))


def picked(row: object, key: str) -> bytes | Skipped:
  """Returns the text of a row of JSON."""
  text = row.get(key) if isinstance(row, dict) else None
  if isinstance(text, str) and text:
    try:
      return text.encode()
    except UnicodeEncodeError:
      return Skipped(f'{key!r} has half a surrogate pair')
  skipped = _skipped(key, text)
  if isinstance(row, dict):
    skipped.fields = tuple(itertools.islice(row, 20))
  return skipped


def _skipped(key: str, value: object) -> Skipped:
  """Returns why this value of the field `key` is no document."""
  if value is None:
    return Skipped(f'no {key!r}')
  return Skipped(f'{key!r} is {"not a" if value else "an empty"} text')


def _pieces(texts: Iterator[str]) -> Iterator[str]:
  """Yields a text whole, or cut after blank lines, lines or words if long."""
  kept, most = '', _WHOLE_CHARACTERS
  for text in texts:
    kept, at = kept + text, 0
    while len(kept) - at > most:
      most = 2 * _PIECE_CHARACTERS
      end = _cut(kept, at + _PIECE_CHARACTERS, at + most)
      yield kept[at:end]
      at = end
    kept = kept[at:]
  if kept:
    yield kept


def _cut(text: str, low: int, high: int) -> int:
  """Returns the best place to cut a text in that range."""
  for mark in ('\n\n', '\n\r\n', '\n', ' '):
    found = text.find(mark, low, high)
    if found >= 0:
      return found + len(mark)
  return high


def _listed(names: list[str]) -> str:
  """Returns the first names, for a message."""
  more = f' and {len(names) - 20} more' if len(names) > 20 else ''
  return printable(', '.join(names[:20]), 400) + more
