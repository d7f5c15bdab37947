"""The studies of docs/evidence.md: their commands, and what is kept of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import evidence
from moe_jax.config import loading
from tests.helpers import workdirs

ROOT = Path(__file__).parents[2]


def test_the_docs_have_the_tables_of_what_is_kept() -> None:
  """`python -m benchmarks.evidence --tables` prints them."""
  text = (ROOT / 'docs' / 'evidence.md').read_text()
  tables = evidence.tables()
  assert tables
  for table in tables:
    assert table in text, table


@pytest.mark.parametrize('name', evidence.STUDIES)
def test_every_row_of_a_study_is_a_config(name: str) -> None:
  study = evidence.STUDIES[name]
  [argument] = [
    flag.partition('=')[2]
    for flag in study.flags
    if flag.startswith('--config=')
  ]
  for variant in study.variants:
    loading.load(loading.with_names(argument, variant.split('+')))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
  """What is kept of a comparison of two rows, one of which was analysed."""
  folder = tmp_path / 'runs'
  workdirs.make_comparison(folder, tokens=20)
  for seed, perplexity in enumerate((9.0, 12.0, 15.0)):
    path = folder / f'linear/seed-{seed}/evaluation'
    (path / 'validation-400-without-top-1.json').write_text(
      json.dumps({'perplexity': perplexity})
    )
  monkeypatch.setattr(evidence, 'KEPT', tmp_path / 'kept')
  return evidence.keep('code', str(folder))


def test_differences_are_to_the_first_row(kept: dict[str, Any]) -> None:
  linear, rmoe = kept['rows']
  assert (linear['variant'], rmoe['variant']) == ('linear', 'rmoe')
  assert linear['difference'] is None
  values = [
    [run['bits_per_byte'] for run in row['runs']] for row in (rmoe, linear)
  ]
  expected = stats.ttest_rel(*values)
  assert rmoe['p_value'] == pytest.approx(expected.pvalue)
  low, high = expected.confidence_interval(0.95)
  assert rmoe['interval'] == pytest.approx([low, high])


def test_seeds_of_two_comparisons_are_one_table(
  tmp_path: Path, kept: dict[str, Any]
) -> None:
  """What another machine trained with seeds 3 to 5 is joined to 0 to 2."""
  path = tmp_path / 'runs' / evidence.FILE
  result = json.loads(path.read_text())
  result['seeds'] = [3, 4, 5]
  for row in result['rows']:
    for run in row['runs']:
      run['seed'] += 3
      run['bits_per_byte'] += 0.1 * run['seed']
  path.write_text(json.dumps(result))
  joined = evidence.keep('code', str(tmp_path / 'runs'))
  assert joined['seeds'] == [*range(6)]
  values = [
    [run['bits_per_byte'] for row in both for run in row['runs']]
    for both in zip(kept['rows'], result['rows'][:2], strict=True)
  ]
  rmoe = joined['rows'][1]
  assert rmoe['p_value'] == pytest.approx(stats.ttest_rel(*values).pvalue)
  assert joined['rows'][0]['routing'] == kept['rows'][0]['routing']
  # Other models are another row.
  result['rows'][1]['parameters'] += 1
  path.write_text(json.dumps(result))
  again = evidence.keep('code', str(tmp_path / 'runs'))
  assert [len(row['runs']) for row in again['rows']] == [6, 3]


def test_a_sweep_is_told(kept: dict[str, Any]) -> None:
  kept['sweep'] = {'key': 'optimizer.learning_rate', 'values': [0.1, 0.2]}
  for row, best in zip(kept['rows'], (0.1, 0.2), strict=True):
    results = {'0.1': 2.3 - 0.1 * best, '0.2': 2.3 - best}
    row['swept'] = {'value': best, 'results': results}
  (evidence.KEPT / 'code.json').write_text(json.dumps(kept))
  [table] = evidence.tables()
  assert '`optimizer.learning_rate` | 0.1 | 0.2 | the best |' in table
  assert '| `linear` | 2.290 | 2.200 | 0.1 |\n| `rmoe` |' in table


def test_robustness_is_a_ratio_of_perplexities(kept: dict[str, Any]) -> None:
  usual = [math.exp(run['loss']) for run in kept['rows'][0]['runs']]
  ratio = (9 / usual[0] + 12 / usual[1] + 15 / usual[2]) / 3
  [table] = evidence.tables()
  assert f'| `linear` | 12.00 | {ratio:.2f} |' in table


def test_what_was_analysed_is_a_mean_over_routers(
  kept: dict[str, Any], tmp_path: Path
) -> None:
  row = kept['rows'][0]
  folder = tmp_path / 'runs' / row['runs'][0]['workdir'] / 'analysis'
  [path] = folder.glob('*.json')
  found = json.loads(path.read_text())
  means = found['gate_entropy']['mean']
  assert row['routing']['gate_entropy'] == pytest.approx(
    sum(means) / len(means)
  )
  pairs = [
    value
    for i, line in enumerate(found['mutual_information'])
    for j, value in enumerate(line)
    if i != j
  ]
  assert row['routing']['mutual_information'] == pytest.approx(
    sum(pairs) / len(pairs)
  )


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
  assert evidence.main(['--study=coed']) == 2
  assert "did you mean 'code'?" in capsys.readouterr().err
  assert evidence.main(['--study=code']) == 2
  assert '--workdir is missing' in capsys.readouterr().err
