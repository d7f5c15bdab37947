"""The scaling benchmark: its rule, its rows, its table and its picture."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling, scaling_results
from moe_jax.errors import UserError
from tests.helpers import tiny


@pytest.mark.parametrize(
  'chips, experts, given, axes',
  [
    (4, 16, (16, 1), (1, 4, 1)),
    (16, 16, (16, 1), (1, 16, 1)),
    (256, 16, (16, 1), (16, 16, 1)),
    (16, 16, (4, 16), (1, 4, 4)),
    (256, 16, (4, 16), (4, 4, 16)),
    (64, 8, (4, 16), (2, 4, 8)),
    (256, 0, (4, 16), (64, 4, 1)),
  ],
)
def test_meshes_follow_from_the_chips(
  chips: int, experts: int, given: tuple[int, int], axes: tuple[int, ...]
) -> None:
  config = tiny.config(moe__num_experts=experts, train__accumulation=2)
  placed = scaling.on_chips(config, chips, 3, *given)
  mesh = placed.mesh
  assert (mesh.data, mesh.fsdp, mesh.expert) == axes and mesh.tensor == 1
  assert placed.train.batch_size == 3 * 2 * chips
  assert config.train.batch_size == 8  # untouched


def row(label: str, chips: int, **changes: object) -> dict[str, object]:
  made = {
    'label': label,
    'arguments': '--config=x.py',
    'topology': f'v5e:{chips}',
    'num_devices': chips,
    'mesh': {'data': 1, 'fsdp': 2, 'expert': chips // 2, 'tensor': 1},
    'tokens_per_step': 4096,
    'fits': True,
    'memory_bytes': {'total': 3 << 30},
    'available_bytes': 16 << 30,
    'sent_bytes_per_token': 2048.0,
    'compile_cpu_seconds': 61.4,
    'cycles': {
      'fusion_seconds': 0.01,
      'kernel_seconds': 0.0023,
      'mfu_bound': 0.407,
    },
    'roofline': {
      'seconds': 0.0081,
      'mfu_bound': 0.52,
      'parts': {
        'attention': {'seconds': 0.0041},
        'scan': {'seconds': 0.003},
        'optimizer': {'seconds': 0.001},
      },
    },
  }
  return made | changes


@pytest.mark.slow
def test_results_are_kept_and_drawn(tmp_path: Path) -> None:
  scaling_results.keep(row('a', 4, compile_cpu_seconds=7.0), tmp_path)
  scaling_results.keep(row('a', 16), tmp_path)
  unknown = {'fusions': 10**6, 'mfu_bound': None}
  scaling_results.keep(row('c', 4, cycles=unknown), tmp_path)
  scaling_results.keep(row('d', 4, roofline=None), tmp_path)
  scaling_results.keep(row('b', 4, fits=False, needed_bytes=20 << 30), tmp_path)
  scaling_results.keep(row('a', 4), tmp_path)  # in place of the first
  lines = (tmp_path / 'scaling.jsonl').read_text().splitlines()
  assert [json.loads(line)['num_devices'] for line in lines] == [4, 16, 4, 4, 4]
  table = (tmp_path / 'README.md').read_text()
  assert (
    '| a | v5e:4 | 1 x 2 x 2 | 4,096 | 3.00 | 2.0 | 61 | 12 | 40.7 | 8 | 52.0 |'
    in table
  )
  assert (
    '| 61 | 12 | 40.7 |  |  |' in table and '| d | v5e:4 | 4 |' not in table
  )
  # By parts, what has no column together.
  assert '| a | v5e:4 | 4 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 3 |' in table
  assert 'does not fit: 20.00' in table and '| 7 |' not in table
  assert (
    '| 2.0 | 61 |  |  | 8 | 52.0 |' in table
  )  # of a clock that nobody publishes
  assert table.count('benchmarks.scaling --config=x.py') == 4  # a, b, c, d
  assert '--topologies=v5e:4,v5e:16 \\\n      --label=a ' in table
  assert 'compiled for slices of TPUs' in table and 'MaxText' in table
  assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')


def test_results_of_gpus_are_compared_with_gpus() -> None:
  text = scaling_results.readme([row('a', 8, topology='h100:1x8', cycles=None)])
  assert text.startswith('# Training steps compiled for GPUs\n')
  assert '8 x H100' in text and 'MaxText' not in text
  # Its compiler estimates no time.
  assert '| 61 | 8 | 52.0 |' in text and 'compiler, ms' not in text


@pytest.mark.slow
def test_slices_of_different_chips_are_different_rows(tmp_path: Path) -> None:
  for topology in ('v6e:4x4', 'v5e:4x4', 'v6e:4x4'):
    scaling_results.keep(row('a', 16, topology=topology), tmp_path)
  lines = (tmp_path / 'scaling.jsonl').read_text().splitlines()
  found = [json.loads(line)['topology'] for line in lines]
  assert found == ['v5e:4x4', 'v6e:4x4']


def test_without_matplotlib_nothing_is_compiled(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  monkeypatch.setattr(scaling_results, 'find_spec', lambda name: None)
  monkeypatch.setattr(scaling, 'measure', None)
  with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
    scaling.run(tiny.config(), True, ['v5e:2x2'], 1, 4, 1, 'a', str(tmp_path))


def test_the_arguments_of_a_row() -> None:
  argv = ['--config=a.py:b', '--json', '--label=a b', '--sequences', '2']
  argv += ['--results', 'c d', '--topologies=v5e:2x2', '--config.seed=3']
  kept = '--config=a.py:b --sequences 2 --config.seed=3'
  assert scaling.arguments(argv) == kept


@pytest.mark.parametrize('flag', ['sequences', 'fsdp', 'expert'])
def test_what_is_given_is_counted_from_one(flag: str) -> None:
  given = {'sequences': 1, 'fsdp': 4, 'expert': 1} | {flag: 0}
  with pytest.raises(UserError, match=f'--{flag} = 0'):
    next(scaling.measure(tiny.config(), ['v5e:2x2'], **given))


@pytest.mark.slow
def test_rows_of_compiled_steps() -> None:
  config = tiny.config(model__dtype='auto', moe__factors=2)
  four, eight = scaling.measure(config, ['v5e:2x2', 'v5e:2x4'], 2, 2, 2)
  assert four['num_devices'] == 4 and eight['num_devices'] == 8
  assert four['tokens_per_step'] * 2 == eight['tokens_per_step'] == 256
  for made in (four, eight):
    assert made['fits'] and made['compile_seconds'] > 0
    sent = sum(made['collectives'].values()) * made['num_devices']
    per_token = made['sent_bytes_per_token']
    assert sent / made['tokens_per_step'] == pytest.approx(per_token)
    json.dumps(made)
