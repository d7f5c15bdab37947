"""Eight fake CPU devices for every test, and one compilation cache."""

import os
import pathlib

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

# Before any test touches a device: the backend then starts with eight.
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')

# Most of a run's time is compilation, and most of it the same as last time.
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
