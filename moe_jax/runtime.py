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

Of NVIDIA's GPUs JAX takes three quarters of the memory, for who shares one with
others. A training run does not, and gets more. And a program of a GPU takes
minutes to compile, partly because kernels are chosen by timing them: both
results are kept for the next start.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

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
# Those of NVIDIA, and of NVIDIA under Windows.
_NVIDIA = ('/dev/nvidia[0-9]*', '/dev/dxg')
_ACCELERATORS = (*_NVIDIA, '/dev/kfd', *TPUS)  # and of AMD
# The share of a GPU's memory that programs get: the rest is for what CUDA, NCCL
# and cuDNN take beside them.
GPU_MEMORY_SHARE = '0.92'
# Where JAX reads it; it refuses both together.
_SHARE, _NEWER_SHARE = (
  'XLA_PYTHON_CLIENT_MEM_FRACTION',
  'XLA_CLIENT_MEM_FRACTION',
)
_CACHE, _CACHE_SWITCH = (
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_ENABLE_COMPILATION_CACHE',
)
_LEAST_FREE = 4 << 30  # bytes of a disk on which compiled programs are kept
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


def configure_gpu() -> None:
  """Sets JAX up for NVIDIA's GPUs, if there are any; before it is imported.

  Variables of the environment that are set stay as they are.
  """
  if runs_on_cpu() or not any(glob.glob(pattern) for pattern in _NVIDIA):
    return
  os.environ.setdefault(gpu_memory_variable(), GPU_MEMORY_SHARE)
  _keep_compiled()


def gpu_memory_variable() -> str:
  """Returns the variable in which JAX reads its share of a GPU's memory."""
  return _NEWER_SHARE if os.environ.get(_NEWER_SHARE) else _SHARE


def _keep_compiled() -> None:
  """Has JAX keep compiled programs, and XLA the kernels it chose, in a folder.

  It is `moe_jax/compiled` in the user's cache. Where it cannot be, or the disk
  is nearly full, nothing is kept: XLA would fail to compile if it could not
  write there.
  """
  switch = os.environ.get(_CACHE_SWITCH, '').lower()
  if _CACHE in os.environ or switch in ('0', 'false', 'n', 'no', 'off'):
    return
  try:
    folder = _cache_folder()
    # What is in it will be run, so it is nobody else's.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
    if shutil.disk_usage(folder).free < _LEAST_FREE:
      raise OSError(f'less than {_LEAST_FREE >> 30} GiB are free at {folder}')
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
    print(
      f'note: what is compiled is not kept ({error}); {_CACHE} names another'
      f' folder for it, {_CACHE_SWITCH}=0 asks for none',
      file=sys.stderr,
    )
    return
  os.environ[_CACHE] = str(folder)


def _cache_folder() -> Path:
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'moe_jax' / 'compiled'


def keeps_compiled_here() -> bool:
  """Returns whether what is compiled is kept in a folder nobody has named."""
  return _CACHE in os.environ and os.environ[_CACHE] == str(_cache_folder())


def runs_on_cpu() -> bool:
  """Returns whether jax, which is not imported yet, will choose the CPU."""
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms.split(',')[0].strip() == 'cpu'
  return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
