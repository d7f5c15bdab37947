"""Reports of runs, from workdirs that look like those of the programs.

How pages look in a browser is tested in test_report_browser.py.
"""

import base64
import gzip
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.analysis import charts, report, runs
from moe_jax.errors import UserError
from tests.helpers import workdirs

ROOT = Path(__file__).parents[2]
OF_ANALYSES = """
mutual-information agreement-below gate-entropy inner-balance outer-balance
expert-similarity selection-frequency pairs token-classes norms
checkpoints-route-stability checkpoints-gradient-norm checkpoints-drop-ratio
""".split()
NASTY = ['</script><b id="nasty">', '&amp;', '\x00\x1b', '\ud800', '\'"`', '\n']


class Page(HTMLParser):
  """What a parser makes of a page: its elements, texts and packed data."""

  def __init__(self, text: str):
    super().__init__()
    self.elements: list[tuple[str, dict[str, str | None]]] = []
    self.texts: list[str] = []
    self.packed: dict[str, Any] = {}
    self._script: str | None = None
    self.feed(text)
    self.text = ' '.join(' '.join(self.texts).split())

  @property
  def ids(self) -> set[str | None]:
    return {attributes.get('id') for _, attributes in self.elements}

  def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
    attributes = dict(attrs)
    self.elements.append((tag, attributes))
    self._script = None
    if tag in ('script', 'style'):
      self._script = attributes.get('id') or ''

  def handle_endtag(self, tag: str) -> None:
    self._script = None

  def handle_data(self, data: str) -> None:
    if self._script is None:
      self.texts.append(data)
    elif self._script:
      packed = gzip.decompress(base64.b64decode(data))
      self.packed[self._script] = json.loads(packed)


def page(*directories: str) -> Page:
  return Page(report.page(report.read(directories)))


@pytest.fixture(scope='module')
def four(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The page of four runs, two of them with twelve routers."""
  folder = tmp_path_factory.mktemp('four')
  cartesian = {'layers': 6, 'factors': 2, 'experts': 8}
  conventional = {'layers': 6, 'factors': 1, 'experts': 16}
  return report.page(
    report.read(
      [
        workdirs.make_workdir(
          folder / 'both', router__recurrent='gru', **cartesian
        ),
        workdirs.make_workdir(folder / 'cartesian', **cartesian),
        workdirs.make_workdir(
          folder / 'rmoe', router__recurrent='gru', **conventional
        ),
        workdirs.make_workdir(folder / 'linear', **conventional),
      ]
    )
  )


def test_every_panel_is_there_and_has_its_charts(four: str) -> None:
  parsed = Page(four)
  panels = {'curves', 'load', 'entropy', *OF_ANALYSES}
  assert panels <= parsed.ids
  assert {'explorer', 'vocabulary', 'robustness', 'differences'} <= parsed.ids
  places = {
    attributes['id'].removeprefix('chart-')
    for _, attributes in parsed.elements
    if attributes.get('class') == 'chart'
  }
  assert places == set(parsed.packed['charts'])
  for panel in panels:
    assert f'{panel}-0' in places
  # A map for each of four runs, and pairs for the Cartesian ones alone.
  assert {f'load-{i}' for i in range(4)} <= places
  assert {place for place in places if place.startswith('pairs-')} == {
    'pairs-0',
    'pairs-1',
  }
  assert 'moe_jax analyze' not in parsed.text
  assert 'moe_jax eval' not in parsed.text


def test_charts_are_told_in_words(four: str) -> None:
  said = [
    attributes['aria-label']
    for _, attributes in Page(four).elements
    if attributes.get('class') == 'chart'
  ]
  assert all(len(words) > 30 for words in said)


def test_a_page_of_four_runs_is_small_and_needs_no_network(four: str) -> None:
  assert len(four.encode()) < 3_000_000
  for tag, attributes in Page(four).elements:
    for name in ('src', 'href', 'data', 'srcset', 'action'):
      target = attributes.get(name) or '#'
      assert target.startswith(('#', 'data:')), f'<{tag} {name}={target}>'
  assert not re.search(r'@import|url\(["\']?http', four)


def test_the_bundle_is_there_once(four: str) -> None:
  assert four.count('window.vegaEmbed=') == 1


def test_the_passage_comes_back_as_it_was(tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=50)
  path = tmp_path / 'mine' / 'analysis' / '400.json'
  analysis = json.loads(path.read_text())
  # Of top-p: a token with one expert, one without any.
  passage = analysis['passage']
  passage['experts'][0][1], passage['weights'][0][1] = [3], [1.0]
  passage['experts'][0][2], passage['weights'][0][2] = [], []
  path.write_text(json.dumps(analysis))
  packed = page(workdir).packed['passage-0']
  assert packed['tokens'] == passage['tokens']
  assert packed['chosen'][0][0][:3] == [passage['experts'][0][0][0], 3, -1]
  assert packed['chosen'][0][1][:3] == [passage['experts'][0][0][1], -1, -1]
  levels = packed['levels']
  given = np.array(passage['top_probability'])  # [routers][T][4]
  kept = np.array(packed['probability']) / levels  # [routers][4][T]
  assert np.abs(kept.transpose(0, 2, 1) - given).max() <= 0.5 / levels
  assert np.array_equal(
    np.array(packed['top']).transpose(0, 2, 1), passage['top']
  )


def test_what_comes_from_text_is_escaped(tmp_path: Path) -> None:
  folder = tmp_path / '<i id=nasty>&amp;'
  workdir = workdirs.make_workdir(folder, tokens=30)
  path = folder / 'analysis' / '400.json'
  analysis = json.loads(path.read_text())
  passage = analysis['passage']
  passage['tokens'][: len(NASTY)] = NASTY
  analysis['vocabulary'][0][0][0]['token'] = NASTY[0]
  analysis['token_classes']['classes'][0] = '</script><b id="nasty">'
  path.write_text(json.dumps(analysis))
  output = tmp_path / 'page.html'
  assert report.main([workdir, f'--output={output}']) == 0
  parsed = Page(output.read_text('utf-8'))
  assert 'nasty' not in parsed.ids
  assert '<i id=nasty>&amp;' in parsed.text
  assert parsed.packed['passage-0']['tokens'] == passage['tokens']
  assert parsed.packed['passage-0']['vocabulary'][0][0][0]['token'] == NASTY[0]


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
  bare = workdirs.make_workdir(
    tmp_path / 'bare', analysed=False, evaluated=False
  )
  parsed = page(bare)
  assert f'moe_jax analyze {bare}' in parsed.text
  assert f'moe_jax eval {bare} --disable_top=0,1' in (parsed.text)
  assert {'curves', 'load', 'entropy'} <= parsed.ids
  assert not {'explorer', 'vocabulary', *OF_ANALYSES} & parsed.ids
  assert not any(name.startswith('passage') for name in parsed.packed)


def test_an_analysis_may_lack_a_part(tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  path = tmp_path / 'mine' / 'analysis' / '400.json'
  analysis = json.loads(path.read_text())
  del analysis['checkpoints']
  lacking = {'mutual_information': None, 'token_classes': None}
  path.write_text(json.dumps(analysis | lacking | {'passage': None}))
  parsed = page(workdir)
  note = f'Not measured of mine: moe_jax analyze {workdir}'
  assert parsed.text.count(note) == 5  # of checkpoints there are three panels
  drawn = parsed.packed['charts']
  assert 'inner-balance-0' in drawn and 'norms-0' in drawn
  for panel in OF_ANALYSES:
    if panel.startswith(('mutual', 'token', 'checkpoints')):
      assert panel in parsed.ids and f'{panel}-0' not in drawn
  assert 'explorer' not in parsed.ids


def test_the_least_that_makes_a_page(tmp_path: Path) -> None:
  rows = [{'step': step, 'split': 'train', 'loss': 2.0} for step in (1, 2)]
  lines = '\n'.join(json.dumps(row) for row in rows)
  (tmp_path / 'metrics.jsonl').write_text(f'{lines}\n')
  parsed = page(str(tmp_path))
  assert set(parsed.packed['charts']) == {'curves-0'}
  assert 'No evaluation during training' in parsed.text
  assert 'No expert_counts in metrics.jsonl' in parsed.text


def test_the_newest_analysis_is_taken(tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  folder = tmp_path / 'mine' / 'analysis'
  analysis = json.loads((folder / '400.json').read_text())
  for step in (90, 1000):
    (folder / f'{step}.json').write_text(json.dumps(analysis | {'step': step}))
  (folder / 'notes.json').write_text('{}')
  assert runs.read_workdir(workdir).analysis['step'] == 1000


# Variants and their seeds.


def test_runs_that_differ_in_their_seed_alone_are_a_variant(
  tmp_path: Path,
) -> None:
  made = [
    workdirs.make_workdir(
      tmp_path / f'{name}-seed-{seed}',
      seed=seed,
      analysed=False,
      router__recurrent=name,
    )
    for name in ('gru', 'none')
    for seed in (1, 0)
  ]
  again = workdirs.make_workdir(
    tmp_path / 'other', analysed=False, router__recurrent='rnn'
  )
  subject = report.read([*made, again])
  assert [
    (variant.name, [run.seed for run in variant.runs])
    for variant in subject.variants
  ] == [('gru', [0, 1]), ('none', [0, 1]), ('other', [0])]


def test_runs_of_the_same_seed_are_not_put_together(tmp_path: Path) -> None:
  made = [
    workdirs.make_workdir(tmp_path / name, analysed=False) for name in 'ab'
  ]
  assert [v.name for v in report.read(made).variants] == ['a', 'b']


def test_variants_of_one_name_are_told_apart(tmp_path: Path) -> None:
  made = [
    workdirs.make_workdir(
      tmp_path / place / 'run', analysed=False, router__recurrent=place
    )
    for place in ('gru', 'none')
  ]
  assert [v.name for v in report.read(made).variants] == made


def test_curves_are_means_and_deviations_over_seeds(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(tmp_path / 'all', analysed=False)
  variant = report.read([comparison]).variants[0]
  assert variant.name == 'linear' and len(variant.runs) == 3
  steps_P, mean_P, deviation_P = charts.mean_loss(variant)
  losses = []
  for seed in range(3):
    path = tmp_path / 'all' / 'linear' / f'seed-{seed}' / 'metrics.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    loss = [row['loss'] for row in rows if row['split'] == 'train']
    # 40 points: windows of three, of two at the ends.
    losses.append(
      [np.mean(loss[max(i - 1, 0) : i + 2]) for i in range(len(loss))]
    )
  assert steps_P.tolist() == list(range(10, 401, 10))
  np.testing.assert_allclose(mean_P, np.mean(losses, 0))
  np.testing.assert_allclose(deviation_P, np.std(losses, 0, ddof=1))

  spec = charts.training_curve([variant], charts.Palette(['linear'])).chart
  rows = [row for data in values(spec.to_dict()) for row in data]
  assert len(rows) == 40
  for row, mean, deviation in zip(rows, mean_P, deviation_P, strict=True):
    assert row['y'] == pytest.approx(mean, rel=1e-4)
    assert row['high'] - row['low'] == pytest.approx(2 * deviation, abs=1e-3)
    assert row['tokens'] == row['steps'] * 32 * 128
    assert row['flops'] == pytest.approx(row['tokens'] * 13_800_000, rel=1e-4)


def values(spec: dict[str, Any]) -> list[list[Any]]:
  """The data sets of a chart."""
  return list(spec.get('datasets', {}).values()) or [
    layer['data']['values']
    for layer in [spec, *spec['layer']]
    if 'data' in layer
  ]


def test_steps_that_a_seed_lacks_are_left_out() -> None:
  first = np.array([1.0, 2.0, 3.0]), np.array([5.0, 4.0, 3.0])
  second = np.array([2.0, 3.0, 4.0]), np.array([2.0, 1.0, 0.0])
  steps_P, mean_P, deviation_P = runs.over_seeds([first, second])
  assert steps_P.tolist() == [2, 3]
  assert mean_P.tolist() == [3, 2]
  np.testing.assert_allclose(deviation_P, [2**0.5, 2**0.5])


def test_evaluations_of_seeds_are_put_together(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(
    tmp_path / 'all', seeds=(0, 1), analysed=False
  )
  [variant, *_] = report.read([comparison]).variants
  palette = charts.Palette(['linear'])
  made = charts.evaluation_curve([variant], palette, 'validation')
  rows = [row for data in values(made.chart.to_dict()) for row in data]
  last = [
    float(run.run.evaluations['validation'][-1]['bits_per_byte'])
    for run in variant.runs
  ]
  [row] = [
    row
    for row in rows
    if row['steps'] == 400 and row['measure'] == 'bits_per_byte'
  ]
  assert row['y'] == pytest.approx(np.mean(last), rel=1e-4)
  assert row['high'] - row['low'] == pytest.approx(
    2 * np.std(last, ddof=1), abs=1e-3
  )


def test_loads_are_shares_of_windows(tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', points=150, analysed=False)
  steps_P, load_PRN = charts.loads(runs.read_workdir(workdir))
  assert load_PRN.shape == (60, 4, 8)
  lines = (tmp_path / 'mine' / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row['split'] == 'train']
  begin = 0
  for i, step in enumerate(steps_P):
    window = [row for row in rows if begin < row['step'] <= step]
    begin = step
    for r in range(4):
      counts = [
        sum(row['expert_counts'][r // 2][r % 2][n] for row in window)
        for n in range(8)
      ]
      expected = [8 * count / sum(counts) for count in counts]
      np.testing.assert_allclose(load_PRN[i, r], expected)
  assert begin == rows[-1]['step']


def test_routers_are_named_without_an_analysis(tmp_path: Path) -> None:
  of = {'analysed': False, 'layers': 2}
  both = workdirs.make_workdir(tmp_path / 'both', factors=2, **of)
  one = workdirs.make_workdir(tmp_path / 'one', factors=1, **of)
  names = [charts.router_names(runs.read_workdir(run)) for run in (both, one)]
  assert names == [['1A', '1B', '2A', '2B'], ['1', '2']]


# Tables.


def test_configs_differ_in_what_they_differ_in(tmp_path: Path) -> None:
  made = [
    workdirs.make_workdir(
      tmp_path / name, seed=seed, analysed=False, router__recurrent=name
    )
    for seed, name in enumerate(('gru', 'none'))
  ]
  assert report.differences(report.read(made).variants) == {
    'router.recurrent': ['gru', 'none']
  }
  config = json.loads((tmp_path / 'gru' / 'config.json').read_text())
  config['moe']['gone'] = 1
  (tmp_path / 'gru' / 'config.json').write_text(json.dumps(config))
  assert report.differences(report.read(made).variants) == {
    'router.recurrent': ['gru', 'none'],
    'moe.gone': [1, None],
  }


def test_robustness_is_beside_the_usual_perplexity(tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', seed=2, analysed=False)
  [row] = report.robustness(report.read([workdir]).variants)
  assert (row['full'], row['without'], row['ratio']) == (5.0, 8.0, 1.6)
  assert (row['split'], row['step'], row['disabled']) == ('validation', 400, 1)
  (tmp_path / 'mine' / 'evaluation' / 'validation-400.json').unlink()
  [row] = report.robustness(report.read([workdir]).variants)
  assert (row['full'], row['without'], row['ratio']) == (None, 8.0, None)


def test_a_comparison_is_a_table_and_plots(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(tmp_path / 'all', analysed=False)
  read = json.loads((tmp_path / 'all' / 'compare.json').read_text())
  parsed = page(comparison)
  for row in read['rows']:
    assert f'{row["mean"]:.4f} ± {row["deviation"]:.4f}' in parsed.text
    assert f'{row["parameters"]:,}' in parsed.text
    assert row['about'] in parsed.text
  assert '-0.1000 [-0.1400, -0.0600]' in parsed.text
  assert '0.031' in parsed.text
  assert {'comparison0-0', 'comparison0-1'} <= set(parsed.packed['charts'])


def test_the_values_that_were_tried_are_drawn(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(
    tmp_path / 'all', seeds=(0,), analysed=False
  )
  path = tmp_path / 'all' / 'compare.json'
  read = json.loads(path.read_text())
  read['sweep'] = {'key': 'seed,moe.top_k', 'values': [[1, 2], [3, 4]]}
  for row in read['rows']:
    row['swept'] = {'value': [3, 4], 'results': {'1,2': 2.5, '3,4': 2.4}}
  path.write_text(json.dumps(read))
  parsed = page(comparison)
  assert 'search over seed,moe.top_k' in parsed.text


def test_a_comparison_may_have_lost_a_run(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(
    tmp_path / 'all', seeds=(0, 1), analysed=False
  )
  (tmp_path / 'all' / 'rnn' / 'seed-1' / 'metrics.jsonl').unlink()
  subject = report.read([comparison])
  assert [len(variant.runs) for variant in subject.variants] == [2, 2, 1]
  [note] = subject.notes
  assert note.startswith('rnn, seed 1: ')


def test_a_row_of_a_comparison_may_have_no_run(tmp_path: Path) -> None:
  comparison = workdirs.make_comparison(
    tmp_path / 'all', seeds=(0,), analysed=False
  )
  path = tmp_path / 'all' / 'compare.json'
  read = json.loads(path.read_text())
  failed = {'seed': 0, 'workdir': 'rnn/seed-0', 'error': 'the loss is nan'}
  read['rows'][2] |= {'mean': None, 'runs': [], 'failed': [failed]}
  read['rows'][2] |= {'difference': None, 'interval': None}
  path.write_text(json.dumps(read))
  assert 'rnn, seed 0, failed: the loss is nan' in page(comparison).text


def test_of_many_variants_the_later_lines_are_broken(tmp_path: Path) -> None:
  names = [f'v{i}' for i in range(8)]
  palette = charts.Palette(names)
  assert palette.later == names[6:] and not palette.dashes(names[:6])
  broken = palette.dashes(names)['strokeDash'].to_dict()['scale']['range']
  told = [
    (palette.colours[n], str(d)) for n, d in zip(names, broken, strict=True)
  ]
  assert len(set(told)) == 8


def test_two_comparisons_keep_their_variants_apart(tmp_path: Path) -> None:
  of = {'seeds': (0,), 'analysed': False}
  made = [workdirs.make_comparison(tmp_path / x, **of) for x in 'ab']
  parsed = page(*made)
  assert 'a: linear' in parsed.text and 'b: linear' in parsed.text
  assert {'comparison0', 'comparison1'} <= parsed.ids


def test_characters_that_are_not_seen_are_shown() -> None:
  assert report.shown('a b\n\t\x00\x7f') == 'a␣b⏎⇥␀␡'
  assert report.shown('\ud800\x85<é') == '\ufffd\ufffd<é'


# The program.


def test_the_program_writes_beside_the_run(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', analysed=False)
  assert report.main([workdir]) == 0
  output = Path(workdir) / 'report.html'
  assert f'written to {output}' in capsys.readouterr().out
  assert output.read_text('utf-8').startswith('<!doctype html>')


@pytest.mark.parametrize(
  'name, text, fragment',
  [
    ('metrics.jsonl', '', 'no step of training'),
    ('compare.json', '{"format": 2}', 'is not of a comparison'),
    ('compare.json', '[', 'is not of a comparison'),
    ('other', '', 'metrics.jsonl cannot be read'),
  ],
)
def test_mistakes_are_one_line(
  name: str,
  text: str,
  fragment: str,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  (tmp_path / name).write_text(text)
  assert report.main([str(tmp_path)]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and fragment in line


@pytest.mark.parametrize(
  'name', ['config.json', 'run.json', 'analysis/500.json']
)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  (tmp_path / 'mine' / name).write_text('{')
  with pytest.raises(UserError, match=re.escape(name)):
    report.read([workdir])


@pytest.mark.parametrize('text', ['[]', '{"format": 0}'])
def test_an_analysis_of_another_version_is_named(
  text: str, tmp_path: Path
) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  newest = tmp_path / 'mine' / 'analysis' / '900.json'
  newest.write_text(text)
  with pytest.raises(UserError, match='900.json .* moe_jax analyze again'):
    report.read([workdir])


def test_metrics_that_are_no_text_are_named(tmp_path: Path) -> None:
  (tmp_path / 'metrics.jsonl').write_bytes(b'\xff')
  with pytest.raises(UserError, match='metrics.jsonl cannot be read'):
    report.read([str(tmp_path)])


@pytest.mark.parametrize(
  ('program', 'package'), [('report', 'altair'), ('plots', 'matplotlib')]
)
def test_a_missing_package_is_one_line_with_the_command(
  program: str, package: str
) -> None:
  code = (
    f'import sys; sys.modules[{package!r}] = None;'
    f" sys.argv[1:] = [{program!r}, '.'];"
    ' from moe_jax.__main__ import main; main()'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert f"{package}: pip install 'moe_jax[eval]'" in line


@pytest.mark.parametrize('name', ['metrics.jsonl', 'compare.json', 'run.json'])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  (tmp_path / 'mine' / name).unlink(missing_ok=True)
  os.mkfifo(tmp_path / 'mine' / name)
  with pytest.raises(UserError, match=f'{name} .*ot a regular file'):
    report.read([workdir])


@pytest.mark.parametrize('text', ['[1]', '{"starts": 3}', '{"starts": [1]}'])
def test_a_record_that_is_none_is_left_out(text: str, tmp_path: Path) -> None:
  workdir = workdirs.make_workdir(tmp_path / 'mine', tokens=20)
  (tmp_path / 'mine' / 'run.json').write_text(text)
  report.read([workdir])


def test_metrics_that_are_nested_too_deeply_are_named(tmp_path: Path) -> None:
  (tmp_path / 'metrics.jsonl').write_text('[' * 10**5 + '\n{}\n')
  with pytest.raises(UserError, match='metrics.jsonl:1 is not a JSON object'):
    report.read([str(tmp_path)])
