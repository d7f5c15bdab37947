"""What is told while data is prepared, which may take hours."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar('T')

_SECONDS = 5.0  # between two lines


def counted(what: str, documents: Sequence[T]) -> Iterator[T]:
  """Yields the documents, and tells every few seconds how many are done.

  It goes to stderr, and nothing is told of what is over sooner. Processes that
  wait for the one that prepares tell nothing either.

  Args:
    what: What is being prepared.
    documents: The documents, or their numbers.
  """
  began = last = time.monotonic()
  for done, document in enumerate(documents):
    now = time.monotonic()
    if now - last >= _SECONDS:
      last = now
      left = (now - began) * (len(documents) - done) / done
      print(
        f'preparing {what}: {done:,} of {len(documents):,} documents,'
        f' {left:.0f} s left',
        file=sys.stderr,
      )
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
