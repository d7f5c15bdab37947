"""What data cost: encoding them once, reading, seeking, memory.

  python -m benchmarks.data --config=quickstart --json
  python -m benchmarks.data --config=quickstart --documents=1
  python -m benchmarks.data --config=quickstart --documents=1000000

The first part is the training split of the config, by its tokenizer; the second
is made-up text of --megabytes, by bytes, in as many documents as is asked for.
Seconds are those of the processor, of all threads together, so that a machine
that is shared is fair to it; what is per second is per core.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers as huggingface
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax.data import pipeline, sources, subwords, tokenizers
from moe_jax.data.mixtures import Mixture
from moe_jax.data.sequences import TokenSequences
from moe_jax.data.token_cache import TokenCache
from moe_jax.errors import UserError

_FAR = 10**7  # the step that is sought
_MOST_TOKENIZED = 2**24  # characters, to time the tokenizer alone


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  for name, default, about in (
    ('megabytes', 64, 'of text that is made up'),
    ('documents', 1000, 'in which it is'),
    ('steps', 200, 'that are read'),
  ):
    flags.DEFINE_integer(name, default, about, flag_values=values)


def run(
  config: ConfigDict, json: bool, megabytes: int, documents: int, steps: int
) -> None:
  """Prints what `measure` returns."""
  from benchmarks import common

  common.show(measure(config, megabytes, documents, steps), json)


def measure(
  config: ConfigDict, megabytes: int, documents: int, steps: int
) -> dict[str, Any]:
  """Times a config's data, and made-up text in documents of one size.

  Returns:
    Of the config's data: `tokenizer`, of a tokenizer.json
    `library_mb_per_second` of the fastest call of the package `tokenizers`,
    `tokenizer_mb_per_second` of ours, and
    `encode_mb_per_second` with reading documents and writing ids. Of the text
    that is made up: `prepare_mb_per_second`, `read_tokens_per_second` of
    sequences at random, `batch_tokens_per_second` of a run's batches,
    `seek_seconds` to the batch of step 10^7 in either order, and
    `reading_memory_mb`, by which the process has grown since it was opened,
    what it maps left out.

  Raises:
    UserError: Anything is wrong with the config or the numbers.
  """
  if min(megabytes, documents, steps) < 1 or documents > megabytes * 10**6:
    raise UserError(
      f'--megabytes = {megabytes}, --documents = {documents} and --steps ='
      f' {steps} must be at least 1, and a document a byte long'
    )
  shape = {'megabytes': megabytes, 'documents': documents}
  with tempfile.TemporaryDirectory() as folder:
    found = _of_config(config, epath.Path(folder) / 'config')
    made_up = _made_up(
      epath.Path(folder) / 'made_up', megabytes * 10**6, documents
    )
    return {'benchmark': 'data'} | found | shape | _read(config, made_up, steps)


def _of_config(config: ConfigDict, folder: epath.Path) -> dict[str, Any]:
  """Times the tokenizer of a config alone, and all of the encoding."""
  data = config.data
  tokenizer = tokenizers.build(data)
  documents = sources.open_documents(data, data.train_split)
  texts, size = [], 0
  for i in range(len(documents)):
    texts.append(documents[i])
    size += len(texts[-1])
    if size > _MOST_TOKENIZED:
      break
  num_bytes = sum(len(t.encode(errors='surrogateescape')) for t in texts)

  def rate(encode: Callable[[str], object]) -> float:
    return num_bytes / _timed(lambda: [encode(text) for text in texts])[0] / 1e6

  library = _library(tokenizer)
  # In a folder of its own, where nothing is encoded yet.
  fresh = sources.Documents(
    documents.records,
    documents.full_name,
    documents.split,
    documents.text_key,
    folder,
    documents.single_document,
  )
  seconds, cache = _timed(lambda: TokenCache.open(fresh, tokenizer))
  return ({'library_mb_per_second': rate(library)} if library else {}) | {
    'tokenizer': tokenizer.name,
    'tokenizer_mb_per_second': rate(tokenizer.encode),
    'encode_mb_per_second': cache.lengths[:, 1].sum() / seconds / 1e6,
  }


def _library(
  tokenizer: tokenizers.Tokenizer,
) -> Callable[[str], object] | None:
  """Returns what encodes a text with a tokenizer.json alone; None without."""
  if not isinstance(tokenizer, subwords.HuggingFaceTokenizer):
    return None
  made = huggingface.Tokenizer.from_str(tokenizer.content.decode())
  return lambda text: made.encode_batch_fast([text], add_special_tokens=False)


class _Text(Sequence):
  """Examples of random letters, none of which is kept."""

  def __init__(self, size: int, documents: int) -> None:
    letters = np.random.default_rng(0).integers(97, 123, 2**20, np.uint8)
    self._letters = letters.tobytes()
    self._size, self._documents = size // documents, documents

  def __len__(self) -> int:
    return self._documents

  def __getitem__(self, i: Any) -> Any:
    if not 0 <= i < self._documents:
      raise IndexError(i)
    begin = i * 7919 % 2**19
    content = self._letters[begin : begin + self._size]
    return {'text': (content * (self._size // 2**19 + 1))[: self._size]}


def _made_up(
  folder: epath.Path, size: int, documents: int
) -> sources.Documents:
  text = _Text(size, documents)
  return sources.Documents(text, 'made_up', 'train', 'text', folder, False)


def _read(
  config: ConfigDict, documents: sources.Documents, steps: int
) -> dict[str, Any]:
  """Times opening, reading and seeking."""
  length, size = config.data.seq_len, config.train.batch_size
  tokenizer = tokenizers.ByteTokenizer()
  prepared, sequences = _timed(
    lambda: TokenSequences(documents, tokenizer, length)
  )
  before = _memory()
  rng = np.random.default_rng(0)
  wanted = rng.integers(len(sequences), size=steps * size).tolist()
  read, _ = _timed(lambda: [sequences.at(i)['targets'][0] for i in wanted])

  def batches(order: str, start: int, count: int) -> None:
    mixture = Mixture.of_one(sequences, order=order, batch_size=size)
    stream = pipeline.train_batches(
      mixture, rows=range(size), seed=0, start=start, threads=1
    )
    for _ in itertools.islice(stream, count):
      pass
    stream.close()

  batched, _ = _timed(lambda: batches('shuffled', 0, steps))
  orders = ('shuffled', 'contiguous')
  sought = [_timed(lambda o=order: batches(o, _FAR, 1))[0] for order in orders]
  tokens = steps * size * length
  return {
    'prepare_mb_per_second': sequences.num_bytes / prepared / 1e6,
    'read_tokens_per_second': tokens / read,
    'batch_tokens_per_second': tokens / batched,
    'seek_seconds': dict(zip(orders, sought, strict=True)),
    'reading_memory_mb': max(0.0, _memory() - before),
  }


def _timed(made: Any) -> tuple[float, Any]:
  """Returns the processor's seconds of a call, and its result."""
  began = time.process_time()
  result = made()
  return max(time.process_time() - began, 1e-9), result


def _memory() -> float:
  """Returns the megabytes of this process that are no file's."""
  with open('/proc/self/status', encoding='ascii') as file:
    [line] = [line for line in file if line.startswith('RssAnon')]
  return int(line.split()[1]) / 1e3


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
