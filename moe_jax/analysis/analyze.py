"""The papers' analyses of routing, of a checkpoint of a run.

What is found of step N goes to DIR/analysis/N.json; `docs/analysis.md` says
what every number is.
"""

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import disk, files, strict_json
from moe_jax.analysis import figures, parameters, token_classes
from moe_jax.analysis import routing as routing_lib
from moe_jax.analysis.routing import Statistics, TokenCounts
from moe_jax.analysis.runs import ANALYSIS_FORMAT
from moe_jax.config import mixture
from moe_jax.data import orders, sources
from moe_jax.data.pipeline import eval_batches
from moe_jax.data.sequences import TokenSequences
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.experts.layer import Aux
from moe_jax.model import build
from moe_jax.model.attention import AttentionState, segments_of
from moe_jax.model.decoder import Decoder, Hidden
from moe_jax.model.loss import Targets
from moe_jax.model.routers import by_router
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.routing.selection import Routing
from moe_jax.training import losses, state, terminal
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir

_BATCH_TOKENS = 16_384  # of a batch, unless eval.batch_size says otherwise
_FIXED_TOKENS = 4096  # of the batch on which checkpoints are compared
_HEAD_TOKENS = 512  # whose logits exist together
_MOST_TOLD = 8  # tokens that stand for an expert
_MOST_RATED = 4  # experts of a token of the passage
_DIGITS = 6  # significant, of the numbers in the file

Params = dict[str, Any]


def analyze(
  config: ConfigDict,
  workdir: str,
  *,
  step: int | None = None,
  split: str | None = None,
  tokens: int = 1_000_000,
  passage: int = 2000,
) -> dict[str, Any]:
  """Analyses a checkpoint of a run, on any mesh.

  Prints a table, and writes DIR/analysis/STEP.json and a picture of each
  analysis beside it.

  Args:
    config: The config that the run was made with; keys of the mesh and of
      evaluation may differ.
    workdir: The directory of the run.
    step: The step of the checkpoint; None for the newest.
    split: The split of the data; None for `eval.split`.
    tokens: The most tokens to read.
    passage: The tokens from the beginning of the split that are shown.

  Returns:
    What is in the file.

  Raises:
    UserError: Anything is wrong with config, data, workdir or step, or the
      model has no router.
  """
  if 'moe' not in config_lib.layer_kinds(config):
    raise UserError(
      f'workdir {workdir} is of a dense model, which has no router to analyze;'
      ' give that of a Mixture of Experts'
    )
  state.share_measurements()
  analysis = multihost.first_process_first(
    lambda: _Analysis(config, workdir, split or config.eval.split)
  )
  run = RunDir.existing(workdir, config)
  with Checkpointer(run, analysis.setup.vocabulary) as checkpointer:

    def params_of(step: int | None) -> Params:
      wanted = {'params': analysis.setup.abstract['params']}
      return checkpointer.restore(wanted, step).state['params']

    # One set of parameters is in memory at a time. The first one read is that
    # asked for, so that a missing step is told before anything is computed.
    chosen = checkpointer.latest() if step is None else step
    found = analysis.of_params(params_of(chosen), tokens, passage)
    steps = checkpointer.steps()
    rows = [analysis.of_checkpoint(params_of(kept)) for kept in steps]
  name = os.path.basename(os.path.abspath(workdir))
  result = _plain(
    {
      'format': ANALYSIS_FORMAT,
      'run': name,
      'step': chosen,
      **found,
      'checkpoints': analysis.compared(steps, rows),
    }
  )
  if multihost.is_main_process():
    print(table(result))
    for path in _write(result, workdir):
      print(f'written to {path}')
  return result


class _Analysis:
  """What is measured of parameters: the programs, and the data they read."""

  def __init__(self, config: ConfigDict, workdir: str, split: str) -> None:
    """Opens a split.

    Raises:
      UserError: Anything is wrong with config or data.
    """
    self.config = config
    self.split = split
    self.setup = state.from_config(config, workdir)
    tokenizer = self.setup.tokenizer
    assert tokenizer is not None, 'the setup of a run has one'
    self._tokenizer: Tokenizer = tokenizer
    if config.data.mixture:
      each, *_ = mixture.sources(config.data)
      raise UserError(
        'moe_jax analyze reads one data set, and data.mixture has several'
        f' ({", ".join(mixture.names(config.data))}); name one by its keys, as'
        f' {mixture.as_flags(each)}'
      )
    documents = sources.open_documents(config.data, split)
    length = config.data.seq_len
    self._sequences = TokenSequences(documents, tokenizer, length)
    if not len(self._sequences):
      raise UserError(f'split {split!r} has no token to predict; name another')
    self._tagger = token_classes.tagger_of(documents)
    self._classes = None
    if self._tagger is not None:
      classes = token_classes.Alignment(tokenizer, self._tagger)
      self._classes = self._sequences.of_classes(classes)
    self.names = config_lib.router_names(config)
    self._num_experts: int = config.moe.num_experts
    self._num_rated = build.make_select(config, 0).num_logits
    self._checkpoint_program = self._jit(self._of_checkpoint)

  def of_params(
    self, params: Params, tokens: int, passage: int
  ) -> dict[str, Any]:
    """Returns all that is said of one checkpoint."""
    statistics, ids, classes = self._observed(params, tokens)
    assert statistics.total is not None  # the split has a token
    config, names = self.config, self.names
    factors = config.moe.factors
    edges, density = statistics.entropy_density()
    below, chance = statistics.agreement()
    top_k = config.moe.top_k if config.router.selection == 'top_k' else None
    firsts = [i for i in range(len(names)) if (i + 1) % factors]
    return {
      'split': self.split,
      'tokens': int(statistics.total.tokens),
      'routers': {
        'names': names,
        'layers': np.repeat(config_lib.moe_layers(config), factors),
        'experts': self._num_experts,
        'null_experts': self._num_rated - self._num_experts,
        'top_k': top_k,
        'factors': factors,
        'gate': config.router.score,
        'recurrent': config.router.recurrent,
      },
      'mutual_information': statistics.mutual_information(),
      'gate_entropy': {
        'edges': edges,
        'density': density,
        'mean': statistics.mean_entropy(),
      },
      'inner_balance': _quartiles(statistics.inner_balance),
      'outer_balance': _quartiles(statistics.outer_balance),
      'selection_frequency': statistics.selection_frequency(),
      **self._of_weights(params),
      'pairs': _pairs(statistics, names, firsts) if factors > 1 else None,
      'agreement': {'below': below, 'chance': chance},
      'vocabulary': self._vocabulary(ids),
      'token_classes': self._token_classes(classes),
      'passage': self._passage(params, passage),
    }

  def of_checkpoint(self, params: Params) -> dict[str, np.ndarray]:
    """Returns what is compared between checkpoints, of one of them.

    It is read from the same few tokens for all.
    """
    batch = next(self._batches(self._num_rows(_FIXED_TOKENS)))
    return self._run(self._checkpoint_program, params, batch)[0]

  def compared(
    self, steps: list[int], rows: list[dict[str, np.ndarray]]
  ) -> dict[str, Any]:
    """Returns what changed from checkpoint to checkpoint."""
    count = self._num_experts
    indices = [row['indices_WTK'] for row in rows]
    return {
      'steps': steps,
      'route_stability': [
        [
          routing_lib.stability(a, b, count)
          for a, b in zip(before, after, strict=True)
        ]
        for before, after in itertools.pairwise(indices)
      ],
      'gradient_norm': {
        term: [row[term] for row in rows]
        for term in ('cross_entropy', 'balance_loss')
      },
      'drop_ratio': [
        [routing_lib.drop_ratio(indices_TK, count) for indices_TK in each]
        for each in indices
      ],
    }

  def _observed(
    self, params: Params, tokens: int
  ) -> tuple[Statistics, TokenCounts, TokenCounts | None]:
    """Reads the split up to a number of tokens, batch by batch."""
    statistics = Statistics(self._num_experts)
    ids = TokenCounts(self._num_experts, self.setup.vocab_size)
    classes = None
    if self._tagger is not None:
      classes = TokenCounts(self._num_experts, len(self._tagger.classes))
    num_rows = self.config.eval.batch_size or self._num_rows(_BATCH_TOKENS)
    program, remembered, left = self._jit(self._of_batch), None, tokens
    for batch in self._batches(num_rows):
      found, remembered = self._run(program, params, batch, remembered, left)
      statistics.add_sums(found['sums'], self._num_rated)
      chosen, real_T = found['indices_WTK'], found['real_T']
      ids.add(chosen, found['token_ids'], real_T)
      if classes is not None:
        classes.add(chosen, found['classes'], real_T)
      left -= int(real_T.sum())
      if not left:
        break
    return statistics, ids, classes

  def _num_rows(self, tokens: int) -> int:
    """Returns the rows of a batch of about so many tokens, on this mesh."""
    shards = math.prod(
      self.setup.mesh.shape[axis] for axis in config_lib.BATCH_AXES
    )
    there = math.ceil(len(self._sequences) / shards)
    wanted = tokens // (shards * self.config.data.seq_len)
    return shards * max(1, min(wanted, there))

  def _batches(self, num_rows: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the split, with the classes of tokens where there are some."""
    rows = self._rows(num_rows)
    streams = [self._sequences, self._classes]
    parts = [
      eval_batches(
        stream,
        batch_size=num_rows,
        rows=rows.local,
        order=self.config.data.order,
      )
      for stream in streams
      if stream is not None
    ]
    for batch, *classes in zip(*parts, strict=True):
      for of_classes in classes:
        batch['classes'] = of_classes['token_ids']
      yield rows.join(batch)

  def _rows(self, num_rows: int) -> multihost.Rows:
    return multihost.Rows(mesh_lib.batch_sharding(self.setup.mesh), num_rows)

  def _jit(self, program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a jitted program; every process gets all that it returns.

    It is a function of parameters, a batch, what attention remembers and a
    number of tokens, and returns what it found and the next such memory.
    """
    mesh = self.setup.mesh
    whole, remembered = (
      mesh_lib.replicated(mesh),
      mesh_lib.memory_sharding(mesh),
    )
    params = jax.tree.map(
      lambda leaf: leaf.sharding, self.setup.abstract['params']
    )
    batch = mesh_lib.batch_sharding(mesh)
    return jax.jit(
      program,
      in_shardings=(params, batch, remembered, whole),
      out_shardings=(whole, remembered),
      compiler_options=mesh_lib.compiler_options(mesh),
    )

  def _run(
    self,
    program: Callable[..., Any],
    params: Params,
    batch: dict[str, jax.Array],
    attention_state: AttentionState = None,
    left: int = 0,
  ) -> tuple[Any, AttentionState]:
    """Runs a program of `_jit`; returns NumPy arrays and the next memory."""
    if attention_state is None:
      attention_state = self.setup.start(len(batch['token_ids']))
    left = min(left, np.iinfo(np.int32).max)
    found, remembered = program(params, batch, attention_state, np.int32(left))
    return jax.tree.map(np.asarray, found), remembered

  def _of_batch(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    attention_state: AttentionState,
    left: jax.Array,
  ) -> tuple[dict[str, Any], AttentionState]:
    """Measures the routing of a batch, of its first `left` tokens at most."""
    _, hidden = self._hidden(params, batch, attention_state)
    mask_T = batch['padding_mask'].reshape(-1)
    real_T = mask_T & (jnp.cumsum(mask_T) <= left)
    routing = routing_lib.by_router(hidden.aux, mask_T.size)
    found = {
      'sums': routing_lib.sums_of(routing, real_T, self._num_experts),
      'indices_WTK': routing.indices_TK,
      'real_T': real_T,
      'token_ids': batch['token_ids'].reshape(-1),
    }
    if 'classes' in batch:
      found['classes'] = batch['classes'].reshape(-1)
    return found, hidden.attention_state

  def _hidden(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    attention_state: AttentionState,
  ) -> tuple[Decoder, Hidden]:
    """Returns the model and its last hidden states, with every `Routing`."""
    model: Decoder = nnx.merge(self.setup.eval_graphdef, params)
    return model, model.hidden(
      batch['token_ids'],
      batch['padding_mask'],
      _routing_of,
      attention_state=attention_state,
      segments=segments_of(batch),
    )

  def _of_checkpoint(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    attention_state: AttentionState,
    left: jax.Array,
  ) -> tuple[dict[str, Any], AttentionState]:
    """Returns choices, and the gradients of both losses in the routers."""
    del left
    config = self.config
    routers, rest = parameters.split(params, parameters.ROUTER)
    mask_BL = batch['padding_mask']
    weights_BL = mask_BL / mask_BL.sum()

    def terms(routers: dict) -> tuple[Any, Any]:
      whole = parameters.joined(routers, rest)
      model: Decoder = nnx.merge(self.setup.graphdef, whole)
      x_BLD, aux, remembered = model.hidden(
        batch['token_ids'],
        mask_BL,
        _all,
        attention_state=attention_state,
        segments=segments_of(batch),
      )
      _, metrics = losses.total_loss(
        config,
        self.setup.mesh,
        x_BLD,
        model.head(),
        Targets(batch['targets'], weights_BL),
        aux.load,
      )
      balance = config.loss.balance_weight * metrics['balance_loss']
      return (metrics['loss'], balance), (aux.routing, remembered)

    _, pull, (routing, remembered) = jax.vjp(terms, routers, has_aux=True)

    def norms(*of_terms: float) -> jax.Array:
      [gradient] = pull(tuple(map(jnp.float32, of_terms)))
      trees = by_router(parameters.joined(gradient), config)
      return jnp.stack([parameters.norms(tree) for tree in trees])

    routing = routing_lib.by_router(routing, mask_BL.size)
    return {
      'indices_WTK': routing.indices_TK,
      'cross_entropy': norms(1, 0),
      'balance_loss': norms(0, 1),
    }, remembered

  def _of_window(
    self,
    params: Params,
    batch: dict[str, jax.Array],
    attention_state: AttentionState,
    left: jax.Array,
  ) -> tuple[dict[str, Any], AttentionState]:
    """Returns the first row's routing, and its loss token by token."""
    del left
    model, hidden = self._hidden(params, batch, attention_state)
    x_BLD = hidden.x_BLD.reshape(*batch['token_ids'].shape, -1)
    routing = routing_lib.by_router(hidden.aux, batch['token_ids'].size)
    length = x_BLD.shape[1]
    first = jax.tree.map(lambda a: a[:, :length], routing)
    loss_L = _token_losses(model, x_BLD[0], batch['targets'][0])
    return {'routing': first, 'loss': loss_L}, hidden.attention_state

  def _passage(self, params: Params, tokens: int) -> dict[str, Any]:
    """Returns what happens to the first tokens of the split."""
    tokens = min(tokens, self._sequences.num_tokens)
    in_order = orders.in_order(self._sequences, self.config.data.order)
    size, predicted = self._num_experts, None
    rows = self._rows(self._num_rows(1))
    program, remembered = self._jit(self._of_window), None
    ids: list[int] = []
    loss: list[float | None] = [None]
    columns: dict[str, list[list[Any]]] = {
      key: [[] for _ in self.names]
      for key in ('experts', 'weights', 'top', 'top_probability')
    }
    for i in itertools.count():
      if len(ids) == tokens:
        break
      # All rows but the first are padding.
      window = [in_order.at(len(in_order) if row else i) for row in rows.local]
      batch = rows.join(
        {k: np.stack([w[k] for w in window]) for k in window[0]}
      )
      found, remembered = self._run(program, params, batch, remembered)
      here = in_order.at(i)
      count = min(tokens - len(ids), int(here['padding_mask'].sum()))
      if predicted != here['token_ids'][0]:  # another document's
        loss[-1] = None
      predicted = here['targets'][count - 1]
      ids += here['token_ids'][:count].tolist()
      loss += found['loss'][:count].tolist()
      for w in range(len(self.names)):
        row = jax.tree.map(operator.itemgetter(w), found['routing'])
        for key, values in _per_token(row, size).items():
          columns[key][w] += values[:count]
    texts = [token_text(self._tokenizer, i) for i in ids]
    return {'tokens': texts, 'loss': loss[:tokens], **columns}

  def _of_weights(self, params: Params) -> dict[str, Any]:
    """Returns what the parameters say without any token."""
    declared = by_router(self.setup.declarations, self.config, stacked=False)
    key_r, key_e = parameters.ROUTER, parameters.EXPERTS

    def similar(params: Params) -> jax.Array:
      trees = by_router(params, self.config)
      return jnp.stack(
        [
          parameters.expert_similarity(tree[key_e], of_tree[key_e])
          for tree, of_tree in zip(trees, declared, strict=True)
        ]
      )

    def norms(params: Params) -> tuple[list[Any], list[Any]]:
      trees = by_router(params, self.config)
      pairs = list(zip(trees, declared, strict=True))
      return (
        [
          parameters.gate_norms(t[key_r]['score'], d[key_r]['score'])
          for t, d in pairs
        ],
        [parameters.expert_norms(t[key_e], d[key_e]) for t, d in pairs],
      )

    whole = mesh_lib.replicated(self.setup.mesh)
    similar = jax.jit(similar, out_shardings=whole)
    routers, experts = jax.jit(norms, out_shardings=whole)(params)
    has_weights = all(of_gate is not None for of_gate in routers)
    return {
      'expert_similarity': {
        'measured': similar(params),
        'random': similar(self._fresh_experts()),
      },
      'norms': {
        'router': routers if has_weights else None,
        'experts': experts,
      },
    }

  def _fresh_experts(self) -> Params:
    """Returns experts as a run of this config begins with, of another seed."""
    setup = self.setup

    def experts_of(params: Params) -> Params:
      return parameters.joined(parameters.split(params, parameters.EXPERTS)[0])

    def make(key: jax.Array) -> Params:
      rngs = nnx.Rngs(params=key)
      model = Decoder(self.config, setup.vocab_size, setup.mesh, rngs=rngs)
      return experts_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    places = jax.tree.map(
      lambda leaf: leaf.sharding, experts_of(setup.abstract['params'])
    )
    key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
    return jax.jit(make, out_shardings=places)(key)

  def _vocabulary(self, ids: TokenCounts) -> list[list[list[dict[str, Any]]]]:
    """Returns the tokens that stand for every expert."""
    base_V = ids.base()
    assert ids.counts_WNC is not None

    def told(counts_V: np.ndarray) -> list[dict[str, Any]]:
      shares_V = counts_V / max(counts_V.sum(), 1)
      return [
        {
          'token': token_text(self._tokenizer, token),
          'share': share,
          'lift': lift,
        }
        for token, share, lift in routing_lib.telling(
          shares_V, base_V, _MOST_TOLD
        )
      ]

    return [[told(of_expert) for of_expert in each] for each in ids.counts_WNC]

  def _token_classes(self, classes: TokenCounts | None) -> dict | None:
    """Returns the classes of every expert's tokens."""
    if classes is None or self._tagger is None:
      return None
    return {
      'source': self._tagger.source,
      'classes': list(self._tagger.classes),
      'share': classes.shares(),
      'base': classes.base(),
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
  """Returns the text of a token, `<ID>` where it is no whole character."""
  text = tokenizer.decode([token])
  if text and '\ufffd' not in text:
    return text
  return '<eos>' if token == tokenizer.eos_id else f'<{token}>'


def table(result: dict[str, Any]) -> str:
  """Returns a table of an analysis, a row for each router."""

  def of_router(w: int) -> list[str]:
    similarity, agreement = result['expert_similarity'], result['agreement']
    numbers = [
      result['gate_entropy']['mean'][w],
      result['inner_balance']['median'][w],
      result['outer_balance']['median'][w],
      max(result['selection_frequency'][w]),
      similarity['measured'][w],
      similarity['random'][w],
      agreement['below'][w],
      agreement['chance'][w],
    ]
    return ['-' if n is None else f'{n:.3f}' for n in numbers]

  head = [
    'router',
    'entropy',
    'inner balance',
    'outer balance',
    'busiest',
    'similarity',
    'random',
    'as below',
    'chance',
  ]
  names = result['routers']['names']
  rows = [[name, *of_router(w)] for w, name in enumerate(names)]
  about = f'{result["run"]}, step {result["step"]}, {result["split"]}'
  tokens = f'{result["tokens"]:,} tokens'
  return f'{about}, {tokens}\n{terminal.summary_table([head, *rows])}'


def _all(aux: Aux) -> Aux:
  return aux


def _routing_of(aux: Aux) -> Routing:
  return aux.routing


def _token_losses(
  model: Decoder, x_LD: jax.Array, targets_L: jax.Array
) -> jax.Array:
  """Returns the loss of every token of a row in nats, [L]."""
  weight_DV, bias_V = model.head()
  weight_DV = weight_DV.astype(x_LD.dtype)

  def loss(x_D: jax.Array, target: jax.Array) -> jax.Array:
    logits_V = jnp.einsum(
      'D,DV->V', x_D, weight_DV, preferred_element_type=jnp.float32
    )
    logits_V = logits_V if bias_V is None else logits_V + bias_V
    return jax.nn.logsumexp(logits_V) - logits_V[target]

  pairs = x_LD, targets_L
  return jax.lax.map(lambda p: loss(*p), pairs, batch_size=_HEAD_TOKENS)


def _per_token(routing: Routing, num_experts: int) -> dict[str, list[Any]]:
  """Returns a router's choices for every token, as the passage has them."""
  found: dict[str, list[Any]] = {}
  used_TK = routing.indices_TK < num_experts
  triples = list(
    zip(used_TK, routing.indices_TK, routing.weights_TK, strict=True)
  )
  found['experts'] = [i_K[u_K].tolist() for u_K, i_K, _ in triples]
  found['weights'] = [_rounded(w_K[u_K]) for u_K, _, w_K in triples]
  p_TN = np.asarray(routing.probabilities_TN)[:, :num_experts]
  top_TK = np.argsort(-p_TN, axis=-1, kind='stable')[:, :_MOST_RATED]
  found['top'] = top_TK.tolist()
  found['top_probability'] = [
    _rounded(p_N[top_K]) for p_N, top_K in zip(p_TN, top_TK, strict=True)
  ]
  return found


def _rounded(values: np.ndarray) -> list[float]:
  return np.asarray(values, np.float64).round(3).tolist()


def _quartiles(of: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
  lower_W, median_W, upper_W = of((0.25, 0.5, 0.75)).T
  return {'median': median_W, 'quartiles': np.stack([lower_W, upper_W], 1)}


def _pairs(
  statistics: Statistics, names: list[str], firsts: list[int]
) -> dict[str, Any]:
  """Returns the use of the products of neighbouring factors."""
  shares = [statistics.pairs(first) for first in firsts]
  used = [routing_lib.product_use(shares_NN) for shares_NN in shares]
  return {
    'names': [f'{names[i]} x {names[i + 1]}' for i in firsts],
    'shares': shares,
    'live': [live for live, _ in used],
    'entropy': [entropy for _, entropy in used],
  }


def _plain(value: Any) -> Any:
  """Returns what JSON can hold: rounded numbers, None if not finite."""
  if isinstance(value, dict):
    return {key: _plain(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(each) for each in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, float):
    return float(f'{value:.{_DIGITS}g}') if math.isfinite(value) else None
  return value


def _write(result: dict[str, Any], workdir: str) -> list[str]:
  """Writes the file and its pictures; returns their paths."""
  folder = os.path.join(workdir, 'analysis')
  path = os.path.join(folder, f'{result["step"]}.json')
  text = strict_json.dumps(result) + '\n'

  def write() -> list[str]:
    os.makedirs(folder, exist_ok=True)
    files.replace(path, text)
    return figures.save(result, folder)

  return [path, *disk.retried(folder, write)]
