"""Workdirs as train, eval, analyze and compare leave them, without training."""

import inspect
import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.config import saved
from moe_jax.training.metrics_writer import MetricsWriter

CLASSES = ['name', 'keyword', 'number', 'operator', 'string', 'comment']


def make_workdir(
  folder: Path,
  layers: int = 2,
  factors: int = 2,
  experts: int = 8,
  seed: int = 0,
  points: int = 40,
  tokens: int = 2000,
  gain: float = 0.0,
  analysed: bool = True,
  evaluated: bool = True,
  **changes: Any,
) -> str:
  """A run of 10 * `points` steps.

  Args:
    folder: The workdir, made with the folders above it.
    layers: MoE layers.
    factors: Sub-layers of each.
    experts: of a sub-layer.
    seed: of the run, and of what is drawn at random here.
    points: logged steps.
    tokens: of the passage.
    gain: what the loss is lower.
    analysed: Whether there is an analysis.
    evaluated: Whether there is an evaluation without the best expert.
    **changes: Keys of the config, with __ for the dot.
  """
  folder.mkdir(parents=True)
  config = config_lib.get_config()
  config.seed = seed
  config.model.num_layers = layers
  config.moe.factors = factors
  config.moe.num_experts = experts
  config.train.steps = 10 * points
  for key, value in changes.items():
    config.update_from_flattened_dict({key.replace('__', '.'): value})
  (folder / 'config.json').write_text(saved.to_json(config))
  (folder / 'run.json').write_text(json.dumps(_record(folder)))
  rng = np.random.default_rng(seed)
  shares = rng.dirichlet(np.full(experts, 2.0), (layers, factors))
  with MetricsWriter(str(folder), None) as writer:
    for step in range(10, 10 * points + 1, 10):
      falling = math.exp(-step / (3 * points))
      mixed = falling * shares + (1 - falling) / experts
      counts = rng.multinomial(2048, mixed)
      loss = 1.5 - gain + 4.0 * falling + 0.05 * rng.standard_normal()
      entropy = np.log(experts) * (0.6 + 0.4 * falling)
      values = {
        'loss': loss,
        'tokens_per_second': 1000.0,
        'tflops_per_second': 0.002,
        'max_load': counts.max((1, 2)) * experts / 2048,
        'dropped_share': np.zeros(layers),
        'router_entropy': entropy - 0.1 * np.arange(layers),
        'expert_counts': counts,
      }
      writer.write(step, 'train', values)
      if step % (2 * points) == 0:
        loss = 1.6 - gain + 4.0 * falling + 0.01 * rng.standard_normal()
        result = {'loss': loss, 'bits_per_byte': loss / math.log(2)}
        writer.write(step, 'validation', result)
  if analysed:
    name = f'{folder.parent.name}/{folder.name}'
    found = analysis(name, layers, factors, experts, tokens, seed)
    _write(folder / 'analysis' / f'{10 * points}.json', found)
  if evaluated:
    row = {'split': 'validation', 'step': 10 * points, 'perplexity': 5.0}
    path = folder / 'evaluation' / f'validation-{10 * points}'
    _write(path.with_name(f'{path.name}.json'), row)
    without = row | {'disabled_top': 1, 'perplexity': 7.5 + seed / 4}
    _write(path.with_name(f'{path.name}-without-top-1.json'), without)
  return str(folder)


def make_comparison(
  folder: Path, seeds: tuple[int, ...] = (0, 1, 2), **options: Any
) -> str:
  """A comparison of three variants, which differ in their routers."""
  rows: list[dict[str, Any]] = []
  kinds = {'linear': ('none', 0.0), 'rmoe': ('gru', 0.1), 'rnn': ('rnn', 0.05)}
  for name, (recurrent, gain) in kinds.items():
    runs = []
    for seed in seeds:
      place = Path(name) / f'seed-{seed}'
      make_workdir(
        folder / place,
        seed=seed,
        gain=gain,
        router__recurrent=recurrent,
        **options,
      )
      bits = 2.3 - gain + 0.02 * math.sin(7 * seed + 50 * gain)
      runs.append(
        {
          'seed': seed,
          'workdir': str(place),
          'bits_per_byte': bits,
          'loss': bits * math.log(2),
          'steps': 400,
          'tokens': 400 * 1024,
          'seconds': 61.5 + seed,
        }
      )
    found = np.array([run['bits_per_byte'] for run in runs])
    row = {
      'variant': name,
      'about': f'the {name} router',
      'changes': {'router.recurrent': recurrent},
      'parameters': 7_000_000 + len(name),
      'active_parameters': 2_300_000,
      'flops_per_token': 13_800_000,
      'matched': None,
      'swept': None,
      'runs': runs,
      'mean': found.mean(),
      'deviation': found.std(ddof=1) if len(seeds) > 1 else None,
      'difference': -gain if gain else None,
      'interval': [-gain - 0.04, -gain + 0.04] if gain else None,
      'p_value': 0.0312 if gain else None,
    }
    rows.append(row)
  comparison = {
    'format': 1,
    'config': 'quickstart',
    'overrides': {},
    'baseline': 'linear',
    'match': 'none',
    'metric': 'bits_per_byte',
    'split': 'validation',
    'seeds': list(seeds),
    'sweep': None,
    'rows': rows,
  }
  _write(folder / 'compare.json', comparison)
  return str(folder)


def analysis(
  name: str, layers: int, factors: int, experts: int, tokens: int, seed: int
) -> dict[str, Any]:
  """What analyze writes of a model, drawn at random where it is a number."""
  rng = np.random.default_rng([seed, *name.encode()])
  count = layers * factors
  letters = string.ascii_uppercase[:factors] if factors > 1 else ['']
  numbers = np.arange(count) // factors + 1
  names = [f'{layer}{x}' for layer in range(1, layers + 1) for x in letters]
  text = inspect.getsource(inspect)[: 4 * tokens][:tokens]
  known = sorted(set(text))
  ids = np.array([known.index(letter) for letter in text])
  logits = 1.6 * rng.standard_normal((count, len(known), experts))[:, ids]
  logits += 0.8 * rng.standard_normal(logits.shape)
  odds = np.exp(logits)
  probability = odds / odds.sum(-1, keepdims=True)
  top = np.argsort(-probability)[..., :4]
  top_probability = np.take_along_axis(probability, top, -1)
  chosen = top_probability[..., :2]
  weights = chosen / chosen.sum(-1, keepdims=True)
  frequency = 2 * rng.dirichlet(np.full(experts, 8.0), count)
  distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
  shares = rng.dirichlet(np.full(experts**2, 0.7), layers)
  classes = rng.dirichlet(np.full(len(CLASSES), 1.5), (count, experts))
  edges = np.linspace(0, math.log(experts), 41)
  middles = (edges[1:] + edges[:-1]) / 2
  means = 0.3 + 0.5 * rng.random(count) * math.log(experts)
  density = np.exp(-((middles - means[:, None]) ** 2) / 0.08)
  density /= (density * np.diff(edges)).sum(-1, keepdims=True)
  steps = [100, 200, 300, 400]
  falling = np.exp(-np.arange(4) / 2)[:, None] * np.ones(count)

  def words() -> list[dict[str, Any]]:
    picked = rng.choice(known, 8, replace=False)
    return [
      {'token': str(t), 'share': round(0.2 / (i + 1), 3), 'lift': 4.5 - i / 2}
      for i, t in enumerate(picked)
    ]

  found = {
    'format': 1,
    'run': name,
    'step': 400,
    'split': 'validation',
    'tokens': 65536,
    'routers': {
      'names': names,
      'layers': numbers.tolist(),
      'experts': experts,
      'top_k': 2,
      'factors': factors,
      'gate': 'linear',
      'recurrent': 'gru',
    },
    'mutual_information': 2.5 * np.exp(-distance / 2) + 0.05 * (distance > 1),
    'gate_entropy': {'edges': edges, 'density': density, 'mean': means},
    'inner_balance': _spread(rng, count, 2.0),
    'outer_balance': _spread(rng, count, 0.7),
    'selection_frequency': frequency,
    'expert_similarity': {
      'measured': 0.1 + 0.2 * rng.random(count),
      'random': np.full(count, 0.06),
    },
    'norms': {
      'router': 1 + 0.2 * rng.random((count, experts)),
      'experts': 20 + 3 * rng.random((count, experts)),
    },
    'pairs': {
      'shares': shares.reshape(layers, experts, experts),
      'live': (shares > 0.1 / experts**2).mean(-1),
      'entropy': np.exp(-(shares * np.log(shares + 1e-12)).sum(-1))
      / experts**2,
    }
    if factors > 1
    else None,
    'agreement': {
      'below': [None, *rng.uniform(0.2, 0.5, count - 1)],
      'chance': np.full(count, 2 / experts),
    },
    'vocabulary': [[words() for _ in range(experts)] for _ in range(count)],
    'token_classes': {
      'source': 'python tokenize',
      'classes': CLASSES,
      'share': classes,
      'base': np.full(len(CLASSES), 1 / len(CLASSES)),
    },
    'checkpoints': {
      'steps': steps,
      'route_stability': 1 - 0.6 * falling[1:] - 0.02 * rng.random((3, count)),
      'gradient_norm': {
        'cross_entropy': 0.3 * falling + 0.05 * rng.random((4, count)),
        'balance_loss': 0.1 * falling + 0.02 * rng.random((4, count)),
      },
      'drop_ratio': 0.25 * falling + 0.02 * rng.random((4, count)),
    },
    'passage': {
      'tokens': list(text),
      'loss': [None, *rng.gamma(1.2, 1.0, tokens - 1).round(3)],
      'experts': top[..., :2],
      'weights': weights.round(3),
      'top': top,
      'top_probability': top_probability.round(3),
    },
  }
  return json.loads(json.dumps(found, default=lambda array: array.tolist()))


def _spread(rng: np.random.Generator, count: int, middle: float) -> dict:
  median = middle * rng.uniform(0.7, 1.3, count)
  quartiles = np.stack([0.8 * median, 1.25 * median], -1)
  return {'median': median.tolist(), 'quartiles': quartiles.tolist()}


def _record(folder: Path) -> dict[str, Any]:
  start = {
    'step': 0,
    'devices': '1 cpu',
    'parameters': 7_000_000,
    'active_parameters': 2_300_000,
    'flops_per_token': 13_800_000,
    'versions': {'python': '3.11.7', 'jax': '0.10.2', 'moe_jax': '0.1.0'},
    'command': ['moe_jax train', '--config=quickstart', f'--workdir={folder}'],
    'time': '2026-11-30T10:16:40+00:00',
  }
  return {'extensions': [], 'starts': [start]}


def _write(path: Path, value: Any) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(value))
