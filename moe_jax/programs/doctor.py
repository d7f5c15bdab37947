"""Says what is in the directory of a run, and what its next start would do.

  moe_jax doctor --workdir=runs/mine

It reads every checkpoint whole and holds it to its digests, looks for steps
that metrics.jsonl lacks, and says what the same command would do. It writes
nothing, also where the run is damaged or still trains.

  moe_jax doctor --workdir=runs/mine --replay --step=120

does that step again, from the nearest checkpoint before it and the position of
the data alone. It tells where the first number is that is not finite, in the
state, the forward pass or the gradient, and whether metrics.jsonl has the same
numbers, bit for bit.

  moe_jax doctor --workdir=runs/mine --data

reads the splits for training and evaluation whole, as the run does, and prints
their documents, tokens and bytes, and the BLAKE2b of their token ids: the same
on every host that reads the same stream. It holds them to their checksums, and
encodes what is not encoded yet.
"""

import sys

from absl import flags

from moe_jax import cli, runtime, strict_json
from moe_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """Defines how it is told, and what is done again by which processes."""
  cli.define_process_flags(values)
  flags.DEFINE_boolean(
    'json', False, 'print one JSON object', flag_values=values
  )
  flags.DEFINE_boolean(
    'data', False, 'read the data instead', flag_values=values
  )
  flags.DEFINE_boolean(
    'replay', False, 'do the step --step again', flag_values=values
  )
  flags.DEFINE_integer(
    'step', None, 'the step that --replay does again', flag_values=values
  )


def run() -> None:
  """Examines the workdir that the command line names, and prints it.

  Raises:
    UserError: There is no such directory, or no such step.
    SystemExit: 1 if a checkpoint, or the config, is damaged.
  """
  options, _ = cli.read(
    sys.argv, define_flags, workdir=True, about=__doc__ or ''
  )
  if options['replay'] or options['step'] is not None:
    _replay()
    return
  if options['data']:
    _data()
    return
  # A run that trains may have the accelerators, and nothing here needs one.
  runtime.silence_plugins()
  import jax

  jax.config.update('jax_platforms', 'cpu')
  from moe_jax.training import health

  as_json = options['json']
  found = health.examine(
    options['workdir'],
    lambda line: print(line, file=sys.stderr) if not as_json else None,
  )
  print(strict_json.dumps(found) if as_json else health.text(found))
  if found['config'] or any(each['reason'] for each in found['checkpoints']):
    raise SystemExit(1)


def _replay() -> None:
  """Does the step again that the command line names, and prints what it did."""
  # Which allocator there is has to be known before jax is imported.
  runtime.configure_malloc()
  runtime.configure_gpu()
  runtime.silence_plugins()
  config, values = cli.parse(sys.argv, define_flags)
  workdir, step = values.pop('workdir'), values.pop('step')
  others = values.pop('json'), values.pop('data')
  if not values.pop('replay') or step is None or any(others):
    raise UserError(
      '--replay and --step=N go together, and without --json and --data'
    )
  from moe_jax.parallel import launch, multihost
  from moe_jax.training import replay

  with launch.joined(**values):
    found = replay.replay(config, workdir, step)
    if multihost.is_main_process():
      print(found.text())


def _data() -> None:
  """Prints what the streams are that the command line's config reads."""
  config, values = cli.parse(sys.argv, define_flags)
  from moe_jax.config import evaluations
  from moe_jax.data import mixtures
  from moe_jax.training import run_tokenizer

  data, found = config.data, []
  tokenizer = run_tokenizer.build(config, values['workdir'])
  evaluated = [each.split for each in evaluations.during_training(config)]
  for split in dict.fromkeys([None, *evaluated]):
    opened = mixtures.open_sequences(data, split, tokenizer)
    for name, sequences in opened.items():
      told: dict[str, str | int] = {'source': name} if name else {}
      told |= sequences.fingerprint() | {'blake2b': sequences.digest()}
      if told not in found:  # evaluated on what is trained on
        found.append(told)
  if values['json']:
    print(strict_json.dumps(found))
    return
  for each in found:
    label = each['split']
    if 'source' in each:
      label = f'{each["source"]}, {label}'
    print(
      f'{label}: {each["documents"]:,} documents, {each["tokens"]:,}'
      f' tokens, {each["bytes"]:,} bytes, blake2b {each["blake2b"]}'
    )


def main() -> None:
  """Examines what the command line names, and exits."""
  cli.exit_with(run)
