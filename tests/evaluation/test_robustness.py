"""`--disable_top`: every part of a model without its tokens' best experts."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import cli, evaluation, runtime
from moe_jax.config import evaluations
from moe_jax.data import folders
from moe_jax.errors import UserError
from moe_jax.evaluation import Result, checkpoints, robustness
from moe_jax.interop import checkpoint
from moe_jax.programs import eval as program
from moe_jax.training import state
from tests.helpers import oracle, tiny

EOS = 256
# Of a mean loss in float32: the parameters are large, so rounding moves it by
# 1.4e-6 as XLA orders the sums. Without a part it differs by more than 1e-5.
RELATIVE = 5e-6

SIZES = {
  'model.vocab_size': EOS + 1,
  'model.hidden_size': 8,
  'model.num_heads': 2,
  'model.num_kv_heads': 2,
  'model.ffn_width': 12,
  'moe.expert_width': 8,
  'router.state_size': 4,
  'data.name': 'text_folder',
  'eval.batch_size': 8,
}
MODELS = {
  # An MoE layer before the pattern repeats, and two periods of a dense one and
  # an MoE layer.
  'cartesian rmoe': {
    'model.num_layers': 5,
    'moe.every': 2,
    'moe.factors': 2,
    'router.recurrent': 'gru',
  },
  'top-p, with a bias': {
    'router.selection': 'top_p',
    'loss.bias_rate': 0.01,
  },
}
# What each part does without, router by router.
PARTS = {
  'cartesian rmoe': {
    'all': (1, 1, 1, 1, 1, 1),
    'layer 1': (1, 1, 0, 0, 0, 0),
    'layer 3': (0, 0, 1, 1, 0, 0),
    'layer 5': (0, 0, 0, 0, 1, 1),
    'A': (1, 0, 1, 0, 1, 0),
    'B': (0, 1, 0, 1, 0, 1),
    '1A': (1, 0, 0, 0, 0, 0),
    '1B': (0, 1, 0, 0, 0, 0),
    '3A': (0, 0, 1, 0, 0, 0),
    '3B': (0, 0, 0, 1, 0, 0),
    '5A': (0, 0, 0, 0, 1, 0),
    '5B': (0, 0, 0, 0, 0, 1),
  },
  'top-p, with a bias': {
    'all': (1, 1),
    'layer 1': (1, 0),
    'layer 2': (0, 1),
  },
}
TEXT = b'to be, or not to be: that is the question'


def _name(split: str) -> str:
  """The name of a file that belongs to `split`."""
  names = (f'part-{i}.txt' for i in range(200))
  return next(name for name in names if folders.split_of(name) == split)


@pytest.fixture(scope='module')
def made(
  tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, ConfigDict, Any]]:
  """A run of step 0 of each model: its workdir, config and parameters."""
  texts = tmp_path_factory.mktemp('texts')
  for split in ('train', 'validation'):
    (texts / _name(split)).write_bytes(TEXT)
  prepared = tmp_path_factory.mktemp('prepared')
  data = {'data.path': str(texts), 'data.dir': str(prepared)}
  runs_made = {}
  for name, changes in MODELS.items():
    config = tiny.config(**SIZES | changes | data)
    workdir = tmp_path_factory.mktemp('run')
    # Larger, so that a router tells tokens apart.
    params = jax.tree.map(
      lambda leaf: 3 * leaf, checkpoint.initial_params(config)
    )
    checkpoint.write_run(workdir, config, params)
    runs_made[name] = workdir, config, params
  return runs_made


def nats(
  config: ConfigDict, params: Any, disable_top: tuple[int, ...]
) -> float:
  """The mean loss of the text, in float64, router by router."""
  stream = np.array([EOS, *TEXT, EOS])
  length, total = config.data.seq_len, 0.0
  for first in range(0, len(stream) - 1, length):
    targets_L = stream[first + 1 :][:length]
    ids_L = stream[first:][: len(targets_L)]
    sequence = oracle.Sequence(config, params, disable_top=disable_top)
    shares_LV = oracle.softmax(sequence.run(ids_L))
    total -= np.log(shares_LV[np.arange(len(targets_L)), targets_L]).sum()
  return total / (len(stream) - 1)


def call(*arguments: str) -> int:
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
    patch.setattr(sys, 'argv', ['moe_jax eval', *arguments])
    patch.setenv(runtime.SWITCH, '0')
    program.main()
  return int(stop.value.code or 0)


@pytest.mark.slow
def test_every_part_of_every_checkpoint(
  made: dict[str, tuple[Path, ConfigDict, Any]],
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Losses of the oracle, in one table and in a file for every number."""
  workdirs = [str(workdir) for workdir, _, _ in made.values()]
  flags = '--disable_top=0,2', '--config.mesh.expert=2'
  assert call(*workdirs, *flags) == 0
  printed = capsys.readouterr().out
  assert f'checkpoint 2 of 2: {workdirs[1]}, validation' in printed
  lines = [line.split() for line in printed.splitlines()]
  for name, (workdir, config, params) in made.items():
    written = {
      top: json.loads((workdir / 'evaluation' / file).read_text())
      for top, file in (
        (0, 'validation-0.json'),
        (2, 'validation-0-without-top-2.json'),
      )
    }
    usual = nats(config, params, (0,) * len(PARTS[name]['all']))
    assert written[0]['loss'] == pytest.approx(usual, rel=RELATIVE)
    assert 'disabled_top' not in written[0] and 'parts' not in written[0]
    assert written[2]['disabled_top'] == 2
    measured = {'all': written[2]} | written[2]['parts']
    assert measured.keys() == PARTS[name].keys()
    for part, where in PARTS[name].items():
      loss = nats(config, params, tuple(2 * here for here in where))
      assert abs(loss - usual) > 1e-4, part
      assert measured[part]['loss'] == pytest.approx(loss, rel=RELATIVE), part
      numbers = [f'{measured[part][key]:.4f}' for key in ('loss', 'perplexity')]
      row = [str(workdir), 'step', '0', 'validation', *part.split()]
      if part == 'all':
        row += [f'{written[0][key]:.4f}' for key in ('loss', 'perplexity')]
      assert [*row, *numbers] in lines


@pytest.mark.slow
def test_during_training_it_is_all_at_once(
  made: dict[str, tuple[Path, ConfigDict, Any]],
) -> None:
  """Of the numbers of `eval.robustness`, from the registry."""
  _, config, params = made['top-p, with a bias']
  config = config.copy_and_resolve_references()
  config.eval.evaluations = 'robustness'
  config.eval.robustness = '1,3'
  setup = state.from_config(config)
  placed = jax.device_put(
    params, jax.tree.map(lambda a: a.sharding, setup.abstract['params'])
  )
  [opened] = evaluation.make(setup, evaluations.during_training(config))
  results = opened.evaluate(placed)
  assert [each.name for each in results] == [
    'validation-without-top-1',
    'validation-without-top-3',
  ]
  for top, result in zip((1, 3), results, strict=True):
    loss = nats(config, params, (top, top))
    assert result.metrics['loss'] == pytest.approx(loss, rel=RELATIVE)
    assert result.metrics['disabled_top'] == top and not result.parts


def test_the_parts_of_a_single_router() -> None:
  config = tiny.config(**{'model.num_layers': 1})
  assert robustness.parts(config) == {'all': [0]}
  config.moe.factors = 2
  assert robustness.parts(config) == {'all': [0, 1], '1A': [0], '1B': [1]}


MISTAKES = {
  'no number': (['--disable_top=1,x'], ["'1,x'", 'such as 0,1']),
  'twice': (['--disable_top=1,1'], ["'1,1'", 'each once']),
  'too many': (
    ['--disable_top=0,8'],
    ['/run', ': --disable_top = 8 leaves 0 of 8 experts', '7 is the most'],
  ),
  'two ways': (
    ['--disable_top=1', '--workdir=elsewhere'],
    ['beside --workdir', 'several runs without'],
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(
  name: str,
  made: dict[str, tuple[Path, ConfigDict, Any]],
  capsys: pytest.CaptureFixture[str],
) -> None:
  flags, fragments = MISTAKES[name]
  assert call(str(made['top-p, with a bias'][0]), *flags) == 2
  out, err = capsys.readouterr()
  [line] = err.splitlines()
  assert not out
  for fragment in fragments:
    assert fragment in line


@pytest.mark.slow
def test_a_run_that_is_named_twice_is_one(
  made: dict[str, tuple[Path, ConfigDict, Any]],
) -> None:
  first, second = (str(workdir) for workdir, *_ in made.values())
  named = ['moe_jax eval', first, second, f'{first}/', first]
  configs, _ = cli.parse_runs(named, lambda values: None)
  assert list(configs) == [first, second]


@pytest.mark.slow
def test_what_is_found_before_a_broken_run_is_printed(
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  metrics = {'loss': 1.25, 'perplexity': 3.4903}

  def evaluated(config: ConfigDict, workdir: str, *_: Any) -> Any:
    if workdir.endswith('b'):
      raise UserError('the checkpoint is damaged')
    return [Result('validation', metrics)], 7

  monkeypatch.setattr(checkpoints, 'evaluated', evaluated)
  configs = {str(tmp_path / name): tiny.config() for name in 'abc'}
  with pytest.raises(UserError, match='is damaged'):
    checkpoints.robustness(configs, [0])
  [*_, line] = capsys.readouterr().out.strip().splitlines()
  words = [str(tmp_path / 'a'), 'step', '7', 'validation', 'all']
  assert line.split() == [*words, '1.2500', '3.4903']
