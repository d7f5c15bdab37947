"""Tasks by their names: found, few of them parsed, and refused in one line."""

from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.evaluation import task_scores, tasks
from moe_jax.evaluation.tasks import SUITES
from moe_jax.programs import eval as eval_program
from tests.helpers import lm_tasks, tiny

ROW = {'text': 'a', 'choices': ['b', 'c'], 'target': 0}


def test_only_the_folders_of_what_is_asked_are_parsed() -> None:
  """Also of what a group names that lies in other folders."""
  manager = tasks._manager(['pythia'], '')
  assert {'lambada_openai', 'arc_easy', 'sciq'} <= set(manager.all_tasks)
  assert len(manager.all_tasks) < 2000
  assert len(tasks._manager(['hellaswag'], '').all_tasks) < 10


def test_the_tasks_of_the_suites_are_there() -> None:
  known = tasks._defined(tasks._BUILTIN)
  for suite in SUITES.values():
    assert suite.keys() <= known.keys()


def test_own_tasks_by_name_tag_group_and_file(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name in ('one', 'two'):
    lm_tasks.multiple_choice(tmp_path, name, [ROW] * 3, tag=['both', 'mine'])
  (tmp_path / 'all.yaml').write_text('group: all\ntask: [one, two]\n')
  path = str(tmp_path / 'two.yaml')
  for asked in ('one,two', 'both', 'mine', f' one , {path}', 'one,two,'):
    found = tasks.load(asked, str(tmp_path)).found
    assert [task.task_name for task in found] == ['one', 'two'], asked
  [group] = tasks.load('all', str(tmp_path)).found
  assert [task.task_name for task in group.get_all_tasks()] == ['one', 'two']
  # The file alone is enough.
  assert len(tasks.load(path).found) == 1
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(tasks.load('~/two.yaml').found) == 1


def test_the_shots_of_a_suite(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  lm_tasks.multiple_choice(tmp_path, 'one', [ROW] * 5, num_fewshot=1)
  monkeypatch.setitem(SUITES, 'mine', {'one': 2})

  def shots(asked: str, given: int | None) -> int:
    [task] = tasks.load(asked, str(tmp_path), given).found
    return task.get_config('num_fewshot')

  assert (shots('one', None), shots('mine', None)) == (1, 2)
  assert shots('mine', 3) == 1  # lm_eval will set what was given


BAD = {
  'nobody': 'names no task',
  'hellaswagg': "no task 'hellaswagg'.*did you mean 'hellaswag'?",
  'rmoe_papre': "did you mean 'rmoe_paper'?",
  'onne': "nor in .*did you mean 'one'?",
  'broken': r'broken.yaml: while parsing a flow node',
  'no_file': "'no_file' cannot be loaded: FileNotFoundError.*nowhere.json",
  'one': '3 examples to show before a question, and 4 are asked for',
  'unsafe': 'runs the programs that a model writes',
  'all,one': 'found in both',
  'empty': "'empty' cannot be loaded: its data are empty",
  '/nowhere/one.yaml': 'there is no file /nowhere/one.yaml',
}


@pytest.mark.parametrize('asked', BAD)
def test_what_is_refused(asked: str, tmp_path: Path) -> None:
  lm_tasks.multiple_choice(tmp_path, 'one', [ROW] * 3)
  lm_tasks.multiple_choice(tmp_path, 'unsafe', [ROW] * 9, unsafe_code=True)
  files = {'data_files': {'test': '/nowhere.json'}}
  lm_tasks.multiple_choice(tmp_path, 'no_file', [ROW], dataset_kwargs=files)
  (tmp_path / 'broken.yaml').write_text('task: broken\ntest: [1,\n')
  (tmp_path / 'all.yaml').write_text('group: all\ntask: [one]\n')
  lm_tasks.multiple_choice(tmp_path, 'empty', [])
  with pytest.raises(UserError, match=BAD[asked]) as error:
    name = '' if asked == 'nobody' else asked
    tasks.load(name, str(tmp_path), 4 if asked == 'one' else None)
  assert '\n' not in str(error.value).strip()


def test_the_network_is_asked_once_and_not_for_long(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(tasks.hub, 'ENDPOINT', 'http://127.0.0.1:9')
  needs = "'hellaswag' needs the network: .*127.0.0.1:9 does not answer"
  with pytest.raises(UserError, match=needs):
    tasks.load('rmoe_paper')
  monkeypatch.setattr(tasks.hub, 'HF_HUB_OFFLINE', True)
  with pytest.raises(UserError, match='HF_HUB_OFFLINE is set'):
    tasks.load('rmoe_paper')
  with pytest.raises(UserError, match="--include_path = '/nowhere' is no fol"):
    tasks.load('rmoe_paper', '/nowhere')
  with pytest.raises(UserError, match='eval.include_path = .* is no folder'):
    tasks.load('rmoe_paper', '/nowhere', key='eval.tasks')


def test_flags_that_nothing_would_heed() -> None:
  check = eval_program._check
  with pytest.raises(UserError, match='--num_fewshot is for tasks'):
    check(None, None, None, {'num_fewshot': 5})
  with pytest.raises(UserError, match="--split = 'test' is of the data"):
    check('one', 'test', None, {})
  with pytest.raises(UserError, match='--limit = -1 must be a number above 0'):
    check('one', None, None, {'limit': -1})
  with pytest.raises(UserError, match='--limit = inf must be a number'):
    check('one', None, None, {'limit': float('inf')})
  with pytest.raises(UserError, match='set --config.eval.disable_top=1'):
    check('one', None, '0,1', {})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(
    task_scores.importlib.util, 'find_spec', lambda name: None
  )
  with pytest.raises(UserError, match=r"pip install 'moe_jax\[eval\]'"):
    task_scores.evaluate(
      tiny.config(), '/nowhere', task_scores.TaskOptions('one')
    )


@pytest.mark.parametrize('size', [97, 515])
def test_a_checkpoint_without_its_tokenizer(size: int) -> None:
  """Twice the ids of the one that is there are no padding."""
  check = task_scores._check_tokenizer
  for padded in (0, 257, 512):
    check(tiny.config(model__vocab_size=padded), '')
  told = f"data.tokenizer = 'bytes' has 257 ids and the model {size}"
  with pytest.raises(UserError, match=f'no tokenizer of its own: {told}'):
    check(tiny.config(model__vocab_size=size), '')
