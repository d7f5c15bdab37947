"""metrics.jsonl, TensorBoard files and the lines a user reads."""

import io
import json
import math
import resource
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moe_jax import disk
from moe_jax.errors import RetryableError, UserError
from moe_jax.training import terminal
from moe_jax.training.logger import Logger
from moe_jax.training.metrics_writer import MetricsWriter, holes
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
  with MetricsWriter(str(tmp_path), None) as writer:
    writer.write(1, 'train', values)
    (row,) = rows(tmp_path)  # already there: every line is flushed
  assert list(row)[:2] == ['step', 'split']
  assert row.pop('split') == 'train' and row.pop('step') == 1
  assert row.keys() == values.keys()
  for name, value in values.items():
    assert np.array_equal(row[name], np.asarray(value)), name


def test_numbers_that_json_lacks_are_strings(tmp_path: Path) -> None:
  values = {'loss': math.nan, 'norms': [1.0, -math.inf, math.inf]}
  with MetricsWriter(str(tmp_path), None) as writer:
    writer.write(1, 'train', values)
  (row,) = rows(tmp_path)
  assert row['loss'] == 'NaN' and math.isnan(float(row['loss']))
  assert row['norms'] == [1.0, '-Infinity', 'Infinity']
  assert [float(norm) for norm in row['norms']] == values['norms']


def test_no_step_stands_twice_after_a_resume(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None) as writer:
    for step in range(1, 6):
      writer.write(step, 'train', {'loss': 1.0})
    writer.write(3, 'validation', {'loss': 2.0})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 6, "spl')  # cut short by a crash
  with MetricsWriter(str(tmp_path), 3) as writer:
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
  MetricsWriter(str(tmp_path), 9).close()
  assert rows(tmp_path) == [{'step': 1}]


def test_a_new_start_keeps_the_lines_of_another(tmp_path: Path) -> None:
  """As where checkpoints are gone, or there is none yet."""
  told: list[str] = []
  for number in (1, 2):
    with MetricsWriter(str(tmp_path), None, tell=told.append) as writer:
      writer.write(number, 'train', {'loss': 1.0})
  assert [row['step'] for row in rows(tmp_path)] == [2]
  aside = tmp_path / 'metrics.jsonl.1'
  assert json.loads(aside.read_text())['step'] == 1
  (said,) = told
  assert 'has 1 lines, to step 1' in said and str(aside) in said
  MetricsWriter(str(tmp_path), None, tell=told.append).close()
  assert json.loads((tmp_path / 'metrics.jsonl.2').read_text())['step'] == 2
  assert rows(tmp_path) == []
  MetricsWriter(str(tmp_path), None, tell=told.append).close()
  assert len(told) == 2 and not (tmp_path / 'metrics.jsonl.3').exists()


def test_what_is_dropped_is_told(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None) as writer:
    for step in range(1, 6):
      writer.write(step, 'train', {'loss': 1.0})
  told: list[str] = []
  with MetricsWriter(str(tmp_path), 3, tell=told.append):
    pass
  (said,) = told
  assert 'steps 4 to 5 are dropped' in said
  MetricsWriter(str(tmp_path), 3, tell=told.append).close()
  assert told == [said]


@pytest.mark.parametrize(
  'there, every, last, expected',
  [
    ([1, 2, 3], 1, 3, []),
    ([10, 20], 10, 29, []),
    ([10, 20], 10, 30, [(21, 30)]),
    ([], 1, 55, [(1, 55)]),
    ([1, 2, 30, 31], 1, 31, [(3, 29)]),
    ([40, 50], 10, 50, [(1, 39)]),
    # It was stopped at 24 and 27, and went on.
    ([10, 20, 24, 27, 30, 40], 10, 45, []),
    # It wrote more rarely at first, or more often.
    ([10, 20, 21, 22, 23], 1, 23, []),
    ([10, 20], 1, 25, []),
    ([1, 2, 3, 10, 20], 10, 20, []),
  ],
)
def test_missing_lines(
  there: list[int], every: int, last: int, expected: list[tuple[int, int]]
) -> None:
  assert holes(there, every, last) == expected


def test_missing_lines_are_told(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None) as writer:
    for step in (1, 2, 3, 8, 9):
      writer.write(step, 'train', {'loss': 1.0})
    for step in (3, 9):
      writer.write(step, 'validation', {'loss': 1.0})
  told: list[str] = []
  every = {'train': 1, 'evaluation': 3}
  MetricsWriter(str(tmp_path), 9, every=every, tell=told.append).close()
  path = tmp_path / 'metrics.jsonl'
  assert told == [
    f'note: {path} lacks lines of train: there are none of steps 4 to 7',
    f'note: {path} lacks lines of validation: there are none of steps 4 to 8',
  ]
  path.unlink()
  MetricsWriter(str(tmp_path), 9, every=every, tell=told.append).close()
  assert told[2:] == [
    f'note: {path} lacks lines of train: there are none of steps 1 to 9'
  ]


def test_whether_the_step_gone_on_from_was_evaluated(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None) as writer:
    writer.write(3, 'train', {'loss': 1.0})
    writer.write(3, 'validation', {'loss': 1.0})
    writer.write(4, 'train', {'loss': 1.0})
  for step, expected in ((4, False), (3, True)):
    with MetricsWriter(str(tmp_path), step) as writer:
      assert writer.evaluated == expected


def test_a_full_disk_leaves_whole_lines(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Of a line that has no room nothing stays; all others stay."""
  monkeypatch.setattr(disk, '_RETRY_SECONDS', 0.0)
  path = tmp_path / 'metrics.jsonl'
  told: list[str] = []
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  with MetricsWriter(str(tmp_path), None, tell=told.append) as writer:
    writer.write(1, 'train', {'loss': 1.0})
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
      with pytest.raises(RetryableError, match=r'metrics\.jsonl cannot be'):
        writer.write(2, 'train', {'loss': 1.0})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.stat().st_size == size
    writer.write(2, 'train', {'loss': 1.0})
  assert [row['step'] for row in rows(tmp_path)] == [1, 2]


def test_tensorboard_is_given_up_where_it_cannot_be_written(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(disk, '_RETRY_SECONDS', 0.0)
  told: list[str] = []
  with MetricsWriter(str(tmp_path), None, tell=told.append) as writer:
    (events,) = (tmp_path / 'tensorboard').iterdir()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size, hard))
    try:
      for step in range(100):
        writer._events.log(step, {'loss': 1.0}, {})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    writer.write(1, 'train', {'loss': 1.0})
  (said,) = told
  assert f'{tmp_path}/tensorboard cannot be written' in said
  assert [row['step'] for row in rows(tmp_path)] == [1]


def test_what_is_not_what_it_should_be_is_one_line(tmp_path: Path) -> None:
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(UserError, match=r'metrics\.jsonl cannot be .* directory'):
    MetricsWriter(str(tmp_path), None)
  (tmp_path / 'metrics.jsonl').rmdir()
  (tmp_path / 'tensorboard').write_text('')
  with pytest.raises(UserError, match='tensorboard is not a folder'):
    MetricsWriter(str(tmp_path), None)


def test_nobody_need_read_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*args: object, **kwargs: object) -> None:
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr('builtins.print', fail)
  said = Logger.__new__(Logger)
  said._active = True
  said.say('step 1')


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
  for broken in ('oops', '[1]', '{"stp": 1}'):
    (tmp_path / 'metrics.jsonl').write_text(f'{broken}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match='metrics.jsonl:1 is not'):
      MetricsWriter(str(tmp_path), 2)


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None) as writer:
    writer.write(7, 'train', {'loss': 1.5, 'per_layer': [1.0, 2.0]})
  values = [
    (event.step, value.tag, value.simple_value)
    for event in runs.events(tmp_path)
    for value in event.summary.value
  ]
  assert values == [(7, 'train/loss', 1.5)]


def test_tensorboard_has_details_and_pictures(tmp_path: Path) -> None:
  pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  details = {'entropy/layer_1A': 0.5, 'entropy/layer_1B': math.nan}
  with MetricsWriter(str(tmp_path), None) as writer:
    writer.write(7, 'train', {'loss': 1.5}, details, {'load': pixels})
  (row,) = rows(tmp_path)
  assert row.keys() == {'step', 'split', 'loss'}
  found = {
    value.tag: value
    for event in runs.events(tmp_path)
    for value in event.summary.value
  }
  assert found.keys() == {'train/loss', 'entropy/layer_1A', 'load'}
  assert found['entropy/layer_1A'].simple_value == 0.5
  picture = Image.open(io.BytesIO(found['load'].image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
  with MetricsWriter(str(tmp_path), None, active=False) as writer:
    writer.write(1, 'train', {'loss': 1.0})
  assert not list(tmp_path.iterdir())


def test_progress_line() -> None:
  line = terminal.progress_line(120, 1000, 3.45123, 45_210.0, 80.4)
  assert line == (
    'step  120/1000   12%  loss 3.4512  45.2k tokens/s  1m20s left'
  )
  for wait, told in ((0.04, ''), (0.123, '  12% waiting for data')):
    line = terminal.progress_line(
      120, 1000, 3.45123, 45_210.0, 80.4, None, wait
    )
    assert line.endswith(f'45.2k tokens/s{told}  1m20s left')


def test_the_share_of_time_in_which_data_lacked(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  said = Logger.__new__(Logger)
  said._tokens_per_step, said._start, said._read_at = 10, 0, 4
  said._since, said._paused, said._waited_before = 100.0, 2.0, 1.0
  said._waited = 3.0
  monkeypatch.setattr('time.perf_counter', lambda: 110.0)
  # 2 seconds of the 8 that were no pause, in which there were 4 steps.
  assert said._pace(8) == (40 / 8, 2 / 8)
  monkeypatch.setattr('time.perf_counter', lambda: 114.0)
  assert said._pace(10) == (20 / 4, 0)


def test_progress_line_says_whether_experts_live() -> None:
  line = terminal.progress_line(
    120, 1000, 3.45123, 45_210.0, 80.4, load=(1.8123, 3)
  )
  assert '  loss 3.4512  load 1.8x idle 3  45.2k tokens/s' in line


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
