"""Peaks of devices by their names, and the share of one that is used."""

from types import SimpleNamespace

import pytest

from moe_jax.training import device_peaks, terminal

# What jax calls them.
KINDS = {
  'TPU v4': 275,
  'TPU v5 lite': 197,
  'TPU v5e': 197,
  'TPU v5': 459,
  'TPU v5p': 459,
  'TPU v6 lite': 918,
  'TPU7x': 1153.5,
  'NVIDIA A100-SXM4-80GB': 312,
  'NVIDIA H100 PCIe': 756,
  'NVIDIA H100 80GB HBM3': 989.5,
  'NVIDIA H100 NVL': 835.5,
  'NVIDIA H200': 989.5,
  'NVIDIA H200 NVL': 835.5,
  'NVIDIA GH200 480GB': 989.5,
  'NVIDIA B200': 2250,
  'NVIDIA GB200': 2500,
}


@pytest.mark.parametrize('kind', KINDS)
def test_peak_of_every_kind(kind: str) -> None:
  assert device_peaks.peak(kind, 'bfloat16') == pytest.approx(
    KINDS[kind] * 1e12
  )


@pytest.mark.parametrize('kind', ['cpu', 'TPU v3', 'NVIDIA GeForce RTX 4090'])
def test_no_peak_of_the_unknown(kind: str) -> None:
  assert device_peaks.peak(kind, 'bfloat16') is None


def test_no_peak_of_unpublished_arithmetic() -> None:
  assert device_peaks.peak('TPU v4', 'float32') is None
  assert device_peaks.peak('NVIDIA H200', 'float32') == pytest.approx(494.5e12)


def test_utilisation_is_of_each_device() -> None:
  """4 devices, 394 T/s of all: 98.5 of each, half of a v5e's 197."""
  devices = [SimpleNamespace(device_kind='TPU v5 lite')] * 4
  used = device_peaks.utilisation(394e12, devices, 'bfloat16')
  assert used == {
    'tflops_per_second': pytest.approx(98.5),
    'mfu': pytest.approx(0.5),
  }
  unknown = [SimpleNamespace(device_kind='cpu')]
  assert device_peaks.utilisation(2e12, unknown, 'float32') == {
    'tflops_per_second': 2.0
  }


def test_progress_line_tells_it_where_it_is_known() -> None:
  line = terminal.progress_line(5, 10, 1.0, 2e6, 3.0, 0.381)
  assert '2M tokens/s  38.1% MFU  3s left' in line
  assert 'MFU' not in terminal.progress_line(5, 10, 1.0, 2e6, 3.0)
