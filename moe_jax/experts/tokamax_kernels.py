"""Grouped matmuls of the package tokamax: Pallas kernels for GPU and TPU.

tokamax is optional and slow to import, so this happens where it is used.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax


def installed() -> bool:
  """Whether tokamax can be imported."""
  return importlib.util.find_spec('tokamax') is not None


def triton(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """By Triton, for NVIDIA GPUs from compute capability 8.0."""
  return _ragged_dot('triton', rows_MD, bank_NDF, sizes_N)


def mosaic(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """By Mosaic, for TPUs from generation 5 and NVIDIA GPUs from 9.0."""
  return _ragged_dot('mosaic', rows_MD, bank_NDF, sizes_N)


def _ragged_dot(kernel: str, *operands: jax.Array) -> jax.Array:
  import tokamax

  # A list of one: with None tokamax would try others without a word.
  return tokamax.ragged_dot(*operands, implementation=[kernel])


def traced(implementation: Any) -> Any:
  """A named tuple of functions, each traced in tokamax's settings."""
  return type(implementation)(*map(_traced, implementation))


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(function)
  def wrapped(*operands: jax.Array) -> Any:
    with _settings():
      return function(*operands)

  return wrapped


@contextlib.contextmanager
def _settings() -> Iterator[None]:
  from absl import flags
  from tokamax import config

  if not flags.FLAGS.is_parsed():
    # Or tokamax parses the arguments of a program whose flags it cannot know.
    flags.FLAGS.mark_as_parsed()
  with config.cross_compile(True):  # the device need not be here
    yield
