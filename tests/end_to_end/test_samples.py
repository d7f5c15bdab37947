"""Samples during training are what `moe_jax generate` makes of the step."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moe_jax.errors import printable
from moe_jax.programs import generating
from moe_jax.training import loop
from tests.helpers import runs

TOKENS = 9


@pytest.mark.slow
def test_samples_are_texts_of_the_steps(
  make_config: Callable[..., ConfigDict],
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  config = make_config(
    **{
      'model.num_layers': 1,
      'train.steps': 3,
      'train.sample_every': 2,
      'train.sample_prompt': 'im\nport',
      'train.sample_tokens': TOKENS,
      'checkpoint.every': 2,
      'seed': 3,
    }
  )
  loop.train(config, str(tmp_path))
  printed = capsys.readouterr().out
  found = dict(re.findall(r'^step (\d+)  sample: (.*)$', printed, re.MULTILINE))
  assert list(found) == ['2', '3']  # the last step, too
  for step, sample in found.items():
    program = generating.Program(
      config,
      str(tmp_path),
      step=int(step),
      json=False,
      experts=False,
      layer='',
      stops=(),
      max_tokens=TOKENS,
      temperature=0.8,
      top_k=0,
      top_p=1.0,
      seed=3,
      batch_size=1,
    )
    program.write(['im\nport'])
    text = capsys.readouterr().out.removesuffix('\n')
    assert sample == printable(text) and sample.startswith('im\\nport')
  texts = [
    event.summary.value[0].tensor.string_val[0].decode()
    for event in runs.events(tmp_path)
    if event.summary.value
    and event.summary.value[0].tag == 'sample/text_summary'
  ]
  assert len(texts) == 2 and all('    im\n    port' in text for text in texts)
