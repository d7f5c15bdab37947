"""What a run trains on: one source, or several of which each has its share.

Every row of a batch is of one source. Which of them, a permutation of windows
of the rows decides, of which each has as many rows of a source as any other
window; so the place of a row in its source is plain arithmetic.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import numpy as np
from ml_collections import ConfigDict

from moe_jax.config import mixture
from moe_jax.config.mixture import Source
from moe_jax.data import sources
from moe_jax.data.orders import ORDERS, num_rows
from moe_jax.data.sequences import TokenSequence, TokenSequences
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

# The rows of a window: shares are multiples of one of so many.
WINDOW = 2**14
_KEPT_WINDOWS = 4  # threads that read ahead may be in several

_T = TypeVar('_T')


def open_documents(
  data: ConfigDict, split: str | None = None
) -> dict[str, Documents]:
  """Returns the documents of every source, by its name; '' of a single one.

  Args:
    data: The section `config.data`.
    split: A split, in TFDS's notation; None for what each trains on.

  Raises:
    UserError: As `sources.open_documents`; the message names the source.
  """
  return _of_each(
    data,
    lambda source: sources.open_documents(
      source.data, split or source.data.train_split
    ),
  )


def open_sequences(
  data: ConfigDict, split: str | None, tokenizer: Tokenizer
) -> dict[str, TokenSequences]:
  """Returns the token sequences of every source, by its name.

  Args:
    data: The section `config.data`.
    split: As in `open_documents`.
    tokenizer: That of the config.

  Raises:
    UserError: As `TokenSequences.open`, or there is no token to predict; the
      message names the source.
  """

  def opened(source: Source) -> TokenSequences:
    name = split or source.data.train_split
    found = TokenSequences.open(source.data, name, tokenizer)
    if not len(found):
      raise UserError(
        f'split {name!r} of data.name = {source.data.name!r} has no token to'
        ' predict; name another'
      )
    return found

  return _of_each(data, opened)


class Mixture:
  """The token sequences that a run trains on, and in which shares.

  Attributes:
    names: The names of the sources; '' is that of a single one.
    sequences: Their token sequences.
    shares: The rows of each in `WINDOW` rows, or in those of a batch where the
      order is contiguous, since a row then goes on and on.
    order: A key of `ORDERS`.
    batch_size: The sequences of a step, over all processes.
  """

  def __init__(
    self,
    found: dict[str, TokenSequences],
    weights: list[float],
    *,
    order: str,
    batch_size: int,
  ) -> None:
    """Divides the rows.

    Args:
      found: The sequences of the sources, by name.
      weights: What the shares of the sources are proportional to.
      order: A key of `ORDERS`.
      batch_size: The sequences of a step, over all processes.

    Raises:
      UserError: The share of a source is less than a row.
    """
    self.names = list(found)
    self.sequences = list(found.values())
    self.order = order
    self.batch_size = batch_size
    self._masked = any(each.masked for each in self.sequences)
    self.shares = _divided(self.names, weights, self._period)

  @classmethod
  def of_one(
    cls, sequences: TokenSequences, *, order: str, batch_size: int
  ) -> Self:
    """Returns what reads nothing else; the arguments are the constructor's."""
    return cls({'': sequences}, [1.0], order=order, batch_size=batch_size)

  @classmethod
  def open(
    cls, data: ConfigDict, tokenizer: Tokenizer, batch_size: int
  ) -> Self:
    """Returns what a config trains on.

    Args:
      data: The section `config.data`.
      tokenizer: That of the config.
      batch_size: The sequences of a step, over all processes.

    Raises:
      UserError: As `open_sequences`, or as the constructor.
    """
    found = open_sequences(data, None, tokenizer)
    weights = []
    for source in mixture.sources(data):
      rows = num_rows(found[source.name], data.order)
      weight = rows * source.epochs if source.weight is None else source.weight
      weights.append(weight ** (1 / data.temperature))
    return cls(found, weights, order=data.order, batch_size=batch_size)

  def epochs(self, steps: int) -> list[float]:
    """Returns how often so many steps read each of the sources."""
    rows = steps * self.batch_size
    return [
      rows * share / self._period / num_rows(each, self.order)
      for each, share in zip(self.sequences, self.shares, strict=True)
    ]

  def fingerprint(self) -> dict[str, str | int]:
    """Returns what tells this stream from others, as JSON can hold it."""
    if len(self.names) == 1:
      return self.sequences[0].fingerprint()
    parts = {
      name: each.fingerprint()
      for name, each in zip(self.names, self.sequences, strict=True)
    }
    found: dict[str, str | int] = {
      key: sum(int(part[key]) for part in parts.values())
      for key in ('documents', 'tokens', 'bytes')
    }
    names = [f'{name} ({part.pop("name")})' for name, part in parts.items()]
    found['name'] = ' + '.join(names)
    for (name, part), share in zip(parts.items(), self.shares, strict=True):
      found[f'{name}.share'] = share
      found |= {f'{name}.{key}': value for key, value in part.items()}
    return found

  def rows(self, seed: int) -> Callable[[int, int], TokenSequence]:
    """Returns a function to the sequence of (step, row of the global batch).

    A sequence of a mixture also has the number of its `source`, int32 [].

    Args:
      seed: The seed of the order, 32 bits.

    Raises:
      UserError: A source has too few tokens for that order.
    """
    order = ORDERS[self.order]
    if self.names == ['']:
      return order(self.sequences[0], self.batch_size, seed)
    contiguous = self.order == 'contiguous'
    streams = []
    for name, each, share in zip(
      self.names, self.sequences, self.shares, strict=True
    ):
      with _naming(name):
        size = share if contiguous else 1
        streams.append(order(each, size, _seed_of(name, seed)))
    place = self._spread() if contiguous else self._shuffled(seed)

    def read(step: int, row: int) -> TokenSequence:
      source, *where = place(step, row)
      sequence = streams[source](*where)
      if self._masked:  # of texts, every token is to be predicted
        sequence.setdefault('target_mask', sequence['padding_mask'])
      return sequence | {'source': np.array(source, np.int32)}

    return read

  @property
  def _period(self) -> int:
    """After how many rows those of each source are as many again."""
    return self.batch_size if self.order == 'contiguous' else WINDOW

  def _shuffled(self, seed: int) -> Callable[[int, int], tuple[int, int, int]]:
    """Returns a function of (step, row) to a source and (n, 0) of its rows."""
    sorted_W = np.repeat(np.arange(len(self.shares)), self.shares)

    @functools.lru_cache(_KEPT_WINDOWS)
    def drawn(window: int) -> tuple[np.ndarray, np.ndarray]:
      """Returns the source of each row, and its number among those of it."""
      source_W = np.random.default_rng((seed, window)).permutation(sorted_W)
      nth_W = np.empty_like(source_W)
      for source, share in enumerate(self.shares):
        nth_W[source_W == source] = window * share + np.arange(share)
      return source_W, nth_W

    def place(step: int, row: int) -> tuple[int, int, int]:
      window, i = divmod(step * self.batch_size + row, WINDOW)
      source_W, nth_W = drawn(window)
      return int(source_W[i]), int(nth_W[i]), 0

    return place

  def _spread(self) -> Callable[[int, int], tuple[int, int, int]]:
    """Returns a function of (step, row) to a source, the step and its row.

    The rows of a source are spread evenly, so that devices have like shares.
    """
    places = sorted(
      ((row + 0.5) / share, source, row)
      for source, share in enumerate(self.shares)
      for row in range(share)
    )
    return lambda step, row: (places[row][1], step, places[row][2])


def _divided(names: list[str], weights: list[float], total: int) -> list[int]:
  """Divides `total` rows by weights, those left over by largest remainder.

  Raises:
    UserError: A source would get less than one.
  """
  exact = total * np.array(weights) / sum(weights)
  for name, share in zip(names, exact, strict=True):
    if share < 0.5:
      of = 'rows of a batch (train.batch_size)' if total < WINDOW else 'rows'
      raise UserError(
        f'data.mixture: {name} would have {share:.2g} of {total:,} {of}, and a'
        ' share is a whole number of them: raise its weight, its epochs or'
        ' data.temperature, or leave it out'
      )
  shares = np.maximum(np.floor(exact), 1).astype(int)
  while shares.sum() < total:
    shares[np.argmax(exact - shares)] += 1
  while shares.sum() > total:  # one that has several gives one up
    shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
  return shares.tolist()


def _seed_of(name: str, seed: int) -> int:
  """Returns the seed of a source, which other sources do not change."""
  found = hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=4).digest()
  return int.from_bytes(found, 'little')


def _of_each(data: ConfigDict, opened: Callable[[Source], _T]) -> dict[str, _T]:
  """Opens something of every source."""
  found = {}
  for source in mixture.sources(data):
    with _naming(source.name):
      found[source.name] = opened(source)
  return found


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
  """Names the source in whose data there is a mistake."""
  try:
    yield
  except UserError as error:
    raise mixture.of_source(source, error) from error
