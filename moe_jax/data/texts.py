"""TFDS builders of sources that are one long text each, cut into three splits.

The examples of a split are pieces of its text, in order, cut at ends of lines
so that they are small enough to read at random; nothing stands between them.

In one thing this is not the released code of CompeteSMoE, which RMoE's takes:
that one ends the last line of a split with `<eos>` even if it has no newline,
as where enwik8 is cut inside a line. Here a split of enwik8 is its bytes.
"""

import contextlib
import hashlib
import io
import lzma
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds

from moe_jax import errors, files

SPLITS = ('train', 'validation', 'test')

_PIECE_BYTES = 2**18  # a batch reads from as many pieces as it has rows

# A member is read into memory. Text packs to a third or a fifth; what packs so
# much better that it is a bomb is refused by what the archive says, which is
# also the most that is read.
_MOST_BYTES = 2**32
_MOST_PACKED = 200
_SURELY_SMALL = 2**24

# What zipfile raises where an archive is damaged, encrypted, packed in another
# way or ends too early.
_DAMAGES = (
  OSError,
  EOFError,
  NotImplementedError,
  RuntimeError,
  lzma.LZMAError,
  zipfile.BadZipFile,
  zlib.error,
)


class SingleDocument(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
  """Pieces `text` of a text in a zip file, in order.

  Attributes:
    URL: Where the zip file is.
    SHA256: The digest of that file.
  """

  VERSION = tfds.core.Version('1.0.0')
  URL: str
  SHA256: str

  def __init__(self, *, path: str, **kwargs: object) -> None:
    """Describes the data set.

    Args:
      path: The path of the zip file if it is here already, else ''.
      **kwargs: The options of a TFDS builder: data_dir, file_format.

    Raises:
      UserError: There is no such zip file.
    """
    self._path = files.expand(path)
    key = self._contents() if path else 'download'
    super().__init__(config=tfds.core.BuilderConfig(name=key), **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
      disable_shuffling=True,  # the pieces stay in order
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator]:
    path = self._path or self._download(dl_manager)
    return {split: self._generate_examples(path, split) for split in SPLITS}

  def _generate_examples(
    self, path: os.PathLike | str, split: str
  ) -> Iterator[tuple[int, dict]]:
    number = 0
    with self._reading(path), zipfile.ZipFile(path) as archive:
      for piece in _pieces(self._lines(archive, split)):
        yield number, {'text': piece}
        number += 1
    if not number:
      raise errors.UserError(
        f'{path} holds too little text for a split {split!r}; get {self.URL}'
      )

  @contextlib.contextmanager
  def _reading(self, path: os.PathLike | str) -> Iterator[None]:
    """Reports a damaged archive in one line."""
    try:
      yield
    except _DAMAGES as error:
      raise errors.UserError(
        f'{path} cannot be read to its end ({type(error).__name__}: {error});'
        f' get {self.URL} anew'
      ) from error

  def _lines(self, archive: zipfile.ZipFile, split: str) -> Iterable[bytes]:
    """Returns the lines of a split, each with its end."""
    raise NotImplementedError

  def _member(self, archive: zipfile.ZipFile, ending: str) -> str:
    """Returns the name of the file in the archive that ends so."""
    found = [m for m in archive.infolist() if m.filename.endswith(ending)]
    if len(found) != 1:
      raise errors.UserError(
        f'{archive.filename} holds {len(found)} files *{ending}, and'
        f' data.name = {self.name!r} reads one; get {self.URL}'
      )
    [member] = found
    most = max(_MOST_PACKED * member.compress_size, _SURELY_SMALL)
    if member.file_size > min(most, _MOST_BYTES):
      raise errors.UserError(
        f'{archive.filename}: {member.filename} would unpack from'
        f' {member.compress_size:,} to {member.file_size:,} bytes, above'
        f' {min(most, _MOST_BYTES):,}: no text does; get {self.URL}'
      )
    return member.filename

  def _contents(self) -> str:
    """Returns what tells this zip file from any other, wherever it lies."""
    try:
      files.check_regular(self._path)
      with zipfile.ZipFile(self._path) as archive:
        members = sorted(
          (member.filename, member.CRC, member.file_size)
          for member in archive.infolist()
        )
    except (*_DAMAGES, ValueError) as error:
      raise errors.UserError(
        f'data.path = {self._path!r} is not a zip file that can be read'
        f' ({error}); data.name = {self.name!r} reads there the file of'
        f" {self.URL}, or with data.path = '' downloads it"
      ) from error
    return 'zip-' + hashlib.sha256(repr(members).encode()).hexdigest()[:32]

  def _download(
    self, dl_manager: tfds.download.DownloadManager
  ) -> os.PathLike | str:
    try:
      path = dl_manager.download(self.URL)
    except (OSError, tfds.download.DownloadError) as error:
      said = ' '.join(str(error).split())[:200]
      raise errors.UserError(
        f'data.name = {self.name!r}: {self.URL} cannot be downloaded'
        f' ({type(error).__name__}: {said}); save that file by other means and'
        ' give its path as data.path'
      ) from error
    found = _sha256(path)
    if found != self.SHA256:
      os.remove(path)  # or it would be taken next time
      raise errors.UserError(
        f'data.name = {self.name!r}: {self.URL} has sent another file, of'
        f' SHA-256 {found}, not {self.SHA256}, and it was removed; try again,'
        ' or save the right one by other means and give its path as data.path'
      )
    return path


class Enwik8(SingleDocument):
  """The first 10^8 bytes of a dump of the English Wikipedia: 90, 5 and 5 M."""

  URL = 'https://mattmahoney.net/dc/enwik8.zip'
  # Its page, https://mattmahoney.net/dc/textdata.html, has its size, 36,445,475
  # bytes, and no SHA-256; this one is pinned by many projects that read it.
  SHA256 = '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
  _BEGIN = {'train': 0, 'validation': 90, 'test': 95}  # of 100 parts

  def _lines(self, archive: zipfile.ZipFile, split: str) -> Iterable[bytes]:
    text = archive.read(self._member(archive, 'enwik8'))
    begins = [*self._BEGIN.values(), 100]
    i = list(self._BEGIN).index(split)
    begin, end = (len(text) * part // 100 for part in begins[i : i + 2])
    return io.BytesIO(text[begin:end])


class Wikitext103(SingleDocument):
  """WikiText-103 (arXiv 1609.07843), at the level of words, with its <unk>s."""

  URL = 'https://wikitext.smerity.com/wikitext-103-v1.zip'
  # Pinned by projects that read it from here, and from its first address.
  SHA256 = '242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590'
  _FILES = {'train': 'train', 'validation': 'valid', 'test': 'test'}

  def _lines(self, archive: zipfile.ZipFile, split: str) -> Iterable[bytes]:
    ending = f'wiki.{self._FILES[split]}.tokens'
    return archive.open(self._member(archive, ending))


BUILDERS = {'enwik8': Enwik8, 'wikitext103': Wikitext103}


def _sha256(path: os.PathLike | str) -> str:
  with pathlib.Path(path).open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
  """Joins lines to pieces of about `_PIECE_BYTES`."""
  kept, size = [], 0
  for line in lines:
    kept.append(line)
    size += len(line)
    if size >= _PIECE_BYTES:
      yield b''.join(kept)
      kept, size = [], 0
  if kept:
    yield b''.join(kept)
