"""Scores by lm-evaluation-harness, against logits of the oracle, by hand."""

import dataclasses
import os
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data import instructions
from moe_jax.errors import UserError
from moe_jax.evaluation import harness, task_scores, tasks
from moe_jax.evaluation.task_scores import TaskOptions, TaskScores, run_tasks
from moe_jax.training import signals
from moe_jax.training.state import Setup
from tests.helpers import lm_tasks, oracle, tiny

ALPHABET = string.ascii_letters + ' \n.,:?é→'
EOS = len(ALPHABET)
LENGTH = 16


class Letters:
  """Characters, some of several bytes, and what ends a document."""

  name, fingerprint, vocab_size, eos_id = 'letters', None, tiny.VOCAB, EOS

  def encode(self, text: str) -> np.ndarray:
    return np.array([ALPHABET.index(c) for c in text], np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return ''.join(ALPHABET[int(i)] for i in ids if i != EOS)


QUESTIONS = [
  {'text': 'to be', 'choices': ['or', 'not é→→', 'x.']},
  {'text': 'spaces end it  ', 'choices': ['a', 'bcd', '→']},
  {'text': '', 'choices': ['Is', 'é', 'nothing']},
  {'text': 'long before the answer', 'choices': ['.', 'é→é→', 'Yes, it is']},
  {'text': 'a\n', 'choices': ['é', 'e', 'ee']},
]
# So that by each metric another number of them is right.
for question, target in zip(QUESTIONS, (0, 2, 1, 1, 2), strict=True):
  question['target'] = target
TEXTS = [
  'é',
  'just one window',
  'a window, and then another one: →→ some more?',
]
PROMPTS = ['to be', 'a prompt that is too long by far', 'é\n', 'x: ']
STOPS = ['e', 'm→', 'be']
WRITTEN = 7


class Model(NamedTuple):
  config: ConfigDict
  params: Any
  found: dict[str, Any]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Three tasks, of each kind of request."""
  folder = tmp_path_factory.mktemp('tasks')
  lm_tasks.multiple_choice(folder, 'choices', QUESTIONS)
  lm_tasks.rolling(folder, 'texts', TEXTS)
  lm_tasks.generation(
    folder, 'prompts', PROMPTS, until=STOPS, max_gen_toks=WRITTEN
  )
  return folder


ROUTING = {
  'moe.factors': 2,
  'router.recurrent': 'gru',
  # Scores must not depend on the requests beside: no token is dropped.
  'moe.dispatch': 'capacity',
  'moe.capacity_factor': 0.5,
}


def on_mesh(axes: dict[str, int], **changes: Any) -> tuple[Setup, Any]:
  """A setup with a tokenizer, and parameters."""
  _, setup, params = tiny.on_mesh(axes, **changes)
  return dataclasses.replace(setup, tokenizer=Letters()), params


def adapted(
  axes: dict[str, int], **changes: Any
) -> tuple[ConfigDict, Any, harness.CheckpointLM]:
  setup, params = on_mesh(axes, **changes)
  template = instructions.FORMATS.get(setup.config.data.format)
  made = harness.CheckpointLM(setup, params, template)
  return setup.config, params, made


@pytest.fixture(
  scope='module',
  params=[
    {},
    pytest.param({'data': 2, 'expert': 2, 'tensor': 2}, marks=pytest.mark.slow),
  ],
  ids=['one device', 'eight'],
)
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
  """A model and what the harness finds of it."""
  config, params, adapter = adapted(request.param, **ROUTING)
  loaded = tasks.load('choices,texts,prompts', str(folder))
  options = TaskOptions('', log_samples=True)
  found = run_tasks(adapter, loaded, options)
  return Model(config, params, found)


def log_probabilities(model: Model, ids: list[int]) -> np.ndarray:
  """[L, V] of what follows each token."""
  read = np.array(ids, np.int32)
  logits_LV = oracle.Sequence(model.config, model.params).run(read)
  return np.log(oracle.softmax(logits_LV))


def pair(question: dict[str, Any], choice: str) -> tuple[list, list]:
  """The tokens of a question and of an answer; spaces go with what follows."""
  text = question['text']
  asked = text.rstrip()
  return [EOS, *ids_of(asked)], ids_of(f'{text[len(asked) :]} {choice}')


def likelihood(
  model: Model, asked: list[int], answer: list[int]
) -> tuple[float, bool]:
  """The log-likelihood of an answer, and whether it is the greedy one."""
  ids = [*asked, *answer][-LENGTH - 1 :]
  rows = log_probabilities(model, ids[:-1])[-len(answer) :]
  sum_ = rows[np.arange(len(answer)), answer].sum()
  return sum_, bool((rows.argmax(-1) == answer).all())


def ids_of(text: str) -> list[int]:
  return [ALPHABET.index(c) for c in text]


def samples(model: Model, task: str) -> list[dict[str, Any]]:
  return model.found['samples'][task]


def test_multiple_choice(model: Model) -> None:
  """The best answer; the best for its characters; the best for its bytes."""
  right = {'acc': 0, 'acc_norm': 0, 'acc_bytes': 0}
  for question, sample in zip(
    QUESTIONS, samples(model, 'choices'), strict=True
  ):
    choices = question['choices']
    expected = [
      likelihood(model, *pair(question, choice)) for choice in choices
    ]
    for (sum_, best), [found] in zip(expected, sample['resps'], strict=True):
      assert found == (pytest.approx(sum_, rel=1e-6), best)
    sizes = {
      'acc': [1 for _ in choices],
      'acc_norm': [len(choice) for choice in choices],
      'acc_bytes': [len(choice.encode()) for choice in choices],
    }
    sums = np.array([sum_ for sum_, _ in expected])
    for metric, size in sizes.items():
      right[metric] += (sums / size).argmax() == question['target']
  assert len(set(right.values())) == 3
  scores = model.found['results']['choices']
  for metric, count in right.items():
    assert scores[f'{metric},none'] == pytest.approx(count / len(QUESTIONS))


def test_rolling_in_windows(model: Model) -> None:
  """Every token once, from as many before it as its window has."""
  total, num_bytes = 0.0, 0
  for text, sample in zip(TEXTS, samples(model, 'texts'), strict=True):
    stream = [EOS, *ids_of(text)]
    likelihood, done = 0.0, 0
    while done < len(stream) - 1:
      end = min(done + LENGTH, len(stream) - 1)
      begin = max(end - LENGTH, 0)
      rows = log_probabilities(model, stream[begin:end])
      for place in range(done, end):
        likelihood += rows[place - begin, stream[place + 1]]
      done = end
    assert float(sample['resps'][0][0]) == pytest.approx(likelihood, rel=1e-6)
    total, num_bytes = total + likelihood, num_bytes + len(text.encode())
  assert len(TEXTS[-1]) > 2 * LENGTH and len(TEXTS[-1]) % LENGTH
  bits = -total / num_bytes / np.log(2)
  scores = model.found['results']['texts']
  assert scores['bits_per_byte,none'] == pytest.approx(bits, rel=1e-6)


def test_greedy_generation_with_stops(model: Model) -> None:
  """The likeliest token each time, up to a stop, the end, or its tokens."""
  ends = set()
  for prompt, sample in zip(PROMPTS, samples(model, 'prompts'), strict=True):
    ids = [EOS, *ids_of(prompt)][-(LENGTH - WRITTEN) :]
    text, end = '', 'length'
    for _ in range(WRITTEN):
      best = int(log_probabilities(model, ids)[-1].argmax())
      if best == EOS:
        end = 'end'
        break
      ids.append(best)
      text += ALPHABET[best]
      stop = next((stop for stop in STOPS if stop in text), None)
      if stop:
        text, end = text[: text.index(stop)], 'stop'
        break
    ends.add(end)
    assert sample['resps'] == [[text]]
  assert {'length', 'stop'} <= ends


def test_prompts_that_are_cut_are_counted(model: Model) -> None:
  pairs = [pair(each, c) for each in QUESTIONS for c in each['choices']]
  long = [len(a) + len(b) > LENGTH + 1 for a, b in pairs]
  long += [1 + len(prompt) > LENGTH - WRITTEN for prompt in PROMPTS]
  assert model.found['config']['truncated_prompts'] == sum(long) > 1


def test_scores_while_a_model_trains(model: Model, folder: Path) -> None:
  """The same, a result for each task; or of some documents only."""
  asked = {'eval.tasks': 'texts,choices', 'eval.include_path': str(folder)}
  setup, params = on_mesh({}, **ROUTING, **asked)
  evaluate = TaskScores(setup, 'validation')
  results = {result.split: result.metrics for result in evaluate(params)}
  assert results.keys() == {'texts', 'choices'}
  for task, metrics in results.items():
    scores = model.found['results'][task]
    assert metrics == pytest.approx({m: scores[f'{m},none'] for m in metrics})
  assert results['choices'].keys() == {'acc', 'acc_norm', 'acc_bytes'}
  [_, few] = evaluate(params, max_batches=1)
  documents = setup.config.eval.batch_size
  assert few.metrics['acc'] * documents in range(documents + 1)


def test_instructions_are_put_as_in_training() -> None:
  """A question, shown as a message, has the tokens that training has."""
  row = {
    'messages': [
      {'role': 'user', 'content': 'To be'},
      {'role': 'assistant', 'content': 'or not'},
    ]
  }
  example = instructions.FORMATS['chat'].example(row)
  parts = instructions.parts_of(example.decode(), example.responses)
  config, _, adapter = adapted({}, **{'data.format': 'chat'})
  assert adapter.apply_chat_template(row['messages'][:1]) == parts[0][0]
  assert adapter.apply_chat_template(row['messages']) == example.decode()
  alpaca = instructions.FORMATS['alpaca']
  asked = {'instruction': 'To be', 'output': 'or not'}
  assert alpaca.prompt(row['messages']) == alpaca.example(asked).decode()
  with pytest.raises(UserError, match="data.format = 'text'"):
    task_scores._template(tiny.config())


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'prompts': ['']}, r"document 0 of the task 'bad': the prompt is empty"),
    ({'prompts': ['x'], 'beams': 2}, "of the task 'bad': beams is not known"),
    ({'prompts': ['x'], 'top_p': 7}, "of the task 'bad': top_p = 7 must be"),
    ({'prompts': ['x'], 'max_gen_toks': 0}, "'bad': max_tokens = 0 must be"),
    ({'prompts': ['x'], 'top_k': 'all'}, "generation_kwargs of the task 'bad'"),
    ({'prompts': ['x'], 'until': [1]}, r"'bad': until = \[1\] must be texts"),
  ],
)
def test_what_cannot_be_gone_on_with(
  fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
  lm_tasks.generation(tmp_path, 'bad', **fields)
  refuse(tmp_path, message)


@pytest.mark.parametrize('choice', ['', 'x' * (LENGTH + 1)])
def test_what_cannot_be_scored(choice: str, tmp_path: Path) -> None:
  row = {'text': 'a', 'choices': ['b', 'c'], 'target': 0}
  rows = [row, row | {'choices': ['b', choice]}]
  lm_tasks.multiple_choice(tmp_path, 'bad', rows, target_delimiter='')
  refuse(
    tmp_path,
    "document 1 of the task 'bad': a continuation has"
    f' {len(choice)} tokens, and must have 1 to {LENGTH}',
  )


def test_what_a_task_defines_wrongly_is_one_line(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """It is found out when all is written; faults of ours keep their places."""
  filters = [{'name': 'mine', 'filter': [{'function': 'regex'}]}]
  filters[0]['filter'][0]['regex_pattern'] = '(open'
  lm_tasks.generation(tmp_path, 'bad', ['x'], filter_list=filters)
  monkeypatch.setattr(
    harness.CheckpointLM, 'generate_until', lambda _, asked, **__: ['x']
  )
  refuse(tmp_path, r'lm_eval cannot compute .* error: .*unterminated')
  with pytest.raises(AttributeError), task_scores._task_errors():
    harness._named(None)


def test_scores_without_the_best_experts_have_a_name_of_their_own(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  scores = {'results': {'texts': {'bits_per_byte,none': 2.0}}}
  monkeypatch.setattr(task_scores, 'run_tasks', lambda *_, **__: scores)
  asked = {'eval.tasks': 'texts', 'eval.include_path': str(folder)}
  for top, name in ((0, 'texts'), (1, 'texts-without-top-1')):
    setup, params = on_mesh({}, **asked, **{'eval.disable_top': top})
    [result] = TaskScores(setup, 'validation')(params)
    assert result.name == name
    assert result.metrics.get('disabled_top', 0) == top


def test_earlier_results_keep_their_samples(tmp_path: Path) -> None:
  for name in ('tasks-10.json', 'samples-a-10.jsonl', 'samples-b-10.jsonl'):
    (tmp_path / name).write_text(name)
  others = {'samples-a-110.jsonl', 'samples-a-10-without-top-1.jsonl'}
  for name in others:
    (tmp_path / name).touch()
  os.utime(tmp_path / 'tasks-10.json', (0, 86400 * 365.25))
  path = str(tmp_path / 'tasks-10.json')
  for _ in range(2):  # the second time, nothing is there
    task_scores._set_aside(path, 'samples-*-10.jsonl')
  kept = {each.name for each in tmp_path.iterdir()} - others
  date = next(iter(kept)).split('_')[1].split('.')[0]
  assert date.startswith('1971-01-01T') and kept == {
    f'tasks-10_{date}.json',
    f'samples-a-10_{date}.jsonl',
    f'samples-b-10_{date}.jsonl',
  }


def test_training_can_be_stopped_while_a_task_is_written(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Every token asks; and so the watchdog knows that it goes on."""
  _, _, adapter = adapted({})
  calls: list[str] = []

  def complete(*arguments: Any) -> None:
    show = arguments[5]
    show(0, '', None)

  def check() -> None:
    calls.append('signals')
    raise signals.Interrupted

  monkeypatch.setattr(harness, 'complete', complete)
  monkeypatch.setattr(harness, 'waits_for', calls.append)
  monkeypatch.setattr(harness.signals, 'check', check)
  loaded = tasks.load('prompts', str(folder))
  with pytest.raises(signals.Interrupted):
    run_tasks(adapter, loaded, TaskOptions(''))
  assert calls == ['a token of a task', 'signals']


def refuse(folder: Path, message: str) -> None:
  """Nothing is compiled for it."""
  _, _, adapter = adapted({})
  loaded = tasks.load('bad', str(folder))
  with pytest.raises(UserError, match=message):
    run_tasks(adapter, loaded, TaskOptions(''))
