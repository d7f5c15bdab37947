"""Pictures of runs, from metrics.jsonl as a run writes it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from moe_jax.analysis import plots, report, runs
from moe_jax.errors import UserError
from moe_jax.training.logger import MetricsWriter

ROOT = Path(__file__).parents[2]


def make_run(
  folder: Path, layers: int = 3, dropped: float = 0.0, points: int = 40
) -> str:
  """A run of 400 steps whose loss and imbalance come down."""
  folder.mkdir()
  with MetricsWriter(str(folder), None) as writer:
    for step in range(10, 10 * points + 1, 10):
      falling = math.exp(-step / 100)
      values = {
        'loss': 1.0 + 4.0 * falling,
        'max_load': np.full(layers, 1.0 + falling),
        'dropped_share': np.full(layers, dropped * falling),
      }
      if not layers:
        values = {'loss': values['loss']}
      writer.write(step, 'train', values)
      if step % 100 == 0:
        loss = 1.1 + 4.0 * falling
        result = {'loss': loss, 'bits_per_byte': loss / math.log(2)}
        writer.write(step, 'validation', result)
  return str(folder)


def test_what_is_read(tmp_path: Path) -> None:
  run = runs.read(make_run(tmp_path / 'mine', layers=3, dropped=0.5))
  assert run.name == 'mine'
  assert run.steps_P.tolist() == list(range(10, 401, 10))
  assert run.loss_P[0] == 1.0 + 4.0 * math.exp(-0.1)
  assert run.max_load_PW.shape == run.dropped_PW.shape == (40, 3)
  assert [row['step'] for row in run.evaluations['validation']] == [
    100,
    200,
    300,
    400,
  ]


def test_an_evaluation_may_be_of_the_split_of_training(tmp_path: Path) -> None:
  workdir = make_run(tmp_path / 'mine')
  row = {'step': 400, 'split': 'train', 'loss': 1.2, 'perplexity': 3.3}
  with open(tmp_path / 'mine' / 'metrics.jsonl', 'a') as file:
    file.write(json.dumps(row) + '\n')
  run = runs.read(workdir)
  assert len(run.steps_P) == 40
  assert run.evaluations['train'] == [row]


def test_smoothing_keeps_constants_and_the_number_of_points() -> None:
  for count in (1, 2, 29, 30, 400):
    assert np.allclose(plots.smooth(np.full(count, 3.0)), np.full(count, 3.0))
  # 45 points: windows of 3, of 2 at the ends.
  squares = plots.smooth(np.arange(45.0) ** 2)
  assert squares[[0, 1, -1]] == pytest.approx(
    [(0 + 1) / 2, (0 + 1 + 4) / 3, (43**2 + 44**2) / 2]
  )


def texts(paths: list[str]) -> str:
  """Everything that a picture of these runs says."""
  figure = plots.draw([runs.read(path) for path in paths])
  said = []
  for axes in figure.axes:
    said += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc='left')]
    said += [text.get_text() for text in axes.texts]
    if axes.get_legend():
      said += [text.get_text() for text in axes.get_legend().get_texts()]
  return '\n'.join(said)


def test_one_run_shows_its_layers(tmp_path: Path) -> None:
  said = texts([make_run(tmp_path / 'mine')]).splitlines()
  assert 'loss, nats per token' in said and 'step' in said
  last = (1.1 + 4.0 * math.exp(-4)) / math.log(2)
  assert f'validation (last: {last:.3f} bits per byte)' in said
  assert {'1', '2', '3'} <= set(said)
  assert not any('dropped' in text for text in said)


def test_dropped_slots_have_a_panel_where_there_are_any(tmp_path: Path) -> None:
  assert 'dropped assignments, %' in texts(
    [make_run(tmp_path / 'a', dropped=0.1)]
  )


def test_a_legend_names_six_layers_of_many(tmp_path: Path) -> None:
  said = texts([make_run(tmp_path / 'deep', layers=24)]).splitlines()
  layers = [text for text in said if text.isdigit()]
  assert len(layers) == 6 and layers[0] == '1' and layers[-1] == '24'


def test_several_runs_are_named(tmp_path: Path) -> None:
  paths = [
    make_run(tmp_path / 'first'),
    make_run(tmp_path / 'second', layers=5),
    make_run(tmp_path / 'dense', layers=0),
  ]
  said = texts(paths).splitlines()
  assert {'first', 'second', 'first: training', 'dense: training'} <= set(said)
  assert 'dense' not in said  # it has no experts to balance


def test_a_dense_run_says_so(tmp_path: Path) -> None:
  assert 'no MoE layer' in texts([make_run(tmp_path / 'dense', layers=0)])


def test_the_program_writes_a_picture(tmp_path: Path) -> None:
  workdir = make_run(tmp_path / 'mine')
  assert plots.main([workdir]) == 0
  picture = matplotlib.image.imread(Path(workdir) / 'curve.png')
  height, width, _ = picture.shape
  assert width >= 1000 and height >= 400
  assert picture.std() > 0.01  # not blank

  other = tmp_path / 'other.png'
  assert plots.main([workdir, f'--output={other}']) == 0
  assert other.exists()


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
  workdir = make_run(tmp_path / 'mine')
  with open(tmp_path / 'mine' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 410, "sp')
  assert runs.read(workdir).steps_P[-1] == 400


def test_mistakes_are_one_line_and_status_2(tmp_path: Path) -> None:
  done = subprocess.run(
    [sys.executable, '-m', 'moe_jax.analysis.plots', str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and 'metrics.jsonl cannot be read' in line


@pytest.mark.parametrize(
  'text, fragment',
  [
    ('', 'no step of training'),
    ('{"step": 1, "split": "validation", "loss": 1}\n', 'no step of training'),
    ('not json\n{"step": 2, "split": "train", "loss": 1}\n', ':1 is not'),
    (
      '{"step": 1, "split": "train", "loss": 1, "max_load": [1]}\n'
      '{"step": 2, "split": "train", "loss": 1, "max_load": [1, 1]}\n',
      'not of one run',
    ),
  ],
)
def test_files_that_are_no_metrics(
  text: str, fragment: str, tmp_path: Path
) -> None:
  (tmp_path / 'metrics.jsonl').write_text(text)
  with pytest.raises(UserError, match=fragment):
    runs.read(str(tmp_path))


def test_an_output_that_cannot_be_written(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = make_run(tmp_path / 'mine')
  for name in ('mine/metrics.jsonl/a.png', 'a.xyz'):
    assert plots.main([workdir, f'--output={tmp_path / name}']) == 2
    assert capsys.readouterr().err.startswith('error: --output: ')


def test_the_file_that_was_written_is_named(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  make_run(tmp_path / 'mine')
  assert plots.main(['~/mine', '--output=~/both']) == 0
  assert capsys.readouterr().out == f'written to {tmp_path}/both.png\n'
  assert (tmp_path / 'both.png').exists()


def test_a_folder_is_no_output(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = make_run(tmp_path / 'mine')
  for main, name in ((plots.main, 'curve.png'), (report.main, 'report.html')):
    assert main([workdir, f'--output={tmp_path}']) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f'is a folder; name a file, such as {tmp_path}/{name}' in line


def test_steps_that_changed_nothing_and_rollbacks_are_not_drawn(
  tmp_path: Path,
) -> None:
  workdir = make_run(tmp_path / 'mine')
  events = [
    {'step': 401, 'split': 'skipped_step', 'loss': 'NaN', 'position': 401},
    {'step': 401, 'split': 'train', 'loss': 'NaN'},
    {'step': 402, 'split': 'rollback', 'reason': 'the loss is nan'},
    {'step': 402, 'split': 'validation', 'loss': 'Infinity'},
  ]
  with open(tmp_path / 'mine' / 'metrics.jsonl', 'a') as file:
    file.writelines(json.dumps(row) + '\n' for row in events)
  run = runs.read(workdir)
  assert run.steps_P[-1] == 400 and np.isfinite(run.loss_P).all()
  assert run.evaluations.keys() == {'validation'}
  assert len(run.evaluations['validation']) == 4
