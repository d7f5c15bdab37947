"""The grouped matmul that a config gets on a device, and what was measured."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import MESH_AXES
from moe_jax.errors import UserError
from moe_jax.experts.dispatch import (
  Capacity,
  Dispatch,
  dropless,
  dropless_weighing_outputs,
)
from moe_jax.experts.grouped_matmul import case, tokamax
from moe_jax.model import implementations, tuned
from moe_jax.model.implementations import available_matmuls, chosen_matmul
from moe_jax.model.tuned import Measured
from tests.helpers import tiny


@dataclasses.dataclass(frozen=True)
class Device:
  """What is asked of a device that is not here."""

  platform: str
  device_kind: str = 'a kind'
  compute_capability: str = '9.0'


def on(platform: str, capability: str = '9.0') -> Device:
  return Device(platform, compute_capability=capability)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  file = tmp_path / 'deep' / 'tuned.json'
  monkeypatch.setenv('MOE_JAX_TUNED', str(file))
  monkeypatch.setattr(tuned, '_shared', [])
  monkeypatch.setattr(tuned, '_told', set())
  return file


def store(device: Any, case: str, **seconds: float) -> None:
  tuned.store(device, {case: Measured(seconds, {})})


def test_auto_is_what_suits_the_platform() -> None:
  assert chosen_matmul('auto', on('cpu')).name == 'blocks'
  assert chosen_matmul('auto', on('gpu')).name == 'triton'
  assert chosen_matmul('auto', on('gpu', '7.5')).name == 'padded'
  assert chosen_matmul('auto', on('gpu', 'gfx942')).name == 'padded'  # AMD's
  assert chosen_matmul('auto', on('tpu')).name == 'megablox'
  assert chosen_matmul('auto', on('rocm')).name == 'ragged_dot'


def test_gpus_unroll_what_is_not_too_deep() -> None:
  unrolled = implementations.unrolled
  assert unrolled(0, on('gpu'), 24) == 24
  assert unrolled(0, on('gpu'), 25) == 1
  assert unrolled(0, on('cpu'), 24) == unrolled(0, on('tpu'), 24) == 1
  assert unrolled(3, on('gpu'), 24) == unrolled(3, on('cpu'), 24) == 3


@pytest.mark.parametrize(
  ('width', 'remat', 'expected'),
  [
    (32, 'none', dropless),
    (33, 'none', dropless_weighing_outputs),
    (33, 'dots', dropless),
    (33, 'full', dropless),
  ],
)
def test_hidden_units_or_outputs_are_weighed(
  width: int, remat: str, expected: Dispatch
) -> None:
  config = tiny.config(moe__expert_width=width, model__remat=remat)
  assert config.model.hidden_size == 32
  assert implementations.dispatch(config, None, jnp.float32) is expected
  config.moe.dispatch = 'capacity'
  made = implementations.dispatch(config, None, jnp.float32)
  assert isinstance(made, Capacity)


def test_without_tokamax_auto_falls_back_and_says_so(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  monkeypatch.setattr(tokamax, 'installed', lambda: False)
  with caplog.at_level(logging.WARNING):
    assert chosen_matmul('auto', on('gpu')).name == 'padded'
  assert "pip install 'moe_jax[cuda]'" in caplog.text
  with pytest.raises(UserError, match=r'needs the package tokamax: pip'):
    chosen_matmul('triton', on('gpu'))


def test_a_tokamax_without_the_kernel_is_no_choice(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  monkeypatch.setattr(tokamax, 'missing', lambda each, _: f'no {each.rows}')
  with caplog.at_level(logging.WARNING):
    assert chosen_matmul('auto', on('gpu')).name == 'padded'
  assert "says 'no triton'" in caplog.text
  with pytest.raises(UserError, match=r'is not in tokamax [0-9.]+, which says'):
    chosen_matmul('triton', on('gpu'))


@pytest.mark.parametrize(
  ('asked', 'where', 'message'),
  [
    ('triton', on('cpu'), "'triton' does not run on cpu; here it can be auto,"),
    ('mosaic', on('gpu', '8.0'), 'needs compute capability 9.0, and this is 8'),
    ('triton', on('gpu', 'gfx942'), 'capability 8.0, and this is gfx942'),
    ('mosaic', on('tpu'), 'is compiled only where such a device is'),
    ('mosaic+triton', on('gpu', '8.6'), 'needs compute capability 9.0, and'),
    ('mosaic+triton', on('tpu'), 'does not run on tpu'),
    ('blcks', on('cpu'), "did you mean 'blocks'"),
  ],
)
def test_what_cannot_run_is_one_clear_line(
  asked: str, where: Device, message: str
) -> None:
  with pytest.raises(UserError, match=message) as error:
    chosen_matmul(asked, where)
  assert str(error.value).startswith(f'moe.grouped_matmul = {asked!r}')
  assert '\n' not in str(error.value)


def test_auto_takes_what_was_measured_on_this_device() -> None:
  device, shapes = jax.devices()[0], case(100, 4, 3, 5, 'float32')
  store(device, shapes, padded=1.0, blocks=2.0, triton=0.1)
  store(device, 'others', blocks=1.0)
  assert dict(chosen_matmul('auto', device).measured) == {
    shapes: 'padded',  # triton cannot run here
    'others': 'blocks',
  }
  assert not chosen_matmul('padded', device).measured
  assert not chosen_matmul('auto', on('cpu')).measured  # of another kind


@pytest.mark.parametrize(
  'text',
  [
    '{',
    '[]',
    '{"a": 1}',
    '{"a": {"b": {"c": 1.0}}}',
    '{"a": {"b": {"seconds": {"c": {}}, "tiles": {}}}}',
  ],
)
def test_a_broken_file_is_ignored_and_named(
  text: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
  cache.parent.mkdir()
  cache.write_text(text)
  device = jax.devices()[0]
  assert chosen_matmul('auto', device).name == 'blocks'
  assert f'ignored {cache}' in caplog.text
  store(device, 'c', blocks=1.0)
  assert json.loads(cache.read_text()) == {
    tuned.key(device): {'c': {'seconds': {'blocks': 1.0}, 'tiles': {}}}
  }


def test_what_other_versions_measured_is_not_used(
  cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Which is said once, and nothing of other devices."""
  device = jax.devices()[0]
  store(on('gpu'), 'c', padded=1.0)
  assert not chosen_matmul('auto', device).measured
  assert not caplog.records
  key = f'{device.device_kind}, jax 0.1, no tokamax'
  with monkeypatch.context() as then:
    then.setattr(tuned, 'key', lambda device: key)
    store(device, 'c', padded=1.0)
  for _ in range(2):
    assert not chosen_matmul('auto', device).measured
  (line,) = [record.getMessage() for record in caplog.records]
  assert 'with jax 0.1, no tokamax are not used with jax' in line
  assert '--tune measures anew' in line


def test_tiles_go_to_the_kernels_of_their_shapes(
  caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Of `auto` and by name, but to none that has no such kernels."""
  tiles = {'triton': {'device_kind': 'a', 'data': []}}
  good, bad = Measured({'triton': 1.0}, tiles), Measured({}, {'triton': 1})
  tuned.store(on('gpu'), {'good': good, 'bad': bad})
  for asked in ('auto', 'triton'):
    matmul = chosen_matmul(asked, on('gpu'))
    assert matmul.tiles == (('good', json.dumps(tiles)),)
    assert matmul.device == on('gpu')  # which is not here
  assert caplog.text.count('ignored the tiles of bad') == 1
  assert not chosen_matmul('padded', on('gpu')).tiles
  mesh = dict.fromkeys(MESH_AXES, 1)
  parts = implementations.resolved(tiny.config(), mesh, on('gpu'))
  assert parts['grouped_matmul.tiled'] == 'good'


def test_all_use_what_the_first_process_has_measured(cache: Path) -> None:
  device, sent = jax.devices()[0], []
  store(device, 'c', padded=1.0)
  tuned.share(lambda text: sent.append(text) or text)
  cache.unlink()
  tuned.share(lambda text: sent[0])
  assert dict(chosen_matmul('auto', device).measured) == {'c': 'padded'}


def test_available_lists_what_has_no_obstacle() -> None:
  assert available_matmuls(on('cpu')) == ['blocks', 'ragged_dot', 'padded']
  assert available_matmuls(on('gpu')) == [
    'blocks',
    'ragged_dot',
    'padded',
    'triton',
  ]
  on_tpus = available_matmuls(on('tpu'))
  assert on_tpus[-1] == 'megablox' and 'triton' not in on_tpus


@pytest.mark.parametrize(
  ('changes', 'axes', 'device', 'expected'),
  [
    ({}, {}, on('cpu'), 'float32 blocks blocks none'),
    ({}, {'expert': 4}, on('gpu', '9.0'), 'bfloat16 cudnn triton all_to_all'),
    ({}, {'expert': 8}, on('tpu'), 'bfloat16 splash megablox ragged'),
    (
      {
        'model.attention': 'xla',
        'moe.grouped_matmul': 'padded',
        'moe.exchange': 'gather',
      },
      {'expert': 4},
      on('tpu'),
      'bfloat16 xla padded gather',
    ),
    ({'moe.num_experts': 0}, {}, on('cpu'), 'float32 blocks'),
    (
      {'model.positions': 'span', 'model.span': 4},
      {},
      on('cpu'),
      'float32 span blocks none',
    ),
  ],
)
def test_what_runs_is_told(
  changes: dict[str, Any],
  axes: dict[str, int],
  device: Device,
  expected: str,
) -> None:
  config = tiny.config(**{'model.dtype': 'auto'} | changes)
  config.model.hidden_size = 256  # so that a head is wide enough for cuDNN
  mesh = dict.fromkeys(MESH_AXES, 1) | axes
  parts = implementations.resolved(config, mesh, device)
  assert ' '.join(parts.values()) == expected


def test_what_was_measured_is_told() -> None:
  device, shapes = jax.devices()[0], case(100, 4, 3, 5, 'float32')
  store(device, shapes, padded=1.0, blocks=2.0)
  mesh = dict.fromkeys(MESH_AXES, 1)
  parts = implementations.resolved(tiny.config(), mesh, device)
  assert parts['grouped_matmul.measured'] == f'{shapes}: padded'
