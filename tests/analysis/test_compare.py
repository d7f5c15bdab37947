"""Rows of a comparison: their configs, their sizes and their statistics."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from configs import quickstart
from moe_jax import config as config_lib
from moe_jax.analysis import compare, compare_table, comparison
from moe_jax.analysis.comparison import Comparison
from moe_jax.errors import UserError
from moe_jax.planning import abstract_setup
from tests.helpers import marks

QUICKSTART = str(Path(quickstart.__file__))
OWN = """
from moe_jax import config as config_lib
from moe_jax.config import presets

def get_config(names=''):
  return presets.build(names, config_lib.get_config(), {}, VARIANTS)

def wide(config):
  '''Twice as wide.

  And more.
  '''
  config.moe.expert_width *= 2

VARIANTS = {
  'wide': wide,
  'dense': presets.sets({'moe.num_experts': 0}),
  'three': presets.sets({'moe.factors': 3}),
  'same': presets.sets({'moe.expert_width': 1024}),
  'top_p': presets.sets({'router.selection': 'top_p'}),
  'huge': presets.sets({'router.score': 'mlp', 'router.mlp_width': 9**6}),
}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
  """A config file of a user's."""
  path = tmp_path / 'own.py'
  path.write_text(OWN)
  return str(path)


def test_names(own: str) -> None:
  assert compare.names(own, 'wide, dense,wide+dense,wide') == [
    'wide',
    'dense',
    'wide+dense',
  ]
  assert compare.names(own, 'base,all')[:3] == ['base', 'wide', 'dense']
  assert compare.names(QUICKSTART, 'all') == list(quickstart.VARIANTS)


@pytest.mark.parametrize('text', ['', ' , '])
def test_no_names_are_refused(own: str, text: str) -> None:
  with pytest.raises(UserError, match='--variants is missing'):
    compare.names(own, text)


def test_a_row_says_what_it_changes(own: str) -> None:
  overrides = {'model.hidden_size': 64, 'model.num_layers': 1}
  names = ['base', 'dense+model.ffn_width=8']
  base, dense = compare.rows(own, overrides, names)
  assert base.changes == {} and base.about == 'The config as it is.'
  assert dense.changes == {'moe.num_experts': 0, 'model.ffn_width': 8}
  assert dense.about == 'moe.num_experts = 0 model.ffn_width=8'
  assert dense.argument == f'{own}:dense,model.ffn_width=8'
  assert dense.config.model.num_layers == 1


def test_the_first_line_of_a_variant_is_what_it_is_about(own: str) -> None:
  [wide] = compare.rows(own, {}, ['wide'])
  assert wide.about == 'Twice as wide.'
  assert wide.changes == {'moe.expert_width': 1024}


@pytest.mark.parametrize(
  'names, fragments',
  [
    (['wide', 'same'], ['wide and same are the same config']),
    (['base', 'base+moe.top_k=2'], ['are the same config']),
    (['wide', 'three'], ['variant three', 'moe.expert_width = 512']),
    (['wied'], ["'wied'", "did you mean 'wide'"]),
    (['wide+moe.topk=1'], ["'moe.topk'", "did you mean 'moe.top_k'"]),
  ],
)
def test_rows_that_cannot_be(
  own: str, names: list[str], fragments: list[str]
) -> None:
  with pytest.raises(UserError) as error:
    compare.rows(own, {}, names)
  for fragment in fragments:
    assert fragment in str(error.value)


def leaves(config: ConfigDict) -> dict[str, int]:
  """The number of elements of every parameter, by its path."""
  params = abstract_setup.on_one_device(config).abstract['params']
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    jax.tree_util.keystr(path): int(np.prod(leaf.shape)) for path, leaf in flat
  }


def feed_forward(config: ConfigDict) -> int:
  """The parameters of experts, shared experts and dense layers, by names."""
  return sum(
    size
    for path, size in leaves(config).items()
    if re.search(r'(gate_up|down)_', path)
  )


FEW = ('both', 'shared', 'dense', 'three_factors')


@pytest.mark.parametrize(
  'name', marks.fast_only(list(FEW), list(quickstart.VARIANTS))
)
def test_variants_of_the_quickstart_have_equal_experts(name: str) -> None:
  config, base = quickstart.get_config(name), quickstart.get_config()
  layers = base.model.num_layers * 3 * base.model.hidden_size
  width = base.moe.num_experts * base.moe.expert_width
  if name == 'dense':
    width = base.moe.top_k * base.moe.expert_width
  if name == 'shared':
    width += base.moe.expert_width
  if name == 'three_factors':
    width = base.moe.num_experts * 24 * round(base.moe.expert_width / 24)
  assert feed_forward(config) == layers * width
  # What a token has: its experts, the shared one, or a dense layer.
  moe = config.moe
  has = moe.top_k * moe.expert_width + moe.shared.width
  has = has if moe.num_experts else config.model.ffn_width
  if name != 'three_factors':
    assert has == base.moe.top_k * base.moe.expert_width
  config_lib.validate(config, 1)


@pytest.mark.parametrize('what', ['parameters', 'active', 'flops'])
def test_matching(own: str, what: str) -> None:
  overrides = {'model.num_layers': 2, 'model.hidden_size': 64}
  found = compare.rows(
    own, overrides, ['wide', 'base', 'base+moe.factors=3'][:2]
  )
  wide, base = found
  kept, matched = compare.match(found, wide, what)
  assert kept is wide
  # Only the experts of `base` are narrower, so it becomes what `wide` is.
  assert matched.matched == {'moe.expert_width': 1024}
  assert matched.sizes == wide.sizes
  assert matched.config.moe.expert_width == 1024
  assert matched.changes == base.changes
  assert sum(leaves(matched.config).values()) == wide.sizes.parameters


def test_what_is_near_is_left_alone_and_factors_divide(own: str) -> None:
  overrides = {'model.num_layers': 2, 'moe.expert_width': 510}
  names = [
    'base',
    'three',
    'router.score=mlp',
    'moe.num_experts=7+moe.factors=3',
  ]
  found = compare.rows(own, overrides, names)
  base, three, _, seven = compare.match(found, found[0], 'parameters')
  assert three.matched is None
  assert seven.matched is not None
  width = seven.matched['moe.expert_width']
  assert width % 3 == 0
  total = sum(leaves(seven.config).values())
  assert total == pytest.approx(base.sizes.parameters, rel=0.005)
  # 7/8 of the experts, so about 8/7 as wide.
  assert width == pytest.approx(510 * 8 / 7, abs=6)


def test_dense_layers_are_matched_by_their_width(own: str) -> None:
  found = compare.rows(own, {'moe.top_k': 3}, ['base', 'dense'])
  _, dense = compare.match(found, found[0], 'active')
  assert dense.matched is not None and 'model.ffn_width' in dense.matched
  near = pytest.approx(found[0].sizes.active_parameters, rel=0.005)
  assert sum(leaves(dense.config).values()) == near


def test_what_cannot_be_matched(own: str) -> None:
  found = compare.rows(own, {}, ['base', 'top_p'])
  assert compare.match(found, found[0], 'none') == found
  # Its cost is known only in training.
  assert compare.match(found, found[0], 'flops')[1].matched is None
  found = compare.rows(own, {}, ['base', 'huge'])
  with pytest.raises(UserError, match='variant huge is larger'):
    compare.match(found, found[0], 'parameters')


def test_sweeps() -> None:
  swept = compare.sweep(['optimizer.learning_rate:1e-3,2e-3', 'moe.top_k:2,1'])
  assert swept == {'optimizer.learning_rate': [1e-3, 2e-3], 'moe.top_k': [2, 1]}
  points = compare.points(swept)
  assert points == [(1e-3, 2), (1e-3, 1), (2e-3, 2), (2e-3, 1)]
  assert compare.points({}) == [()]
  three = {'optimizer.learning_rate': [1.0, 3.0, 2.0]}
  assert compare.at_edge(three, (2.0,)) == []
  assert compare.at_edge(three, (3.0,)) == ['optimizer.learning_rate']
  assert compare.at_edge({'moe.top_k': [1]}, (1,)) == []
  assert compare.at_edge({'router.score': ['a', 'b']}, ('a',)) == []


@pytest.mark.parametrize(
  'texts, fragment',
  [
    (['optimizer.rate:1'], 'optimizer.rate'),
    (['moe.top_k'], 'has no values'),
    (['moe.top_k:1', 'moe.top_k:2'], 'is given twice'),
    (['moe.top_k:1,x'], "'x' must be a whole number"),
    (['optimizer.learning_rate:0.0'], 'must be above 0'),
  ],
)
def test_sweeps_that_cannot_be(texts: list[str], fragment: str) -> None:
  with pytest.raises(UserError, match=re.escape(fragment)):
    compare.sweep(texts)


def test_statistics_are_those_of_a_paired_t_test() -> None:
  rng = np.random.default_rng(0)
  ours = dict(enumerate(rng.normal(2.0, 0.1, 7)))
  base = dict(enumerate(rng.normal(2.05, 0.1, 7)))
  found = comparison.summarise(ours, base)
  a, b = np.array([*ours.values()]), np.array([*base.values()])
  expected = stats.ttest_rel(a, b)
  interval = expected.confidence_interval(0.95)
  assert found['mean'] == pytest.approx(a.mean())
  assert found['deviation'] == pytest.approx(a.std(ddof=1))
  assert found['difference'] == pytest.approx((a - b).mean())
  assert found['interval'] == pytest.approx([interval.low, interval.high])
  assert found['p_value'] == pytest.approx(expected.pvalue)


def test_only_seeds_that_both_have_are_paired() -> None:
  found = comparison.summarise(
    {0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.0, 0: 0.5, 5: 3.0}
  )
  assert found['mean'] == 4.0
  assert found['difference'] == pytest.approx((0.5 + 1.0) / 2)


def test_what_few_seeds_leave_open_is_none() -> None:
  one = comparison.summarise({3: 2.0}, {3: 1.5})
  assert one == {
    'mean': 2.0,
    'deviation': None,
    'difference': 0.5,
    'interval': None,
    'p_value': None,
  }
  assert set(comparison.summarise({}, {}).values()) == {None}
  baseline = comparison.summarise({0: 1.0, 1: 2.0}, None)
  assert baseline['difference'] is None and baseline['deviation'] is not None
  alike = comparison.summarise({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
  assert alike['p_value'] is None and alike['interval'] == [0.5, 0.5]


def finish(made: Comparison, scores: dict[str, float]) -> None:
  """Leaves the results of runs, by their workdirs, as evaluation does."""
  for workdir, score in scores.items():
    folder = Path(made.workdir) / workdir
    (folder / 'evaluation').mkdir(parents=True)
    steps = made.rows[0].config.train.steps
    result = f'{{"bits_per_byte": {score}, "loss": 1.0}}'
    (folder / 'evaluation' / f'validation-{steps}.json').write_text(result)
    line = '{"step": %d, "split": "train", "tokens_per_second": 100.0}\n'
    (folder / 'metrics.jsonl').write_text(line % 10 + line % steps)


def made_of(own: str, tmp_path: Path, swept: dict[str, list]) -> Comparison:
  rows = compare.rows(own, {'train.steps': 20}, ['base', 'wide'])
  return Comparison(
    str(tmp_path), own, {}, rows, 'base', 'none', [0, 1], swept, 'validation'
  )


def test_what_is_written_follows_from_the_files(
  own: str, tmp_path: Path
) -> None:
  made = made_of(own, tmp_path, {})
  assert len(made.missing(made.finals())) == 4
  finish(made, {'base/seed-0': 2.0, 'base/seed-1': 2.1, 'wide/seed-1': 1.9})
  [missing] = made.missing(made.finals())
  assert (missing.workdir, missing.values['seed']) == ('wide/seed-0', 0)
  made.failed['wide/seed-0'] = 'error: no room'
  base, wide = made.write()['rows']
  assert [run['bits_per_byte'] for run in base['runs']] == [2.0, 2.1]
  assert base['mean'] == pytest.approx(2.05)
  assert wide['difference'] == pytest.approx(-0.2)
  [run] = wide['runs']
  tokens = 20 * 16 * 256
  assert run == {
    'seed': 1,
    'workdir': 'wide/seed-1',
    'bits_per_byte': 1.9,
    'loss': 1.0,
    'steps': 20,
    'tokens': tokens,
    'seconds': tokens / 100,
  }
  [failed] = wide['failed']
  assert failed['seed'] == 0 and failed['error'] == 'error: no room'
  text = compare_table.table(made.write())
  assert 'wide, seed 0, failed: error: no room' in text
  assert '2.0500 ± 0.0707' in text and '1 (1 failed)' in text


def test_a_sweep_chooses_by_the_first_seed(own: str, tmp_path: Path) -> None:
  key = 'optimizer.learning_rate'
  made = made_of(own, tmp_path, {key: [0.1, 0.2]})
  assert len(made.sweeps()) == 4 and made.finals() == []
  at = {value: f'{key}={value}' for value in (0.1, 0.2)}
  finish(made, {f'base/{at[0.1]}/seed-0': 2.0, f'base/{at[0.2]}/seed-0': 1.5})
  finish(made, {f'wide/{at[0.1]}/seed-0': 1.0})
  # Not all of `wide` is known yet.
  assert {run.row.variant for run in made.finals()} == {'base'}
  made.failed[f'wide/{at[0.2]}/seed-0'] = 'error: diverged'
  assert [run.workdir for run in made.missing(made.finals())] == [
    f'base/{at[0.2]}/seed-1',
    f'wide/{at[0.1]}/seed-1',
  ]
  assert made.finals()[0].values[key] == 0.2
  result = made.result()
  assert result['sweep'] == {'key': key, 'values': [0.1, 0.2]}
  assert result['rows'][0]['swept'] == {
    'value': 0.2,
    'results': {'0.1': 2.0, '0.2': 1.5},
    'edge': [key],
  }
  assert f'best {key} of 0.1, 0.2 is 0.2, at the edge' in compare_table.table(
    result
  )
