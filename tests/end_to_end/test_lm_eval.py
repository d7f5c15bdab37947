"""`moe_jax eval --tasks`: a checkpoint, its own tokenizer, lm-eval's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.training import state
from tests.helpers import lm_tasks, oracle, pairs, runs

STEP = 2
EOS = ByteTokenizer.eos_id
TEXT = 'naïve → texts'


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(**{'model.num_layers': 1, 'eval.batch_size': 8})


@pytest.fixture(scope='module')
def workdir(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """A run that has not learned anything yet."""
  workdir = tmp_path_factory.mktemp('run')
  setup = state.from_config(config)
  with runs.claimed(config, workdir) as checkpointer:
    checkpointer.save(STEP, setup.init() | {'step': jax.numpy.int32(STEP)})
  return workdir


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp('tasks')
  lm_tasks.rolling(folder, 'own_text', [TEXT])
  lm_tasks.generation(folder, 'own_prompts', [TEXT, 'x'], max_gen_toks=3)
  row = {'text': TEXT, 'choices': ['a', 'bc'], 'target': 0}
  lm_tasks.multiple_choice(folder, 'own_choices', [row] * 3)
  return folder


def flags(config: ConfigDict, workdir: Path, folder: Path) -> list[str]:
  tasks = '--tasks=own_text,own_prompts,own_choices'
  where = f'--include_path={folder}'
  return [*runs.arguments(config, workdir), tasks, where]


@pytest.mark.slow
def test_the_program(
  config: ConfigDict,
  workdir: Path,
  folder: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  line = flags(config, workdir, folder)
  for more in ([], ['--log_samples', '--limit=2', '--num_fewshot=0']):
    assert runs.call('eval.py', [*line, *more]) == 0
  printed = capsys.readouterr().out
  evaluation = workdir / 'evaluation'
  names = {path.name for path in evaluation.iterdir()}
  [kept] = [name for name in names if name.startswith(f'tasks-{STEP}_')]
  samples = {
    f'samples-own_{name}-{STEP}.jsonl'
    for name in ('text', 'prompts', 'choices')
  }
  assert names == samples | {kept, f'tasks-{STEP}.json'}
  first, found = (
    runs.read_json(evaluation / name) for name in (kept, f'tasks-{STEP}.json')
  )
  assert {'results', 'configs', 'versions', 'n-shot', 'config'} <= found.keys()
  assert found['config']['model_args'] == {'path': str(workdir), 'step': STEP}
  assert first['n-samples']['own_choices']['effective'] == 3
  assert found['n-samples']['own_choices']['effective'] == 2
  for name in ('own_text', 'own_prompts'):
    assert found['results'][name] == first['results'][name]
  assert '|own_choices|' in printed and f'tasks-{STEP}.json' in printed

  params = runs.restore(config, workdir, STEP)['params']
  ids = [EOS, *TEXT.encode()]
  sequence = oracle.Sequence(config, params)
  rows = np.log(oracle.softmax(sequence.run(np.array(ids[:-1]))))
  bits = -rows[np.arange(len(rows)), ids[1:]].mean() / np.log(2)
  bits_per_byte = found['results']['own_text']['bits_per_byte,none']
  assert len(rows) == config.data.seq_len
  assert bits_per_byte == pytest.approx(bits, rel=1e-6)
  [answer] = answers(workdir, 'own_text')
  assert float(answer) == pytest.approx(-bits * np.log(2) * len(rows))


@pytest.mark.slow
def test_tasks_are_an_evaluation(
  config: ConfigDict, workdir: Path, folder: Path
) -> None:
  """Beside others, as during training; the right answer is not known."""
  asked = config.copy_and_resolve_references()
  asked.eval.evaluations = 'tasks:every=100'
  asked.eval.tasks, asked.eval.include_path = 'own_choices', str(folder)
  assert runs.call('eval.py', runs.arguments(asked, workdir)) == 0
  row = runs.read_json(workdir / 'evaluation' / f'own_choices-{STEP}.json')
  assert row['split'] == 'own_choices' and row['acc'] in (0, 1)


@pytest.mark.slow
def test_two_processes_find_the_same(
  config: ConfigDict, workdir: Path, folder: Path
) -> None:
  found: list[dict[str, Any]] = []
  for together in (True, False):
    changed = config.copy_and_resolve_references()
    changed.mesh.data, changed.mesh.expert = (2, 2) if together else (-1, 1)
    line = [*flags(changed, workdir, folder), '--log_samples']
    if together:
      pairs.finish('eval.py', line)
    else:
      assert runs.call('eval.py', line) == 0
    found.append(
      {name: answers(workdir, f'own_{name}') for name in ('text', 'prompts')}
    )
  two, one = found
  assert float(two['text'][0]) == pytest.approx(float(one['text'][0]), rel=1e-6)
  assert two['prompts'] == one['prompts']


def answers(workdir: Path, task: str) -> list[str]:
  path = workdir / 'evaluation' / f'samples-{task}-{STEP}.jsonl'
  return [json.loads(line)['resps'][0][0] for line in path.open()]
