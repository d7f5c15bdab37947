"""Programs of one process timed in turn, and how rows fall to groups."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import choose


class Program(NamedTuple):
  """What is measured: `function(*operands)`, compiled."""

  function: Callable[..., Any]
  operands: tuple[Any, ...]


def in_turn(
  programs: Mapping[str, Program], rounds: int, warmup: int = 2
) -> dict[str, np.ndarray]:
  """Seconds of every program in every round; a round runs each of them once.

  A machine whose speed drifts is then fair to them: compare within rounds.
  """
  compiled = {
    name: jax.jit(function).lower(*operands).compile()
    for name, (function, operands) in programs.items()
  }
  seconds = {name: [] for name in programs}
  for _ in range(warmup + rounds):
    for name, program in compiled.items():
      began = time.perf_counter()
      jax.block_until_ready(program(*programs[name].operands))
      seconds[name].append(time.perf_counter() - began)
  return {name: np.array(times[warmup:]) for name, times in seconds.items()}


def ratio(times: np.ndarray, base: np.ndarray) -> float:
  """The median over rounds of what one took over what the other did."""
  return float(np.median(times / base))


KINDS = ('balanced', 'random', 'half')


def kinds(flag: str) -> list[str]:
  """Of `KINDS` those that --kinds names.

  Raises:
    UserError: one of them is not known.
  """
  return [choose('--kinds', kind, KINDS) for kind in flag.split(',')]


def choices(kind: str, num_tokens: int, top_k: int, num_experts: int) -> Any:
  """The experts of every token's assignments, int32 [T, K].

  Args:
    kind: 'balanced'; 'random', by scores of which some experts have more; or
      'half', where expert 0 has every other assignment and the rest is even.
    num_tokens: T.
    top_k: K.
    num_experts: N.
  """
  rng = np.random.default_rng(0)
  assignments = num_tokens * top_k
  if kind == 'balanced':
    chosen = rng.permutation(np.arange(assignments) % num_experts)
  elif kind == 'random':
    popular_N = 0.25 * rng.standard_normal(num_experts)
    scores_TN = rng.standard_normal((num_tokens, num_experts)) + popular_N
    chosen = np.argsort(-scores_TN, axis=1)[:, :top_k]
  else:
    chosen = rng.integers(min(1, num_experts - 1), num_experts, assignments)
    chosen[::2] = 0
  return chosen.astype(np.int32).reshape(num_tokens, top_k)


def dtype_of(name: str) -> Any:
  """Of the flag --dtype; auto is bfloat16 where the device is good at it."""
  if name == 'auto':
    on_cpu = jax.devices()[0].platform == 'cpu'
    name = 'float32' if on_cpu else 'bfloat16'
  return jnp.dtype(name)


def square_matmul(dtype: Any) -> tuple[int, Program]:
  """A matmul that shows what the device can do, and its size."""
  size = 2048 if jax.devices()[0].platform == 'cpu' else 8192
  ones = jnp.ones((size, size), dtype)
  return size, Program(jnp.matmul, (ones, ones))


def skew(chosen_TK: np.ndarray, num_experts: int) -> float:
  """Assignments of the busiest expert over the mean."""
  sizes = np.bincount(chosen_TK.reshape(-1), minlength=num_experts)
  return float(sizes.max() / sizes.mean())
