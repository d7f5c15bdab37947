"""What is told while data is prepared, which may take hours."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
      f'preparing {self._what}: {done:,} of {self._total:,} documents,'
      f' {each * (self._total - done):.0f} s left',
      file=sys.stderr,
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


def by_bytes(what: str, total: int) -> Callable[[int], None]:
  """Returns a function that is told how many bytes are done, and tells that.

  It may be called often: as above, it prints every few seconds and to stderr.

  Args:
    what: What is being prepared.
    total: How many bytes there are.
  """
  began = last = time.monotonic()

  def tell(done: int) -> None:
    nonlocal last
    now = time.monotonic()
    if now - last >= _SECONDS and done:
      last = now
      rate = done / (now - began)
      print(
        f'preparing {what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB,'
        f' {rate / 1e6:.1f} MB/s, {max(0, total - done) / rate:.0f} s left',
        file=sys.stderr,
      )

  return tell
