"""How much memory a process has held: the peak of its resident set."""

import contextlib
import re
import resource
import sys
from pathlib import Path

from moe_jax import runtime

_STATUS = Path('/proc/self/status')
_CLEAR = Path('/proc/self/clear_refs')


def peak_bytes() -> int:
  """The most since the process began, or since `start_anew`."""
  with contextlib.suppress(OSError):
    found = re.search(r'^VmHWM:\s+(\d+) kB', _STATUS.read_text('utf-8'), re.M)
    if found:
      return int(found[1]) * 1024
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_anew() -> bool:
  """Lets the peak begin at what is in use now; returns whether it could.

  What the process has freed goes back to the system first. Only Linux forgets
  a peak, and only glibc gives back what lies between blocks in use.
  """
  runtime.trim_malloc()
  try:
    _CLEAR.write_text('5', 'utf-8')
  except OSError:
    return False
  return True
