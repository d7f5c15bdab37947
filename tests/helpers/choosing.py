"""Selection and balance from the equations, in float64 numpy.

As `oracles`, token by token and expert by expert, without jax.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from tests.helpers.routing_oracles import sigmoid, softmax

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Selection:
  """How experts are chosen; the names are those of the config's keys."""

  top_k: int = 2
  selection: str = 'top_k'
  top_p: float = 0.4
  weights: str = 'softmax'
  renormalize: bool = True
  groups: int = 1
  top_groups: int = 1
  disable_top: int = 0

  @classmethod
  def of(cls, config: ConfigDict, disable_top: int) -> 'Selection':
    names = 'selection top_p weights groups top_groups'.split()
    return cls(
      top_k=config.moe.top_k,
      renormalize=config.moe.renormalize,
      disable_top=disable_top,
      **{name: config.router[name] for name in names},
    )


class Chosen(NamedTuple):
  """Of one token: experts in order of choice, their weights, and p_N."""

  experts: list[int]
  weights: Array
  probabilities_N: Array


def select(logits_N: Array, how: Selection, bias_N: Any = 0.0) -> Chosen:
  """Chooses the experts of one token."""
  sigmoids = how.weights == 'sigmoid'  # arXiv 2412.19437 eq. 13-15
  scores_N = sigmoid(logits_N) if sigmoids else softmax(logits_N)
  p_N = scores_N / scores_N.sum()
  best = sorted(range(len(p_N)), key=lambda n: (-p_N[n], n))
  allowed = set(best[how.disable_top :])
  choice_N = scores_N + np.asarray(bias_N)  # eq. 16: for the choice alone
  allowed &= in_best_groups(choice_N, allowed, how)
  order = sorted(allowed, key=lambda n: (-choice_N[n], n))
  kept = order[: how.top_k]
  if how.selection == 'top_p':
    kept = exceeding(p_N, order, how.top_p)
  return Chosen(kept, weigh(logits_N, scores_N, kept, how), p_N)


def in_best_groups(
  choice_N: Array, allowed: set[int], how: Selection
) -> set[int]:
  """arXiv 2412.19437 sec. 2.1.2: groups rank by the sum of their two best."""
  size = len(choice_N) // how.groups
  ranked = []
  for group in range(how.groups):
    members = allowed & set(range(group * size, (group + 1) * size))
    two = sorted((choice_N[n] for n in members), reverse=True)[:2]
    ranked.append((-sum(two) if two else math.inf, group, members))
  best = sorted(ranked, key=lambda entry: entry[:2])[: how.top_groups]
  return set().union(*(members for _, _, members in best))


def exceeding(p_N: Array, order: list[int], bound: float) -> list[int]:
  """Up to and including the expert with which the sum exceeds the bound."""
  kept, total = [], 0.0
  for n in order:
    kept.append(n)
    total += p_N[n]
    if total > bound:
      break
  return kept


def weigh(
  logits_N: Array, scores_N: Array, kept: list[int], how: Selection
) -> Array:
  if how.weights == 'chosen':
    return softmax(logits_N[kept])
  weights = scores_N[kept]
  alone = how.selection == 'top_k' and how.top_k == 1
  return weights / weights.sum() if how.renormalize and not alone else weights


# Balance. A batch is a list of sequences, those lists of real tokens' Chosen.
Batch = list[list[Chosen]]


def balance_loss(micro_batches: list[Batch], scope: str, num: int) -> float:
  """N sum_n f_n P_n (arXiv 2101.03961 eq. 4-6), f_n over what `scope` says.

  The global batch is one batch, and sequences are sequences, whatever the
  micro-batches; what is taken over these is their mean, token by token.
  """
  if scope == 'global_batch':
    return uneven(sum((sum(batch, []) for batch in micro_batches), []), num)
  if scope == 'sequence':  # arXiv 2412.19437 eq. 17-20, without its 1 / K
    sequences = sum(micro_batches, [])
    return float(np.mean([uneven(seq, num) for seq in sequences if seq]))
  parts = [tokens for batch in micro_batches if (tokens := sum(batch, []))]
  losses = [uneven(part, num) for part in parts]
  return float(np.average(losses, weights=list(map(len, parts))))


def uneven(tokens: list[Chosen], num: int) -> float:
  total = 0.0
  for n in range(num):
    f_n = sum(token.experts.count(n) for token in tokens) / len(tokens)
    p_n = sum(token.probabilities_N[n] for token in tokens) / len(tokens)
    total += f_n * p_n
  return num * total


def z_loss(logits_TN: Array) -> float:
  """ST-MoE (arXiv 2202.08906) eq. 5: the mean squared log-sum-exp."""
  return float(np.mean([np.log(np.exp(row).sum()) ** 2 for row in logits_TN]))


def nudged(bias_N: Array, counts_N: Array, rate: float) -> Array:
  """arXiv 2408.15664: a bias rises where fewer tokens than the mean came."""
  return bias_N + rate * np.sign(counts_N.mean() - counts_N)
