"""Goes on with prompts, by a checkpoint of a run.

  moe_jax generate --workdir=runs/mine --prompt='def main(' --temperature=0.8

Text appears as it is made. Several --prompt, or --prompts=FILE with one in each
line (of a .jsonl file: its field "prompt"), are gone on with together;
--interactive asks for one after the other. --temperature=0 takes the likeliest
token. What follows a prompt depends on --seed, its number and itself alone, so
the same command writes the same.

  moe_jax generate --workdir=runs/mine --prompt='def main(' --experts --layer=2

colours every token by the expert it prefers in a layer. The config is the run's
own; --config.KEY=VALUE changes what may be changed, as the mesh.
"""

import json
import os
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, files
from moe_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """Defines the prompts, how they are gone on with, and how it is shown."""
  cli.define_process_flags(values)
  flags.DEFINE_multi_string(
    'prompt', [], 'a text to go on with; may be repeated', flag_values=values
  )
  flags.DEFINE_string(
    'prompts',
    '',
    'a file with a prompt in each line; of a .jsonl file its field "prompt"',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'stop',
    [],
    'a text before which what follows ends; \\n is the end of a line; may be'
    ' repeated',
    flag_values=values,
  )
  for name, default, about in (
    ('max_tokens', 128, 'how many tokens follow, at the most'),
    ('top_k', 0, 'the likeliest tokens to choose from; 0 for all'),
    ('seed', 0, 'what random numbers follow from'),
    ('batch_size', 32, 'the prompts that are gone on with together'),
    ('step', None, 'the step of the checkpoint; the newest if left out'),
  ):
    flags.DEFINE_integer(name, default, about, flag_values=values)
  for name, number, about in (
    ('temperature', 0.8, 'what logits are divided by; 0 takes the likeliest'),
    ('top_p', 1.0, 'the probability of the likeliest tokens to choose from'),
  ):
    flags.DEFINE_float(name, number, about, flag_values=values)
  for name, about in (
    ('json', 'print one JSON object a line for each prompt'),
    ('experts', 'colour every token by its expert in --layer'),
    ('interactive', 'ask for prompts'),
  ):
    flags.DEFINE_boolean(name, False, about, flag_values=values)
  flags.DEFINE_string(
    'layer',
    '',
    'the layer of --experts, from 1 on, with its factor if it has several, such'
    ' as 3 or 3B; the last if left out',
    flag_values=values,
  )


def run(
  config: ConfigDict,
  workdir: str,
  prompt: list[str],
  prompts: str,
  interactive: bool,
  stop: list[str],
  **options: Any,
) -> None:
  """Goes on with the prompts of the command line, or of its reader.

  Raises:
    UserError: There are none, or anything is wrong with a flag or the run.
  """
  texts = [*prompt, *(_in_file(prompts) if prompts else [])]
  if not texts and not interactive:
    raise UserError(
      '--prompt is missing: a text to go on with; or --prompts=FILE, or'
      ' --interactive'
    )
  for number, text in enumerate(texts):
    if not text:
      which = '' if len(texts) == 1 else f' number {number}'
      raise UserError(
        f'the prompt{which} is empty: give at least one character to go on from'
      )
  # jax must not be imported before the command line has set the allocator.
  from moe_jax.parallel import launch
  from moe_jax.programs import generating

  names = ('coordinator', 'num_processes', 'process_id', 'coordinator_timeout')
  place = {name: options.pop(name) for name in names}
  stops = tuple(each.replace('\\n', '\n').replace('\\t', '\t') for each in stop)
  with launch.joined(**place):
    program = generating.Program(config, workdir, stops=stops, **options)
    if texts:
      program.write(texts)
    if interactive:
      program.interact()


def main() -> None:
  """Generates as the command line says, and exits."""
  cli.main(run, define_flags)


def _in_file(path: str) -> list[str]:
  """Returns the prompts in a file.

  Raises:
    UserError: It cannot be read, or a line is empty or no prompt.
  """
  path = files.expand(path)
  try:
    lines = files.read_text(path).splitlines()
  except (OSError, ValueError) as error:
    raise UserError(f'--prompts = {path!r} cannot be read: {error}') from error
  of_json = os.path.splitext(path)[1] in ('.jsonl', '.json')
  found = []
  for number, line in enumerate(lines, start=1):
    text = _in_json(path, number, line) if of_json else line
    if not text:
      raise UserError(f'{path}:{number}: the prompt is empty')
    found.append(text)
  if not found:
    raise UserError(f'--prompts = {path!r} has no line, and so no prompt')
  return found


def _in_json(path: str, number: int, line: str) -> str:
  """Returns the prompt of a line of JSON."""
  try:
    prompt = json.loads(line)['prompt']
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(
      f'{path}:{number}: no JSON object with a field "prompt"'
    ) from error
  if not isinstance(prompt, str):
    raise UserError(f'{path}:{number}: the field "prompt" is no text')
  return prompt
