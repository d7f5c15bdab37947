"""Eight fake CPU devices for every test, and one compilation cache."""

import gc
import os
import pathlib
import signal
from collections.abc import Iterator

# Tests compile far longer than they compute: nothing is optimised, and loops
# are made by the older of the CPU's emitters, which takes half of the time of
# the newer one. Processes that tests start inherit it.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
)

from moe_jax import runtime

runtime.silence_libtpu()

import jax  # noqa: E402 (reads the flags above)
import pytest  # noqa: E402

# Before any test touches a device: the backend then starts with eight.
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')

# Most of a run's time is compilation, and most of it the same as last time.
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)

# Programs stay in memory until they are dropped; a worker is to hold less than
# 1.5 GB.
_ENOUGH = 900 << 20


@pytest.fixture(scope='session', autouse=True)
def interruptible() -> Iterator[None]:
  """Programs that the tests start heed SIGINT and SIGHUP.

  A shell's jobs in the background ignore the one, those of nohup the other, and
  so would their children.
  """
  heeded = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
  }
  before = {number: signal.getsignal(number) for number in heeded}
  for number, handler in before.items():
    if handler is signal.SIG_IGN:
      signal.signal(number, heeded[number])
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.fixture(scope='module', autouse=True)
def bounded_memory() -> Iterator[None]:
  """Drops compiled programs between two files where they have become many."""
  yield
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  if pages * os.sysconf('SC_PAGE_SIZE') > _ENOUGH:
    jax.clear_caches()
    gc.collect()
    runtime.trim_malloc()
