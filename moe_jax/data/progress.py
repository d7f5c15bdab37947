"""What is told while data is prepared, which may take hours."""

import sys
import time
from collections.abc import Iterator, Sequence
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
