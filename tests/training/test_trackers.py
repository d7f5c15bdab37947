"""Trackers are told what TensorBoard is, and end no run."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.registry import TRACKERS
from moe_jax.training import trackers
from moe_jax.training.metrics_writer import MetricsWriter
from moe_jax.training.trackers import TrackedRun, Tracking
from tests.helpers import registries, tiny

PICTURE = np.zeros((2, 3, 3), np.uint8)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  (tmp_path / 'run.json').write_text('{"id": "0a1b2c3d", "starts": []}')
  return tmp_path


def config(tracker: str) -> ConfigDict:
  return tiny.config(train__tracker=tracker)


class Kept:
  """A tracker that keeps what it is told."""

  def __init__(self, run: TrackedRun) -> None:
    self.run = run
    self.told: list[tuple[int, dict[str, float], list[str]]] = []

  def log(
    self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Any]
  ) -> None:
    self.told.append((step, dict(scalars), list(pictures)))

  def close(self) -> None:
    self.told.append((-1, {}, []))


def test_a_users_own_is_told_the_run_and_its_numbers(
  workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  registries.forget(monkeypatch, TRACKERS)
  made: list[Kept] = []

  @TRACKERS.register('kept')
  def kept(run: TrackedRun) -> Kept:
    made.append(Kept(run))
    return made[-1]

  trackers.check(config('kept'))
  tracking = Tracking(config('kept'), str(workdir), print)
  tracking.open()
  values = {'loss': 1.5, 'per_layer': [1.0, 2.0], 'z_loss': float('nan')}
  with MetricsWriter(str(workdir), None, tracking=tracking) as writer:
    writer.write(
      7, 'train', values, {'entropy/layer_1': 0.5}, {'load': PICTURE}
    )
  with MetricsWriter(str(workdir), 7, tracking=tracking) as writer:
    writer.write(8, 'validation', {'tokens': 3})
  tracking.close()
  [tracker] = made
  assert tracker.told == [
    (7, {'train/loss': 1.5, 'entropy/layer_1': 0.5}, ['load']),
    (8, {'validation/tokens': 3}, []),
    (-1, {}, []),
  ]
  assert tracker.run.id == '0a1b2c3d'
  assert tracker.run.name == workdir.name
  assert tracker.run.config['moe.num_experts'] == 8


@pytest.mark.parametrize('place', ['__init__', 'log', 'close'])
def test_one_that_fails_is_told_and_given_up(
  place: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  registries.forget(monkeypatch, TRACKERS)
  calls: list[str] = []

  def failing(name: str) -> Any:
    def call(*args: Any) -> None:
      calls.append(name)
      if name == place:
        raise ConnectionError('no such\nserver')

    return call

  methods = {name: failing(name) for name in ('__init__', 'log', 'close')}
  TRACKERS.register('failing')(type('Failing', (), methods))
  told: list[str] = []
  tracking = Tracking(config('failing'), str(workdir), told.append)
  tracking.open()
  tracking.log(1, {}, {})
  tracking.log(2, {}, {})
  tracking.close()
  [line] = told
  assert line.startswith(
    "train.tracker = 'failing': ConnectionError: no such s"
  )
  assert calls[-1] == place and calls.count(place) == 1


def test_no_tracker_is_none(workdir: Path) -> None:
  trackers.check(config(''))
  tracking = Tracking(config(''), str(workdir), pytest.fail)
  tracking.open()
  tracking.log(1, {}, {})
  tracking.close()


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_package_that_is_not_there_is_named(
  name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(UserError) as error:
    trackers.check(config(name))
  assert str(error.value) == (
    f"train.tracker = '{name}' needs the package {name}:"
    f" pip install 'moe_jax[{name}]'"
  )


_STARTS = """
import sys
import numpy as np
from moe_jax.training.trackers import Tracking
from tests.helpers import tiny

for first in (1, 3):
  config = tiny.config(train__tracker=sys.argv[1])
  tracking = Tracking(config, sys.argv[2], lambda line: sys.exit(line))
  tracking.open()
  for step in (first, first + 1):
    tracking.log(step, {'train/loss': step / 2}, {})
  tracking.log(step, {}, {'load': np.zeros((2, 3, 3), np.uint8)})
  tracking.close()
"""


def two_starts(name: str, workdir: Path, **env: str) -> None:
  """A run, and what goes on with it, in a process without a network."""
  pytest.importorskip(name)
  root = Path(__file__).parents[2]
  ran = subprocess.run(
    [sys.executable, '-c', _STARTS, name, str(workdir)],
    env=os.environ | env,
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_wandb_has_both_starts_as_one_run_on_this_machine(
  workdir: Path,
) -> None:
  two_starts('wandb', workdir, WANDB_MODE='offline')
  folders = sorted((workdir / 'wandb').glob('offline-run-*'))
  assert len(folders) == 2
  for folder in folders:
    assert folder.name.endswith('-0a1b2c3d')  # `wandb sync` joins them by it
    records = (folder / 'run-0a1b2c3d.wandb').read_bytes()
    assert b'train/loss' in records and b'moe.num_experts' in records
    assert list((folder / 'files' / 'media' / 'images').glob('load_*.png'))


@pytest.mark.slow
def test_trackio_goes_on_with_the_run(workdir: Path) -> None:
  two_starts('trackio', workdir, TRACKIO_DIR=str(workdir / 'kept'))
  with sqlite3.connect(workdir / 'kept' / 'moe_jax.db') as database:
    rows = database.execute(
      'SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id'
    ).fetchall()
  assert {row[:2] for row in rows} == {(rows[0][0], f'{workdir.name}-0a1b2c3d')}
  found = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
  assert [
    (step, x['train/loss']) for step, x in found if 'train/loss' in x
  ] == [(step, step / 2) for step in (1, 2, 3, 4)]
  pictures = [(step, x['load']['_type']) for step, x in found if 'load' in x]
  assert pictures == [(2, 'trackio.image'), (4, 'trackio.image')]
