"""Slices of TPUs and hosts of GPUs by name, and the mistakes in their names."""

import math
import os
import re
import types
from typing import Any

import pytest

from moe_jax import runtime
from moe_jax.errors import UserError
from moe_jax.planning import gpus, topologies
from moe_jax.training import device_peaks

MISTAKES = {
  'v5e': ['chip:sizes', 'v5e:4x4', 'v5p:4x4x4'],
  'v5p-8': ['chip:sizes'],
  'v5e:4x': ['chip:sizes'],
  'v6p:2x2': ["no chip 'v6p'", "did you mean 'v6e'", 'v4, v5e, v5p'],
  'v5e:2x2x2': ['flat', 'v5e:4x4'],
  'v5e:3x5': ['does not exist', 'not divisible'],
  'h10:1x8': ["no chip 'h10'", "did you mean 'h100'", 'a100, h100, h200, b200'],
  'h100:8': ['chip:sizes', 'h100:1x8'],
  'b200:1x8x2': ['HOSTSxDEVICES', 'b200:1x8'],
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


def test_slices_are_not_of_gpus() -> None:
  with pytest.raises(UserError, match='--slices = 2 is of TPUs.*h100:2x8'):
    topologies.target('h100:1x8', 2)


def test_the_compiler_of_gpus_is_missing(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def missing(*arguments: object, **options: object) -> None:
    raise NotImplementedError('topology not implemented for cuda')

  monkeypatch.setattr(topologies.topologies, 'get_topology_desc', missing)
  with pytest.raises(UserError) as error:
    topologies.target('h100:1x8')
  assert "pip install 'moe_jax[gpu-compiler]'" in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', gpus.GPUS)
def test_gpus_as_xla_is_told_of_them(
  name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Rates come to the published peaks, and blocks are the language's."""
  asked: dict[str, Any] = {}

  def describe(named: str, **options: Any) -> Any:
    asked.update(options)
    return types.SimpleNamespace(devices=[])

  monkeypatch.setattr(topologies.topologies, 'get_topology_desc', describe)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
  told = topologies.target(f'{name}:2x8')
  text, gpu = asked['target_config'], gpus.GPUS[name]
  assert asked['topology'] == '1x2x8' and asked['platform'] == 'cuda'
  assert told.chip.memory_bytes == gpu.memory_bytes // 2
  assert f'device_memory_size: {gpu.memory_bytes} ' in text
  assert f'device_description_str: "{gpu.kind}"' in text
  assert text.count('{') == text.count('}')
  matrix = text.split('matrix_unit_description')[1]
  rate = re.search(
    r'key: 16 value { clock_rate_ghz: (\S+) units_per_core: (\d+)'
    r' ops_per_clock: (\d+)',
    matrix,
  )
  per_second = 2 * math.prod(map(float, rate.groups())) * gpu.multiprocessors
  # Vendors count with a lower clock than that of the vector units.
  peak = device_peaks.peak(gpu.kind, 'bfloat16')
  assert peak <= 1.01e9 * per_second <= 1.12 * peak


def test_a_share_of_memory_that_is_none(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', 'most')
  with pytest.raises(UserError, match="MEM_FRACTION = 'most' is no number"):
    gpus.usable_bytes(gpus.GPUS['h100'])


def test_the_memory_of_a_gpu_is_what_programs_will_get(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  monkeypatch.delenv('XLA_CLIENT_MEM_FRACTION', raising=False)
  h100 = gpus.GPUS['h100']
  assert gpus.usable_bytes(h100) == int(0.92 * h100.memory_bytes)
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.5')
  assert gpus.usable_bytes(h100) == h100.memory_bytes // 2


@pytest.mark.parametrize(
  'plugin, accelerator, platforms',
  [(True, False, 'cpu'), (True, True, None), (False, False, None)],
)
def test_plugins_of_cuda_are_quiet_where_there_is_no_gpu(
  plugin: bool,
  accelerator: bool,
  platforms: str | None,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(os, 'environ', {})
  monkeypatch.setattr(
    runtime.glob, 'glob', lambda pattern: ['/dev/nvidia0'] * accelerator
  )
  monkeypatch.setattr(
    runtime.importlib.util, 'find_spec', lambda name: plugin or None
  )
  runtime.silence_cuda()
  assert os.environ.get('JAX_PLATFORMS') == platforms


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
