"""TFDS builders of sources that are one long text each, cut into three splits.

The examples of a split are pieces of its text, in order, cut at ends of lines
so that they are small enough to read at random; nothing stands between them.

In one thing this is not the released code of CompeteSMoE, which RMoE's takes:
that one ends the last line of a split with `<eos>` even if it has no newline,
as where enwik8 is cut inside a line. Here a split of enwik8 is its bytes.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds

from moe_jax import errors

SPLITS = ('train', 'validation', 'test')

_PIECE_BYTES = 2**18  # a batch reads from as many pieces as it has rows


class SingleDocument(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
  """Pieces `text` of a text in a zip file, in order.

  Attributes:
    URL: Where the zip file is.
  """

  VERSION = tfds.core.Version('1.0.0')
  URL: str

  def __init__(self, *, path: str, **kwargs: object) -> None:
    """Describes the data set.

    Args:
      path: The path of the zip file if it is here already, else ''.
      **kwargs: The options of a TFDS builder: data_dir, file_format.

    Raises:
      UserError: There is no such zip file.
    """
    self._path = os.path.expanduser(path)
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
    with zipfile.ZipFile(path) as archive:
      lines = self._lines(archive, split)
      for number, piece in enumerate(_pieces(lines)):
        yield number, {'text': piece}

  def _lines(self, archive: zipfile.ZipFile, split: str) -> Iterable[bytes]:
    """Returns the lines of a split, each with its end."""
    raise NotImplementedError

  def _member(self, archive: zipfile.ZipFile, ending: str) -> str:
    """Returns the name of the file in the archive that ends so."""
    names = [name for name in archive.namelist() if name.endswith(ending)]
    if len(names) != 1:
      raise errors.UserError(
        f'{archive.filename} holds {len(names)} files *{ending}, and'
        f' data.name = {self.name!r} reads one; get {self.URL}'
      )
    return names[0]

  def _contents(self) -> str:
    """Returns what tells this zip file from any other, wherever it lies."""
    try:
      with zipfile.ZipFile(self._path) as archive:
        members = sorted(
          (member.filename, member.CRC, member.file_size)
          for member in archive.infolist()
        )
    except (OSError, zipfile.BadZipFile) as error:
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
      return dl_manager.download(self.URL)
    except (OSError, tfds.download.DownloadError) as error:
      said = ' '.join(str(error).split())[:200]
      raise errors.UserError(
        f'data.name = {self.name!r}: {self.URL} cannot be downloaded'
        f' ({type(error).__name__}: {said}); save that file by other means and'
        ' give its path as data.path'
      ) from error


class Enwik8(SingleDocument):
  """The first 10^8 bytes of a dump of the English Wikipedia: 90, 5 and 5 M."""

  URL = 'http://mattmahoney.net/dc/enwik8.zip'
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
  _FILES = {'train': 'train', 'validation': 'valid', 'test': 'test'}

  def _lines(self, archive: zipfile.ZipFile, split: str) -> Iterable[bytes]:
    ending = f'wiki.{self._FILES[split]}.tokens'
    return archive.open(self._member(archive, ending))


BUILDERS = {'enwik8': Enwik8, 'wikitext103': Wikitext103}


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
