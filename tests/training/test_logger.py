"""metrics.jsonl, TensorBoard files and the lines a user reads."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.training import logger, terminal
from tests.helpers import runs


def rows(directory: Path) -> list[dict]:
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_floats_come_back_exactly(tmp_path: Path) -> None:
  values = {
    'loss': np.float32(0.1),
    'third': 1 / 3,
    'tiny': 5e-324,
    'on_device': jnp.float32(2.5),
    'tokens': 2**60 + 1,
    'per_layer': jnp.arange(3.0) / 3,
  }
  with logger.MetricsWriter(str(tmp_path), None) as writer:
    writer.write(1, 'train', values)
    (row,) = rows(tmp_path)  # already there: every line is flushed
  assert list(row)[:2] == ['step', 'split']
  assert row.pop('split') == 'train' and row.pop('step') == 1
  assert row.keys() == values.keys()
  for name, value in values.items():
    assert np.array_equal(row[name], np.asarray(value)), name


def test_numbers_that_json_lacks_are_strings(tmp_path: Path) -> None:
  values = {'loss': math.nan, 'norms': [1.0, -math.inf, math.inf]}
  with logger.MetricsWriter(str(tmp_path), None) as writer:
    writer.write(1, 'train', values)
  (row,) = rows(tmp_path)
  assert row['loss'] == 'NaN' and math.isnan(float(row['loss']))
  assert row['norms'] == [1.0, '-Infinity', 'Infinity']
  assert [float(norm) for norm in row['norms']] == values['norms']


def test_no_step_stands_twice_after_a_resume(tmp_path: Path) -> None:
  with logger.MetricsWriter(str(tmp_path), None) as writer:
    for step in range(1, 6):
      writer.write(step, 'train', {'loss': 1.0})
    writer.write(3, 'validation', {'loss': 2.0})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 6, "spl')  # cut short by a crash
  with logger.MetricsWriter(str(tmp_path), 3) as writer:
    writer.write(4, 'train', {'loss': 9.0})
  told = [(row['step'], row['split'], row['loss']) for row in rows(tmp_path)]
  assert told == [
    (1, 'train', 1.0),
    (2, 'train', 1.0),
    (3, 'train', 1.0),
    (3, 'validation', 2.0),
    (4, 'train', 9.0),
  ]
  starts = [
    event for event in runs.events(tmp_path) if event.session_log.status
  ]
  assert [event.step for event in starts] == [0, 4]  # TensorBoard hides 4, 5


def test_a_torn_line_of_a_step_kept_is_dropped_too(tmp_path: Path) -> None:
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n{"step": 2, "\xc3')
  logger.MetricsWriter(str(tmp_path), 9).close()
  assert rows(tmp_path) == [{'step': 1}]


def test_a_new_start_forgets_a_run_without_checkpoint(tmp_path: Path) -> None:
  with logger.MetricsWriter(str(tmp_path), None) as writer:
    writer.write(0, 'validation', {'loss': 1.0})
  logger.MetricsWriter(str(tmp_path), None).close()
  assert rows(tmp_path) == []


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
  for broken in ('oops', '[1]', '{"stp": 1}'):
    (tmp_path / 'metrics.jsonl').write_text(f'{broken}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match='metrics.jsonl:1 is not'):
      logger.MetricsWriter(str(tmp_path), 2)


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
  with logger.MetricsWriter(str(tmp_path), None) as writer:
    writer.write(7, 'train', {'loss': 1.5, 'per_layer': [1.0, 2.0]})
  values = [
    (event.step, value.tag, value.simple_value)
    for event in runs.events(tmp_path)
    for value in event.summary.value
  ]
  assert values == [(7, 'train/loss', 1.5)]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
  with logger.MetricsWriter(str(tmp_path), None, active=False) as writer:
    writer.write(1, 'train', {'loss': 1.0})
  assert not list(tmp_path.iterdir())


def test_progress_line() -> None:
  line = terminal.progress_line(120, 1000, 3.45123, 45_210.0, 80.4)
  assert line == (
    'step  120/1000   12%  loss 3.4512  45.2k tokens/s  1m20s left'
  )


@pytest.mark.parametrize(
  'seconds, text',
  [
    (7.4, '7s'),
    (59.9, '1m00s'),
    (3660, '1h01m'),
    (93_600, '1d02h'),
    (math.inf, '?'),
  ],
)
def test_duration(seconds: float, text: str) -> None:
  assert terminal.duration(seconds) == text


def test_summary_table() -> None:
  table = terminal.summary_table(
    [('', 'train', 'validation'), ('loss', '1.25', '1.5'), ('steps', '9', '')]
  )
  assert table.split('\n') == [
    '       train  validation',
    '-----  -----  ----------',
    'loss    1.25         1.5',
    'steps      9',
  ]
