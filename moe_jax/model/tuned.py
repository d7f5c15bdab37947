"""Which grouped matmul was the fastest: measured once, kept in a file.

`python -m benchmarks.grouped_matmul --tune` writes it, `--show_tuned` prints
it, and `moe.grouped_matmul` reads it: `auto` the seconds, all the tiles. The
file is `grouped_matmul.json` in the folder `moe_jax` of the user's cache, or
what MOE_JAX_TUNED names. It holds JSON: of every device and set of versions,
for every case the seconds of every implementation and the tiles of kernels.

Several processes have to build one program, and use what process 0 has
measured: see `share`.
"""

import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax import files, strict_json

_VARIABLE = 'MOE_JAX_TUNED'
_LOG = logging.getLogger(__name__)


class Measured(NamedTuple):
  """What was measured of a case.

  Attributes:
    seconds: Those of every implementation, by name.
    tiles: What `tokamax.tune` returned for every kernel, by name.
  """

  seconds: dict[str, float]
  tiles: dict[str, Any]


# Of a device: by case.
Cases = dict[str, Measured]

# What process 0 has, once it has been shared; see `share`.
_shared: list[dict[str, Cases]] = []
_told: set[str] = set()


def path() -> Path:
  """Returns where the file is, or would be."""
  if _VARIABLE in os.environ:
    return Path(os.environ[_VARIABLE])
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(cache) / 'moe_jax' / 'grouped_matmul.json'


def load() -> dict[str, Cases]:
  """Returns all measurements, by device; a broken file is ignored."""
  if _shared:
    return _shared[-1]
  try:
    return _parsed(files.read_json(path()))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
    _tell(f'ignored {path()}: {error!r}; --tune writes it anew')
    return {}


def _parsed(everything: Any) -> dict[str, Cases]:
  return {
    device: {
      case: Measured(
        {name: float(s) for name, s in measured['seconds'].items()},
        dict(measured['tiles']),
      )
      for case, measured in cases.items()
    }
    for device, cases in everything.items()
  }


def share(exchange: Callable[[str], str]) -> None:
  """Has this process use what process 0 has measured.

  All processes of a run call it alike, before they build a model.

  Args:
    exchange: Returns the text that process 0 calls it with.
  """
  _shared.clear()
  _shared.append(_parsed(json.loads(exchange(_text(load())))))


def cases(device: jax.Device) -> Cases:
  """Returns what was measured on such a device with these versions.

  Of one that has measurements with other versions alone it is said that they
  are not used.
  """
  everything, wanted = load(), key(device)
  if wanted not in everything:
    kind = f'{device.device_kind}, '
    if stale := [other for other in everything if other.startswith(kind)]:
      _tell(
        f'measurements of grouped matmuls with {stale[-1].removeprefix(kind)}'
        f' are not used with {wanted.removeprefix(kind)}; --tune measures anew'
      )
  return everything.get(wanted, {})


def best(device: jax.Device, possible: Container[str]) -> dict[str, str]:
  """Returns the fastest of the possible implementations by measured case."""
  fastest = {}
  for case, measured in cases(device).items():
    seconds = measured.seconds
    usable = {name: s for name, s in seconds.items() if name in possible}
    if usable:
      fastest[case] = min(usable, key=usable.__getitem__)
  return fastest


def tiles(
  device: jax.Device, unreadable: Callable[[str], str | None]
) -> dict[str, str]:
  """Returns the tiles of kernels by measured case, each as a text of JSON.

  Args:
    device: A device of the kind that they are for.
    unreadable: Returns why a text cannot be used, None if it can. What cannot
      is ignored, and that is said.
  """
  found = {}
  for case, measured in cases(device).items():
    if not measured.tiles:
      continue
    text = strict_json.dumps(measured.tiles)
    if reason := unreadable(text):
      _tell(f'ignored the tiles of {case} in {path()}: {reason}')
    else:
      found[case] = text
  return found


def store(device: jax.Device, measured: Mapping[str, Measured]) -> None:
  """Adds measurements to the file; those of the same cases are replaced."""
  everything = load()
  everything.setdefault(key(device), {}).update(measured)
  path().parent.mkdir(parents=True, exist_ok=True)
  draft = path().with_suffix(f'.{os.getpid()}')
  draft.write_text(_text(everything) + '\n', 'utf-8')
  draft.replace(path())  # at once: others may be reading


def as_json(everything: Mapping[str, Cases]) -> dict[str, Any]:
  """Returns what `load` does, for JSON."""
  return {
    device: {case: each._asdict() for case, each in of_device.items()}
    for device, of_device in everything.items()
  }


def _text(everything: Mapping[str, Cases]) -> str:
  return strict_json.dumps(as_json(everything), indent=2)


def key(device: jax.Device) -> str:
  """Returns the device and the versions that a measurement holds for."""
  versions = [f'jax {jax.__version__}']
  try:
    versions.append(f'tokamax {importlib.metadata.version("tokamax")}')
  except importlib.metadata.PackageNotFoundError:
    versions.append('no tokamax')
  return ', '.join([device.device_kind, *versions])


def _tell(line: str) -> None:
  """Warns once: a model may be built several times."""
  if line not in _told:
    _told.add(line)
    _LOG.warning(line)
