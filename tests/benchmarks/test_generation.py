"""The generation benchmark: its sides, and what it refuses."""

import argparse
import json

import pytest

from benchmarks import generation
from benchmarks.peer_sizes import Sizes

TINY = Sizes(16, 2, 2, 1, 8, 4, 2, vocab_size=257, batch_size=2, seq_len=8)


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--model=mixtral_18', "--model = 'mixtral_18' is not known"),
    ('--batches=1,x', "--batches = '1,x' must be numbers of rows"),
    ('--batches=0', "--batches = '0' must be numbers of rows"),
    ('--tokens=0', '--context and --tokens must be at least 1'),
  ],
)
def test_mistakes_are_one_line(
  flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
  with pytest.raises(SystemExit) as stop:
    generation.main([flag])
  told = capsys.readouterr().err
  assert stop.value.code == 2
  assert told.startswith(f'error: {message}') and told.count('\n') == 1


@pytest.mark.slow
def test_every_side_answers() -> None:
  args = argparse.Namespace(tokens=2, rounds=1, warmup=0, threads=1)
  row = generation.measure(TINY, args)
  ours = {generation.CACHED, generation.COPIED, generation.UNCACHED}
  assert ours <= set(row['tokens_per_second'])
  assert row['speedup'][generation.CACHED] == 1
  assert all(speed > 0 for speed in row['tokens_per_second'].values())
  assert row['facts'][generation.UNCACHED]['tokens'] == 1
  json.dumps(row)
