"""Keeps glibc from giving memory back to the system after every step.

XLA on CPUs takes the temporaries of a step from malloc and frees them after
it. By default glibc returns blocks of that size to the kernel at once, and the
next step pays a page fault for each 4 KiB of them again; where it was measured
(two virtual cores) a training step took 1.2 to 1.7 times as long. The price of
keeping them: the process stays as large as it ever was, and its threads share
one arena. So what compiling took is given back once by hand (`give_back`).
"""

import contextlib
import ctypes
import glob
import os

from moe_jax import libtpu

SWITCH = 'MOE_JAX_TUNE_MALLOC'

# Names from malloc.h. A block beyond the largest mmap threshold is mapped
# whatever the threshold, so mapping is switched off (M_MMAP_MAX); the memory
# of other arenas than the first is trimmed whatever M_TRIM_THRESHOLD.
_SETTINGS = {
  'M_ARENA_MAX': (-8, 1),
  'M_TRIM_THRESHOLD': (-1, -1),  # never
  'M_MMAP_MAX': (-4, 0),
  'M_TOP_PAD': (-2, 64 << 20),  # bytes the heap grows by
}
# NVIDIA, AMD, TPUs.
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', *libtpu.TPUS)


def tune() -> bool:
  """Sets glibc's malloc for runs on CPUs; returns whether it did.

  To be called before jax is imported, by programs only: the settings hold for
  the whole process. Environment `MOE_JAX_TUNE_MALLOC=0` switches it off.
  """
  if os.environ.get(SWITCH) == '0' or not _runs_on_cpu():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, TypeError, OSError):  # not glibc: nothing to set
    return False
  return all(mallopt(*setting) for setting in _SETTINGS.values())


def give_back() -> None:
  """Returns to the system what the process has freed, which is used no more.

  For after a compilation, which frees as much memory as a model may need. The
  next step takes its temporaries anew. Without glibc nothing happens.
  """
  with contextlib.suppress(AttributeError, TypeError, OSError):
    ctypes.CDLL(None).malloc_trim(0)


def _runs_on_cpu() -> bool:
  """Guesses, without importing jax, that it will choose the CPU."""
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.split(',')[0].strip() == 'cpu'
  return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
