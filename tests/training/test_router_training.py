"""Frozen, fixed and steered parameters; jitter, disabled experts, init_from."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.training import init_from, optimizer
from moe_jax.training import state as state_lib
from moe_jax.training.state import Setup
from moe_jax.training.step import make_eval_step, make_train_step
from tests.helpers import runs, tiny
from tests.helpers.steps import batch, init, setup, to_numpy, trainer

NOW = {'optimizer.warmup_steps': 0, 'optimizer.learning_rate': 1e-2}


def trained(config: ConfigDict, steps: int = 1) -> tuple[Any, Any, list[Any]]:
  """Parameters before and after, and the metrics of every step."""
  made, step = trainer(config)
  state, found = init(made), []
  before = to_numpy(state['params'])
  for _ in range(steps):
    state, metrics = step(state, batch(config))
    found.append(to_numpy(metrics))
  return before, to_numpy(state['params']), found


def moved(before: Any, after: Any) -> dict[str, bool]:
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
  leaves = jax.tree_util.tree_leaves_with_path(changed)
  return {jax.tree_util.keystr(path): change for path, change in leaves}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('freeze', 'still'),
  [
    ('router', ("['router']",)),
    ('router_and_cell', ("['router']", "['cell']")),
  ],
)
def test_frozen_parameters_stay(freeze: str, still: tuple[str, ...]) -> None:
  config = tiny.config(
    **NOW, **{'router.recurrent': 'gru', 'optimizer.freeze': freeze}
  )
  before, after, [metrics] = trained(config)
  for path, change in moved(before, after).items():
    assert change != any(part in path for part in still), path
  assert metrics['gradient_norm'] > 0


@pytest.mark.slow
def test_what_is_fixed_is_never_trained_and_has_no_moments() -> None:
  config = tiny.config(**NOW, **{'router.score': 'hyper'})
  before, after, _ = trained(config)
  for path, change in moved(before, after).items():
    assert change == ('fixed_' not in path), path
  moments = setup(config).abstract['opt_state']
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(moments)
  ]
  assert any('embedding_X' in name for name in names)
  assert not any('fixed_' in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize('micro_batches', [1, 2])
def test_the_choice_bias_steps_against_the_global_counts(
  micro_batches: int,
) -> None:
  config = tiny.config(
    **{
      'loss.bias_rate': 0.25,
      'moe.factors': 2,
      'moe.every': 2,
      'model.num_layers': 3,  # prefix and scanned periods
      'train.accumulation': micro_batches,
    }
  )
  _, after, [metrics] = trained(config)
  counts = metrics['load'].counts_N  # [layers, S, N]
  expected = 0.25 * np.sign(counts.mean(-1, keepdims=True) - counts)
  labels = optimizer.labels(setup(config).declarations, 'none')
  steered = [
    leaf
    for leaf, label in zip(
      jax.tree.leaves(after), jax.tree.leaves(labels), strict=True
    )
    if label == optimizer.BIAS_UPDATED
  ]
  # In the order of their names: the period (layer 2), then the prefix (0).
  found = np.concatenate([np.atleast_2d(leaf) for leaf in steered])
  np.testing.assert_array_equal(found, expected[::-1].reshape(4, 8))


# `test_gradients` holds it to the oracle.
@pytest.mark.slow
def test_global_balance_is_that_of_one_batch_whatever_the_micro_batches() -> (
  None
):
  losses, params = [], []
  for micro_batches in (1, 4):
    config = tiny.config(
      **NOW,
      **{
        'loss.balance_scope': 'global_batch',
        'loss.balance_weight': 1.0,
        'train.accumulation': micro_batches,
        'optimizer.epsilon': 1e-3,  # or Adam's first step is a sign
      },
    )
    _, after, [metrics] = trained(config)
    losses.append(metrics['balance_loss'])
    params.append(after)
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *params
  )


@pytest.mark.slow
def test_jitter_is_drawn_anew_each_step_and_never_in_evaluation() -> None:
  still = tiny.config(**{'optimizer.learning_rate': 1e-12})
  noisy = tiny.config(
    **{'optimizer.learning_rate': 1e-12, 'router.jitter': 0.5}
  )
  losses = {}
  for name, config in (('still', still), ('noisy', noisy)):
    _, _, metrics = trained(config, steps=2)
    losses[name] = [float(step['loss']) for step in metrics]
  assert losses['still'][0] == losses['still'][1]
  assert len({*losses['noisy'], losses['still'][0]}) == 3
  results = [evaluated(setup(config))['nll'] for config in (still, noisy)]
  assert results[0] == results[1]


def evaluated(made: Setup) -> Any:
  params = init(made)['params']
  return to_numpy(make_eval_step(made)(params, batch(made.config)))


@pytest.mark.slow
def test_disabled_experts_are_chosen_by_no_token_in_evaluation() -> None:
  """The k best of the rest, as though the best had never been there."""
  disabled = setup(tiny.config(**{'moe.top_k': 1, 'eval.disable_top': 1}))
  both = setup(tiny.config(**{'moe.top_k': 2}))
  one = setup(tiny.config(**{'moe.top_k': 1}))
  counts = {
    name: evaluated(each)['load'].counts_N[0]
    for name, each in (('disabled', disabled), ('both', both), ('one', one))
  }
  # First layer, equal inputs: first and second choice make up the best two.
  np.testing.assert_array_equal(
    counts['disabled'] + counts['one'], counts['both']
  )
  trained_with = make_train_step(disabled)(
    init(disabled), batch(disabled.config)
  )[1]
  np.testing.assert_array_equal(trained_with['load'].counts_N[0], counts['one'])


@pytest.fixture(scope='module')
def origin_run(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Any]:
  """The workdir of a run of one step, and its parameters."""
  config = tiny.config(**NOW)
  made = setup(config)
  state, _ = make_train_step(made)(init(made), batch(config))
  folder = tmp_path_factory.mktemp('origin')
  with runs.claimed(config, folder) as store:
    store.save(1, state)
  return folder, to_numpy(state['params'])


@pytest.mark.slow
def test_a_run_starts_on_the_parameters_it_is_given(
  origin_run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
  """And all the rest is what it would be without; no second set is drawn."""
  folder, expected = origin_run
  made = setup(
    tiny.config(
      **{'train.init_from': str(folder), 'router.jitter': 0.1, 'seed': 5}
    )
  )
  drawn = init(made)
  monkeypatch.setattr(state_lib, '_init_params', lambda *_: pytest.fail())
  given = init_from.params(made)
  state = made.init(given)
  jax.tree.map(np.testing.assert_array_equal, state['params'], expected)
  for leaf, of_origin in zip(
    jax.tree.leaves(state['params']), jax.tree.leaves(given), strict=True
  ):
    assert leaf is of_origin
  assert jax.tree.structure(state) == jax.tree.structure(drawn)
  for name in drawn.keys() - {'params'}:
    jax.tree.map(np.testing.assert_array_equal, state[name], drawn[name])
  same = jax.tree.map(
    lambda leaf, asked: leaf.sharding == asked.sharding, state, made.abstract
  )
  assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_a_choice_bias_that_the_origin_lacks_starts_at_zero(
  origin_run: tuple[Path, Any], tmp_path: Path
) -> None:
  folder, expected = origin_run
  config = tiny.config(
    **{'train.init_from': str(folder), 'loss.bias_rate': 0.1}
  )
  made = setup(config)
  state = made.init(init_from.params(made))
  found = traverse_util.flatten_dict(to_numpy(state['params']))
  biases = {path for path in found if path[-1] == 'choice_bias_N'}
  assert biases and not any(found[path].any() for path in biases)
  rest = {path: found[path] for path in found if path not in biases}
  jax.tree.map(
    np.testing.assert_array_equal, traverse_util.unflatten_dict(rest), expected
  )

  # A run that has them hands them on, and none can do without.
  state, _ = make_train_step(made)(state, batch(config))
  with runs.claimed(config, tmp_path) as store:
    store.save(1, state)
  changes = {'train.init_from': str(tmp_path)}
  again = setup(tiny.config(**changes, **{'loss.bias_rate': 0.5}))
  jax.tree.map(
    np.testing.assert_array_equal, init_from.params(again), state['params']
  )
  with pytest.raises(UserError, match=r'loss.bias_rate was 0.1, now 0.0'):
    init_from.params(setup(tiny.config(**changes)))


def test_an_origin_that_will_not_do_is_refused(
  origin_run: tuple[Path, Any], tmp_path: Path
) -> None:
  (tmp_path / 'empty').mkdir()
  shutil.copy(origin_run[0] / 'config.json', tmp_path / 'empty')
  for folder, key, fragment in (
    (origin_run[0], {'moe.num_experts': 4}, 'moe.num_experts was 8, now 4'),
    (tmp_path / 'nowhere', {}, 'holds no run'),
    (tmp_path / 'empty', {}, 'holds no checkpoint'),
  ):
    made = setup(tiny.config(**{'train.init_from': str(folder)}, **key))
    with pytest.raises(UserError, match=fragment) as error:
      init_from.params(made)
    message = str(error.value)
    assert message.startswith('train.init_from: ')
    assert message.endswith('; name another train.init_from')
