"""Which grouped matmul was the fastest: measured once, kept in a file.

`python -m benchmarks.grouped_matmul --tune` writes it, `--show_tuned` prints
it, and `moe.grouped_matmul = auto` reads it. The file is
`grouped_matmul.json` in the folder `moe_jax` of the user's cache, or what
MOE_JAX_TUNED names. It holds JSON: of every device and set of versions the
seconds of every implementation in every case.
"""

import importlib.metadata
import logging
import os
from collections.abc import Container, Mapping
from pathlib import Path

import jax

from moe_jax import files, strict_json

_VARIABLE = 'MOE_JAX_TUNED'
_LOG = logging.getLogger(__name__)

# Of a device: case -> implementation -> seconds.
Seconds = dict[str, dict[str, float]]


def path() -> Path:
  """Returns where the file is, or would be."""
  if _VARIABLE in os.environ:
    return Path(os.environ[_VARIABLE])
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(cache) / 'moe_jax' / 'grouped_matmul.json'


def load() -> dict[str, Seconds]:
  """Returns all measurements, by device; a broken file is ignored."""
  try:
    everything = files.read_json(path())
    return {
      device: {
        case: {name: float(s) for name, s in seconds.items()}
        for case, seconds in cases.items()
      }
      for device, cases in everything.items()
    }
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    _LOG.warning('ignored %s: %s', path(), error)
    return {}


def best(device: jax.Device, possible: Container[str]) -> dict[str, str]:
  """Returns the fastest of the possible implementations by measured case."""
  fastest = {}
  for case, seconds in load().get(key(device), {}).items():
    usable = {name: s for name, s in seconds.items() if name in possible}
    if usable:
      fastest[case] = min(usable, key=usable.__getitem__)
  return fastest


def store(
  device: jax.Device, measured: Mapping[str, Mapping[str, float]]
) -> None:
  """Adds measurements to the file; those of the same cases are replaced."""
  everything = load()
  cases = everything.setdefault(key(device), {})
  cases.update({case: dict(seconds) for case, seconds in measured.items()})
  path().parent.mkdir(parents=True, exist_ok=True)
  draft = path().with_suffix(f'.{os.getpid()}')
  draft.write_text(strict_json.dumps(everything, indent=2) + '\n', 'utf-8')
  draft.replace(path())  # at once: others may be reading


def key(device: jax.Device) -> str:
  """Returns the device and the versions that a measurement holds for."""
  versions = [f'jax {jax.__version__}']
  try:
    versions.append(f'tokamax {importlib.metadata.version("tokamax")}')
  except importlib.metadata.PackageNotFoundError:
    versions.append('no tokamax')
  return ', '.join([device.device_kind, *versions])
