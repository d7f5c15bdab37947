"""Token ids that several processes write, some of which are killed."""

import multiprocessing
import os
import pathlib
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data import encoding, helpers, sources
from moe_jax.data.token_cache import TokenCache
from tests.helpers import slow_tokenizer
from tests.helpers.slow_tokenizer import SlowTokenizer

MakeData = Callable[[dict[str, bytes]], ConfigDict]
COUNT = 60

# Each imports TFDS in a process of its own.
pytestmark = pytest.mark.slow


@pytest.fixture
def documents(
  make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> sources.Documents:
  """Sixty documents of a prepared data set, in a dozen files."""
  files = {f'{i}.txt': b'document %d\n' % i * 8 for i in range(COUNT)}
  found = sources.open_documents(make_data(files), 'all')
  monkeypatch.setattr(encoding, '_PART_BYTES', 500)
  plan = encoding.Plan.of(folder_of(found), found, 257, 256)
  assert len(plan.bounds) > 8
  return found


def folder_of(documents: sources.Documents) -> str:
  return os.path.join(os.fspath(documents.folder), 'ids-all-text-bytes')


def stream(documents: sources.Documents) -> list[int]:
  ids = [256]
  for i in range(len(documents)):
    ids += [*documents[i].encode(), 256]
  return ids


def started(
  documents: sources.Documents, seconds: float
) -> tuple[BaseProcess, Connection]:
  """A process that encodes, and what hears of its result."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['tests.helpers.slow_tokenizer'])
  hears, tells = context.Pipe(duplex=False)
  process = context.Process(
    target=slow_tokenizer.encode, args=(documents, seconds, tells)
  )
  process.start()
  tells.close()
  return process, hears


def wait_for_files(folder: str, count: int) -> None:
  deadline = time.monotonic() + 120
  while len(list(pathlib.Path(folder).glob('*.ids'))) < count:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_what_a_killed_process_made_whole_stays(
  documents: sources.Documents,
) -> None:
  process, _ = started(documents, 0.02)
  wait_for_files(folder_of(documents), 2)
  process.kill()
  process.join()
  tokenizer = SlowTokenizer()
  cache = TokenCache.open(documents, tokenizer)
  assert cache.read(0, len(cache)).tolist() == stream(documents)
  assert 0 < tokenizer.encoded < COUNT
  assert not list(pathlib.Path(folder_of(documents)).glob('*.ids.*'))


def test_two_processes_encode_everything_once(
  documents: sources.Documents,
) -> None:
  both = [started(documents, 0.02) for _ in range(2)]
  found = [hears.recv() for _, hears in both]
  for process, _ in both:
    process.join()
  for ids, encoded in found:
    np.testing.assert_array_equal(ids, stream(documents))
    assert encoded > 0
  assert sum(encoded for _, encoded in found) == COUNT


def test_helpers_are_started_and_end(
  documents: sources.Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(helpers, '_WORTH_SECONDS', 0.0)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1})
  processes = []
  start = helpers._started

  def noted(sent: bytes) -> object:
    processes.append(start(sent))
    return processes[-1]

  monkeypatch.setattr(helpers, '_started', noted)
  # Long enough for the other one to import what it needs.
  tokenizer = SlowTokenizer(0.5)
  cache = TokenCache.open(documents, tokenizer)
  assert cache.read(0, len(cache)).tolist() == stream(documents)
  assert len(processes) == 1
  assert processes[0].poll() is not None
  assert tokenizer.encoded < COUNT


def test_a_helper_ends_with_the_process_that_started_it(
  documents: sources.Documents,
) -> None:
  tokenizer = SlowTokenizer(0.5)
  folder = folder_of(documents)
  plan = encoding.Plan.of(folder, documents, 257, 256)
  sent = pickle.dumps(encoding.Encoding(folder, documents, tokenizer, plan))
  helper = helpers._started(sent)
  wait_for_files(folder, 1)
  assert helper.stdin is not None
  helper.stdin.close()  # as the end of that process does
  assert helper.wait(60) == 1
