"""What is told while data is prepared, which may take hours."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar('T')

_SECONDS = 5.0  # between two lines


class Progress:
  """Tells every few seconds how many documents are done.

  It goes to stderr, and nothing is told of what is over sooner. Processes that
  wait for the one that prepares tell nothing either.
  """

  def __init__(self, what: str, total: int, done: int = 0) -> None:
    """Begins to count the time.

    Args:
      what: What is being prepared.
      total: The number of documents.
      done: How many of them were done before.
    """
    self._what, self._total, self._before = what, total, done
    self._began = self._last = time.monotonic()

  def tell(self, done: int) -> None:
    """Tells how many documents are done, if it is time to."""
    now = time.monotonic()
    if now - self._last < _SECONDS or done <= self._before:
      return
    self._last = now
    each = (now - self._began) / (done - self._before)
    print(
      f'preparing {self._what}: {self._done(done, each)},'
      f' {each * max(0, self._total - done):.0f} s left',
      file=sys.stderr,
    )

  def _done(self, done: int, seconds: float) -> str:
    """Returns how far it is; `seconds` is what one takes."""
    del seconds
    return f'{done:,} of {self._total:,} documents'


class ByteProgress(Progress):
  """The same of bytes, which it counts where it says documents."""

  def _done(self, done: int, seconds: float) -> str:
    return (
      f'{done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB,'
      f' {1 / seconds / 1e6:.1f} MB/s'
    )


def counted(what: str, documents: Sequence[T]) -> Iterator[T]:
  """Yields the documents, and tells every few seconds how many are done.

  Args:
    what: What is being prepared.
    documents: The documents, or their numbers.
  """
  progress = Progress(what, len(documents))
  for done, document in enumerate(documents):
    progress.tell(done)
    yield document
