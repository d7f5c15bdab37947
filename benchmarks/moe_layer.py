"""Times dropless experts, their routing given, against a dense feed-forward.

  python -m benchmarks.moe_layer --json
  python -m benchmarks.moe_layer --sizes=2048x2x512x512x16 --kinds=random
  python -m benchmarks.moe_layer --peer --threads=2 --json

`--sizes` are tokens T, experts per token K, hidden size D, width F and experts
N. The layer sorts, gathers, computes and combines, forward and backward. The
dense feed-forward has the width K F: the same work for each token. They
alternate in one process. With `--peer` every layer has a process of its own:
ours, the dense one, and the experts of Mixtral in transformers, its
`grouped_mm` and `eager`; steps alternate, and malloc is set alike in all.

A JSON line is a case: median `seconds` of all, `ratios` of the layer to each of
the others (the median over rounds), and `skew`, the assignments of the busiest
expert over the mean.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import command_line, duel
from moe_jax.errors import UserError

_NAMES = 'tokens top_k hidden width experts'
_CPU_SIZES = (
  '2048x2x512x512x8',
  '2048x2x512x512x16',
  '1024x2x1024x1024x16',
  '2048x4x512x512x64',
  '1024x4x1024x512x64',
)
_SIZES = ('16384x2x2048x2048x8', '16384x4x2048x1024x64')
_PEERS = ('grouped_mm', 'eager')


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  made = command_line.parser(__doc__)
  made.add_argument(
    '--sizes',
    action='append',
    type=command_line.sizes(_NAMES),
    help='TxKxDxFxN, once or more',
  )
  command_line.add_dtype(made)
  made.add_argument('--kinds', default='balanced,random,half')
  made.add_argument('--peer', action='store_true', help='against transformers')
  made.add_argument('--threads', type=int, default=2, help='with --peer')
  made.add_argument('--worker', help=argparse.SUPPRESS)
  command_line.main(run, made, arguments)


def run(args: argparse.Namespace) -> None:
  """Prints a line per case; or, as a worker, answers."""
  if args.worker:
    _work(args)
    return
  if args.peer and importlib.util.find_spec('transformers') is None:
    raise UserError("--peer needs transformers: pip install -e '.[interop]'")
  if args.peer:
    duel.share_accelerator()
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common, timing

  kinds = timing.kinds(args.kinds)
  on_cpu = jax.devices()[0].platform == 'cpu'
  parse = command_line.sizes(_NAMES)
  cases = args.sizes or [parse(s) for s in (_CPU_SIZES if on_cpu else _SIZES)]
  for sizes in cases:
    _check(sizes)
  for sizes in cases:
    for kind in kinds:
      if args.peer:
        row = against_peers(sizes, kind, args)
      else:
        row = measure(sizes, kind, args.dtype, args.rounds)
      common.show(row, args.json)


def _check(sizes: dict[str, int]) -> None:
  top_k, experts = sizes['top_k'], sizes['experts']
  if top_k > experts:
    raise UserError(
      f'--sizes = {"x".join(map(str, sizes.values()))}: a token cannot choose'
      f' K = {top_k} of N = {experts} experts'
    )


def measure(
  sizes: dict[str, int], kind: str, dtype: str, rounds: int
) -> dict[str, Any]:
  """The layer and the dense feed-forward in one process; see the module."""
  from benchmarks import timing

  programs = {name: layer(sizes, kind, dtype) for name, layer in OURS.items()}
  return _row(sizes, kind, timing.in_turn(programs, rounds))


def against_peers(
  sizes: dict[str, int], kind: str, args: argparse.Namespace
) -> dict[str, Any]:
  """Each in a process; see the module."""
  import numpy as np

  shape = 'x'.join(str(sizes[name]) for name in _NAMES.split())
  command = [
    *(sys.executable, '-m', 'benchmarks.moe_layer'),
    *(f'--sizes={shape}', f'--kinds={kind}', f'--dtype={args.dtype}'),
  ]
  measured = duel.run(
    {name: [*command, f'--worker={name}'] for name in (*OURS, *_PEERS)},
    rounds=args.rounds,
    warmup=2,
    threads=args.threads,
  )
  seconds = {name: np.array(m.seconds) for name, m in measured.items()}
  facts = {name: m.facts for name, m in measured.items() if name in _PEERS}
  return _row(sizes, kind, seconds) | {
    'threads': args.threads,
    'peak_bytes': {name: m.peak_bytes for name, m in measured.items()},
    'peers': facts,
  }


def _row(sizes: dict[str, int], kind: str, seconds: Any) -> dict[str, Any]:
  import numpy as np

  from benchmarks import common, timing

  chosen = _choices(sizes, kind)
  others = [name for name in seconds if name != 'dropless']
  return {
    'benchmark': 'moe_layer',
    **sizes,
    'kind': kind,
    'skew': timing.skew(chosen, sizes['experts']),
    'seconds': {name: float(np.median(s)) for name, s in seconds.items()},
    'ratios': {
      name: timing.ratio(seconds['dropless'], seconds[name]) for name in others
    },
    'rounds': len(seconds['dropless']),
  } | common.place()


def _choices(sizes: dict[str, int], kind: str) -> Any:
  from benchmarks import timing

  return timing.choices(kind, sizes['tokens'], sizes['top_k'], sizes['experts'])


def _dropless(sizes: dict[str, int], kind: str, dtype: str) -> Any:
  """Our layer and its gradients in tokens, weights and parameters."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from benchmarks import timing
  from moe_jax.experts import dispatch
  from moe_jax.experts.mlp import SwiGLUExperts
  from moe_jax.model.implementations import chosen_matmul
  from moe_jax.routing.selection import Routing

  chosen_TK = jnp.asarray(_choices(sizes, kind))
  x_TD, weights_TK, grad_TD = _operands(sizes, timing.dtype_of(dtype))
  experts = SwiGLUExperts(
    sizes['experts'],
    sizes['hidden'],
    sizes['width'],
    init_std=0.02,
    rngs=nnx.Rngs(params=0),
    multiply=chosen_matmul('auto', jax.devices()[0]),
  )
  graphdef, params = nnx.split(experts)
  params = jax.tree.map(lambda a: a.astype(x_TD.dtype), params)

  def layer(x_TD: Any, weights_TK: Any, params: Any, chosen_TK: Any) -> Any:
    routing = Routing(weights_TK, chosen_TK, None, None)
    return dispatch.dropless(x_TD, routing, nnx.merge(graphdef, params)).y_TD

  def both(x_TD: Any, weights_TK: Any, params: Any, *rest: Any) -> Any:
    chosen_TK, grad_TD = rest
    y_TD, vjp = jax.vjp(
      lambda *a: layer(*a, chosen_TK), x_TD, weights_TK, params
    )
    return y_TD, vjp(grad_TD)

  return timing.Program(both, (x_TD, weights_TK, params, chosen_TK, grad_TD))


def _dense(sizes: dict[str, int], kind: str, dtype: str) -> Any:
  """A feed-forward of the width of a token's experts, and its gradients."""
  import jax
  from flax import nnx

  from benchmarks import timing
  from moe_jax.experts.mlp import SwiGLU

  del kind
  x_TD, _, grad_TD = _operands(sizes, timing.dtype_of(dtype))
  graphdef, params = nnx.split(
    SwiGLU(
      sizes['hidden'],
      sizes['top_k'] * sizes['width'],
      init_std=0.02,
      rngs=nnx.Rngs(params=0),
    )
  )
  params = jax.tree.map(lambda a: a.astype(x_TD.dtype), params)

  def both(x_TD: Any, params: Any, grad_TD: Any) -> Any:
    y_TD, vjp = jax.vjp(
      lambda x, params: nnx.merge(graphdef, params)(x), x_TD, params
    )
    return y_TD, vjp(grad_TD)

  return timing.Program(both, (x_TD, params, grad_TD))


def _operands(sizes: dict[str, int], dtype: Any) -> tuple[Any, ...]:
  import jax

  keys = jax.random.split(jax.random.key(0), 3)
  tokens, hidden = sizes['tokens'], sizes['hidden']
  return (
    jax.random.normal(keys[0], (tokens, hidden), dtype),
    jax.random.uniform(keys[1], (tokens, sizes['top_k'])),
    jax.random.normal(keys[2], (tokens, hidden), dtype),
  )


OURS = {'dropless': _dropless, 'dense': _dense}


def _work(args: argparse.Namespace) -> None:
  [sizes] = args.sizes
  if args.worker in OURS:
    import jax

    function, operands = OURS[args.worker](sizes, args.kinds, args.dtype)
    program = jax.jit(function).lower(*operands).compile()
    duel.serve(lambda: jax.block_until_ready(program(*operands)), {})
  else:
    duel.serve(*peer(args.worker, sizes, args.kinds, args.dtype))


def peer(
  implementation: str, sizes: dict[str, int], kind: str, dtype: str
) -> tuple[Callable[[], None], dict[str, str]]:
  """A step of Mixtral's experts in transformers, and their versions."""
  import torch
  import transformers
  from transformers.models.mixtral import modeling_mixtral

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  if dtype == 'auto':
    dtype = 'float32' if device == 'cpu' else 'bfloat16'
  like = {'device': device, 'dtype': getattr(torch, dtype)}
  config = transformers.MixtralConfig(
    hidden_size=sizes['hidden'],
    intermediate_size=sizes['width'],
    num_local_experts=sizes['experts'],
    num_experts_per_tok=sizes['top_k'],
  )
  config._experts_implementation = implementation  # no other way to name it
  experts = modeling_mixtral.MixtralExperts(config).to(**like)
  for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
  shape = sizes['tokens'], sizes['hidden']
  x = torch.randn(shape, **like, requires_grad=True)
  weights = torch.rand(shape[0], sizes['top_k'], device=device)
  weights.requires_grad_()
  grad = torch.randn(shape, **like)
  chosen = torch.tensor(_choices(sizes, kind), device=device).long()

  def step() -> None:
    for tensor in (x, weights, *experts.parameters()):
      tensor.grad = None
    experts(x, chosen, weights.to(x.dtype)).backward(grad)
    if device == 'cuda':
      torch.cuda.synchronize()

  return step, {
    'transformers': transformers.__version__,
    'torch': torch.__version__,
  }


if __name__ == '__main__':
  main()
