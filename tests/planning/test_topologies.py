"""Slices of TPUs by name, and the mistakes in their names."""

import os

import pytest

from moe_jax import runtime
from moe_jax.errors import UserError
from moe_jax.planning import topologies

MISTAKES = {
  'v5e': ['chip:sizes', 'v5e:4x4', 'v5p:4x4x4'],
  'v5p-8': ['chip:sizes'],
  'v5e:4x': ['chip:sizes'],
  'v6p:2x2': ["no chip 'v6p'", "did you mean 'v6e'", 'v4, v5e, v5p'],
  'v5e:2x2x2': ['flat', 'v5e:4x4'],
  'v5e:3x5': ['does not exist', 'not divisible'],
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(name: str) -> None:
  with pytest.raises(UserError) as error:
    topologies.target(name)
  for fragment in [f"--topology = '{name}'", *MISTAKES[name]]:
    assert fragment in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, slices, count, kind',
  [
    ('v5e:1x1', 1, 1, 'TPU v5 lite'),
    ('v5e:2x4', 1, 8, 'TPU v5 lite'),
    ('v5litepod:2x2', 3, 12, 'TPU v5 lite'),
    ('v4:2x2x2', 1, 8, 'TPU v4'),  # one device per chip
    ('v5p:2x2x1', 2, 8, 'TPU v5'),
    ('v6e:16x16', 1, 256, 'TPU v6 lite'),
    ('v7x:2x2x1', 1, 8, 'TPU7x'),  # two devices per chip
  ],
)
def test_devices(name: str, slices: int, count: int, kind: str) -> None:
  target = topologies.target(name, slices)
  assert len(target.devices) == count
  assert {device.device_kind for device in target.devices} == {kind}
  assert {device.platform for device in target.devices} == {'tpu'}
  if slices > 1:
    assert len({device.slice_index for device in target.devices}) == slices
  assert target.chip.memory_bytes > 15 << 30


def test_slices_are_counted() -> None:
  with pytest.raises(UserError, match='--slices = 0 must be at least 1'):
    topologies.target('v5e:2x2', 0)


def test_libtpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
  def missing(*arguments: object, **options: object) -> None:
    raise RuntimeError('JAX TPU support not installed; cannot generate')

  monkeypatch.setattr(topologies.topologies, 'get_topology_desc', missing)
  with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
    topologies.target('v5e:2x2')


def test_libtpu_is_quiet_where_there_are_no_tpus(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(os, 'environ', {'TPU_LOG_DIR': '/logs'})
  monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: ['/dev/accel0'])
  runtime.silence_libtpu()
  assert os.environ == {'TPU_LOG_DIR': '/logs'}
  monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: [])
  runtime.silence_libtpu()
  assert os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] == '1'
  assert os.environ['TPU_LOG_DIR'] == '/logs'
