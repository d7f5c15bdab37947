"""Documents written as TFDS keeps them, in one pass and in little memory.

TFDS's own writer sorts a split, for which it needs as much memory, and above a
gigabyte TensorFlow; and it reads the source once for each split.
"""

import os
import pathlib
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import naming
from tensorflow_datasets.proto import tf_example_pb2

from moe_jax.data.instructions import Example
from moe_jax.errors import UserError

_SHARD_BYTES = 2**30

Named = tuple[str, bytes, bytes]  # a split, a name and a text


class StreamedBuilder(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
  """Documents `text` and where they are from, `name`, in the order of reading.

  Of examples there is also `responses`, numbers with spaces between them. A
  builder of this kind has `_documents`.

  Attributes:
    masked: Whether documents are examples, of which responses are predicted.
  """

  masked = False
  VERSION = tfds.core.Version('1.0.0')

  def _documents(self) -> Iterator[Named]:
    """Yields the split, the name and the UTF-8 text of every document."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    names = ['text', 'name', *['responses'] * self.masked]
    features = {name: tfds.features.Text() for name in names}
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _generate_splits(
    self, dl_manager: object, download_config: object
  ) -> list[tfds.core.SplitInfo]:
    """Writes all splits; TFDS has its builder of Hugging Face here too."""
    del dl_manager, download_config
    written: dict[str, _Split] = {}
    try:
      for split, name, text in self._documents():
        if split not in written:
          written[split] = _Split(split, self._get_filename_template)
        written[split].add(name, text)
    except BaseException:
      for each in written.values():
        each.abandon()
      raise
    if not written:
      raise UserError(f'{self.info.full_name} would hold no text')
    return [each.finish() for each in written.values()]

  def _split_generators(self, dl_manager: object) -> dict:
    raise NotImplementedError('_generate_splits does it')

  def _generate_examples(self, *args: object) -> Iterator:
    raise NotImplementedError('_generate_splits does it')


class _Split:
  """The records of one split that are being written."""

  def __init__(
    self, name: str, template: Callable[[str], naming.ShardedFileTemplate]
  ) -> None:
    self._name = name
    self._template = template(name)
    self._paths: list[pathlib.Path] = []
    self._lengths: list[int] = []
    self._bytes = self._shard_bytes = 0
    self._writer: ArrayRecordWriter | None = None

  def add(self, name: bytes, text: bytes) -> None:
    """Writes a document."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature['text'].bytes_list.value.append(text)
    feature['name'].bytes_list.value.append(name)
    if isinstance(text, Example):
      places = ' '.join(map(str, text.responses)).encode()
      feature['responses'].bytes_list.value.append(places)
    record = example.SerializeToString()
    if self._writer is None or self._shard_bytes > _SHARD_BYTES:
      self._begin()
    assert self._writer
    self._writer.write(record)
    self._lengths[-1] += 1
    self._bytes += len(record)
    self._shard_bytes += len(record)

  def _begin(self) -> None:
    """Begins a shard; how many there are is in its name only at the end."""
    self.abandon()
    folder = pathlib.Path(os.fspath(self._template.data_dir))
    path = folder / f'{self._name}-{len(self._paths)}'
    self._writer = ArrayRecordWriter(str(path), 'group_size:1')
    self._paths.append(path)
    self._lengths.append(0)
    self._shard_bytes = 0

  def abandon(self) -> None:
    """Closes the shard."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def finish(self) -> tfds.core.SplitInfo:
    """Gives the shards their names and returns what TFDS keeps of them."""
    self.abandon()
    for i, path in enumerate(self._paths):
      shard = self._template.sharded_filepath(
        shard_index=i, num_shards=len(self._paths)
      )
      path.rename(os.fspath(shard))
    return tfds.core.SplitInfo(
      name=self._name,
      shard_lengths=self._lengths,
      num_bytes=self._bytes,
      filename_template=self._template,
    )
