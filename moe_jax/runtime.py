"""Sets the process up for jax: CPUs' memory, and compilers without devices.

XLA on CPUs takes the temporaries of a step from malloc and frees them after
it. By default glibc returns blocks of that size to the kernel at once, and the
next step pays a page fault for each 4 KiB of them again; where it was measured
(two virtual cores) a training step took 1.2 to 1.7 times as long. So malloc is
told to keep them. The price: the process stays as large as it ever was, and its
threads share one arena. So what compiling took is given back once by hand
(`trim_malloc`).

JAX asks libtpu for devices wherever it is installed. Without a TPU it looks for
the cloud's metadata, warns on stderr and takes a lock that lets one process of
the machine in. None of that is needed to compile. Its plugin for CUDA is loaded
wherever it is installed too, and says at length what of CUDA is missing.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os

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
# The two ways in which TPUs appear.
TPUS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# NVIDIA, NVIDIA under Windows, AMD, TPUs.
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/dxg', '/dev/kfd', *TPUS)
_QUIET = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_LOG_DIR': 'disabled',
  # Asked for at the start, and not used: any will do.
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def configure_malloc() -> bool:
  """Sets glibc's malloc for runs on CPUs; returns whether it did.

  Programs call it, before they import jax: the settings hold for the whole
  process. Environment `MOE_JAX_TUNE_MALLOC=0` switches it off.
  """
  if os.environ.get(SWITCH) == '0' or not runs_on_cpu():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, TypeError, OSError):  # not glibc: nothing to set
    return False
  return all(mallopt(*setting) for setting in _SETTINGS.values())


def trim_malloc() -> None:
  """Returns to the system what the process has freed, which is used no more.

  It is called after a compilation, which frees as much memory as a model may
  need. The next step takes its temporaries anew. Without glibc nothing happens.
  """
  with contextlib.suppress(AttributeError, TypeError, OSError):
    ctypes.CDLL(None).malloc_trim(0)


def silence_plugins() -> None:
  """Keeps JAX's plugins quiet whose devices are not here; before jax."""
  silence_libtpu()
  silence_cuda()


def silence_libtpu() -> None:
  """Sets libtpu's environment where there are no TPUs.

  It is called before jax is imported; variables that are set stay as they are.
  """
  if any(glob.glob(pattern) for pattern in TPUS):
    return
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)


def silence_cuda() -> None:
  """Has JAX choose the CPU where its plugin for CUDA is, and no accelerator.

  The plugin still compiles. It is called before jax is imported.
  """
  plugins = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
  if runs_on_cpu() and any(map(importlib.util.find_spec, plugins)):
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def runs_on_cpu() -> bool:
  """Returns whether jax, which is not imported yet, will choose the CPU."""
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.split(',')[0].strip() == 'cpu'
  return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
