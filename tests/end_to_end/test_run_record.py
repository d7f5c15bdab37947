"""What a run tells of itself, its traces, and evaluations of a user's own."""

import gzip
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.evaluation import Result
from moe_jax.registry import EVALUATIONS, TRACKERS
from moe_jax.training import loop, step
from moe_jax.training.state import Setup
from moe_jax.training.trackers import TrackedRun
from tests.helpers import registries, runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'model.num_layers': 1,
      'train.steps': 4,
      'train.profile': '3:2',
      'train.router_gradients_every': 2,
      'checkpoint.every': 4,
      'eval.every': 0,
    }
  )


@pytest.fixture(scope='module')
def run(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
  """The workdir of a run, and what it printed."""
  workdir = tmp_path_factory.mktemp('run')
  with pytest.MonkeyPatch.context() as patch:
    lines: list[str] = []
    patch.setattr('builtins.print', lambda *a, **_: lines.append(str(a[0])))
    loop.train(config, str(workdir))
  return workdir, '\n'.join(lines)


def test_what_ran_is_told_and_kept(run: tuple[Path, str]) -> None:
  workdir, text = run
  kept = runs.read_json(workdir / 'run.json')
  [start] = kept['starts']
  assert start['resolved']['dtype'] == 'float32'
  assert start['resolved']['grouped_matmul'] == 'blocks'
  assert start['resolved']['attention'] == 'blocks'
  for part, name in start['resolved'].items():
    assert f'{part.replace("_", " ")} {name}' in text
  assert start['versions']['jax'] == importlib.metadata.version('jax')
  assert start['step'] == 0 and start['processes'] == 1
  told = f'{start["parameters"]:,} parameters, {start["active_parameters"]:,} a'
  assert told in text
  row = runs.rows(workdir, 'train')[-1]
  devices = int(start['devices'].split()[0])
  logged = 1e12 * row['tflops_per_second'] * devices / row['tokens_per_second']
  assert start['flops_per_token'] == pytest.approx(logged)
  assert kept['extensions'] == []
  # Told before the silence.
  assert text.index('compiling') < text.index('first step after')


def test_a_resumed_run_adds_its_start(
  config: ConfigDict, run: tuple[Path, str]
) -> None:
  workdir, _ = run
  name = runs.read_json(workdir / 'run.json')['id']
  loop.train(config, str(workdir))
  kept = runs.read_json(workdir / 'run.json')
  assert [start['step'] for start in kept['starts']] == [0, 4]
  assert kept['id'] == name and len(name) == 8


def test_a_trace_holds_the_steps_that_were_named(
  run: tuple[Path, str],
) -> None:
  workdir, _ = run
  [perfetto] = (workdir / 'profile').rglob('perfetto_trace.json.gz')
  assert list((workdir / 'profile').rglob('*.xplane.pb'))  # TensorBoard's
  events = json.loads(gzip.decompress(perfetto.read_bytes()))['traceEvents']
  steps = {
    event['args']['step_num']
    for event in events
    if event.get('name') == 'train'
  }
  assert steps == {'3', '4'}


def test_tensorboard_has_the_config(
  config: ConfigDict, run: tuple[Path, str]
) -> None:
  texts = [
    value.tensor.string_val[0].decode()
    for event in runs.events(run[0])
    for value in event.summary.value
    if value.tag.startswith('config')
  ]
  assert texts and all(f'"seed": {config.seed}' in text for text in texts)


def test_the_routers_gradients_are_logged_where_they_are_measured(
  run: tuple[Path, str],
) -> None:
  logged = {row['step']: row for row in runs.rows(run[0], 'train')}
  assert logged.keys() == {2, 4}  # and train.log_every is 10
  found = {
    (event.step, value.tag): value.simple_value
    for event in runs.events(run[0])
    for value in event.summary.value
  }
  for number, row in logged.items():
    for name in ('cross_entropy_gradient', 'balance_loss_gradient'):
      [[norm]] = row[f'routing/{name}']
      assert found[number, f'{name}/layer_1'] == np.float32(norm) > 0


def test_a_users_own_evaluation(
  config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """One class and one line, in training and of a checkpoint."""
  registries.forget(monkeypatch, EVALUATIONS)

  @EVALUATIONS.register('sizes')
  class Sizes:
    def __init__(self, setup: Any, split: str) -> None:
      self._split = split

    def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
      size = int(params['embed_VD'].size)
      return [Result(self._split, {'size': size}, '-sizes')]

  own = config.copy_and_resolve_references()
  own.eval.evaluations = 'perplexity, sizes'
  own.eval.every = own.train.steps = 2
  own.train.profile = ''
  loop.train(own, str(tmp_path))
  [row] = runs.rows(tmp_path, 'validation-sizes')
  assert len(runs.rows(tmp_path, 'validation')) == 1
  results = runs.evaluation.evaluate(own, str(tmp_path))
  assert list(results) == ['validation', 'validation-sizes']
  assert results['validation-sizes']['size'] == row['size'] > 0
  written = runs.read_json(tmp_path / 'evaluation' / 'validation-2-sizes.json')
  assert written == {'split': 'validation', 'step': 2, 'size': row['size']}


def test_evaluations_at_their_own_intervals(
  config: ConfigDict,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """With split and budget, in lines, table, TensorBoard and tracker."""
  registries.forget(monkeypatch, EVALUATIONS, TRACKERS)
  tracked: list[tuple[str, int, set[str]]] = []

  @TRACKERS.register('kept')
  class Kept:
    def __init__(self, run: TrackedRun) -> None:
      self._id = run.id

    def log(self, step: int, scalars: Any, pictures: Any) -> None:
      tracked.append((self._id, step, {*scalars, *pictures}))

    def close(self) -> None:
      tracked.append((self._id, -1, set()))

  called: list[tuple[str, int]] = []

  @EVALUATIONS.register('sample')
  class Sample:
    def __init__(self, setup: Any, split: str) -> None:
      self._split = split

    def __call__(self, params: Any, max_batches: int = 0) -> list[Result]:
      called.append((self._split, max_batches))
      text = f'written\non {self._split}'
      return [Result('sample', {'length': len(called)}, text=text)]

  own = config.copy_and_resolve_references()
  own.eval.evaluations = (
    'perplexity, perplexity:split=train[:50%]:batches=1:every=4,'
    'sample:every=3:split=test:batches=7'
  )
  own.eval.every, own.train.steps = 2, 5
  own.train.profile, own.checkpoint.every = '', 5
  own.train.tracker = 'kept'
  make_eval_step, made = step.make_eval_step, []

  def counted(setup: Setup) -> Any:
    made.append(1)
    return make_eval_step(setup)

  monkeypatch.setattr(step, 'make_eval_step', counted)
  loop.train(own, str(tmp_path))
  steps = {
    split: [row['step'] for row in runs.rows(tmp_path, split)]
    for split in ('validation', 'train[:50%]', 'sample')
  }
  # All of them at the end.
  assert steps['validation'] == [2, 4, 5]
  assert steps['train[:50%]'] == [4, 5]
  assert steps['sample'] == [3, 5]
  assert called == [('test', 7), ('test', 7)]
  assert made == [1]  # both splits have one program
  one_batch = own.train.batch_size * own.data.seq_len
  whole, cut, samples = [runs.rows(tmp_path, split) for split in steps]
  assert all(row['tokens'] > one_batch for row in whole)
  assert all(row['tokens'] == one_batch for row in cut)
  assert [row['text'] for row in samples] == ['written\non test'] * 2
  printed = capsys.readouterr().out
  assert 'step 3  sample: length 1 (' in printed
  assert printed.count('\nwritten\non test\n') == 2
  table = printed[printed.index('split ') :].splitlines()
  assert {line.split()[0] for line in table[2:6]} == {'train', *steps}
  values = [(e, v) for e in runs.events(tmp_path) for v in e.summary.value]
  lengths = [
    (e.step, v.simple_value) for e, v in values if v.tag == 'sample/length'
  ]
  assert lengths == [(3, 1.0), (5, 2.0)]
  texts = [
    v.tensor.string_val[0].decode()
    for _, v in values
    if v.tag.startswith('sample') and v.tensor.string_val
  ]
  ids, numbers, names = zip(*tracked, strict=True)
  assert {*ids} == {runs.read_json(tmp_path / 'run.json')['id']}
  assert [
    n for n, each in zip(numbers, names, strict=True) if 'sample/length' in each
  ] == [3, 5]
  assert numbers[-1] == -1 and 'train/loss' in names[0]
  assert {'expert_load', 'max_violation/layer_1'} <= names[0]
  assert texts == ['    written\n    on test\n'] * 2

  results = runs.evaluation.evaluate(own, str(tmp_path))
  assert results.keys() == steps.keys()
  kept = runs.read_json(tmp_path / 'evaluation' / 'sample-5.json')
  assert kept['text'] == 'written\non test'
  [only, _] = runs.evaluation.evaluate(own, str(tmp_path), split='validation')
  assert only == 'validation'


@pytest.mark.parametrize('name', EVALUATIONS)
def test_evaluations_of_the_library_say_what_is_missing(
  name: str, config: ConfigDict
) -> None:
  wrong = config.copy_and_resolve_references()
  wrong.eval.evaluations = name
  wrong.eval.every = 1
  wrong.eval.split = wrong.eval.tasks = 'nowhere'
  with pytest.raises(UserError, match='nowhere'):
    loop.prepare(wrong)
