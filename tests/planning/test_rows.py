"""The rows of both papers' tables, typed with a local corpus and tokenizer."""

import pytest
from ml_collections import ConfigDict

from moe_jax import cli
from moe_jax import config as config_lib
from moe_jax.data import folders
from moe_jax.data.pipeline import TokenSequences
from moe_jax.errors import UserError
from moe_jax.planning import abstract_setup
from moe_jax.training import run_tokenizer
from tests.helpers import vocabularies
from tests.helpers.marks import fast_only

# Of the papers: 32,000 is LLaMA's, 96,512 that of RMoE's own corpus.
SIZES = {'cartesian_moe': 32_000, 'rmoe': 96_512}
ROUTERS = 'smoe hyper smoe_mlp random cosine xmoe'.split()
ABLATIONS = (
  'np detach np,r0.5 np,r1.0 s_proj rnn lstm p256 p512 xmoe_gru'
  ' xmoe8,xmoe_gru xmoe32,xmoe_gru'
).split()
CARTESIAN = (
  'dense smoe_share smoe_top3 hash fine_grained top_p no_shared'
).split()
# What is traced, whose shapes take a second each; the others are checked.
TRACED = [
  'cartesian_moe:base',
  *(f'cartesian_moe:base,{name}' for name in CARTESIAN),
  'cartesian_moe:large',
  'cartesian_moe:7b',
  'rmoe:pretrain_0.9b',
  'rmoe:pretrain_0.9b,smoe',
]
CHECKED = [
  *(f'cartesian_moe:large,{name}' for name in CARTESIAN),
  'cartesian_moe:7b,fine_grained',
  'rmoe:pretrain_15b',
  'rmoe:sft',
  'rmoe:sft,freeze_router',
]
# Their vocabularies are those of the data.
OF_DATA = [
  f'rmoe:{preset}{variant}'
  for preset in ('enwik8_medium', 'wikitext103_medium')
  for variant in ('', *(f',{name}' for name in (*ROUTERS, *ABLATIONS)))
]


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """Tokenizers of the sizes that the presets have, and of one id more."""
  folder = tmp_path_factory.mktemp('tokenizers')
  return {
    f'{name}{more or ""}': vocabularies.of_size(
      folder / f'{name}{more}.json', size + more
    )
    for name, size in SIZES.items()
    for more in (0, 1)
  }


@pytest.fixture(scope='module')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
  folder = tmp_path_factory.mktemp('corpus')
  (folder / 'texts').mkdir()
  for i in range(40):
    text = f'the words of text {i}\n' * 20
    (folder / 'texts' / f'{i}.txt').write_text(text)
  splits = {folders.split_of(f'{i}.txt') for i in range(40)}
  assert splits >= {'train', 'validation'}
  return [
    '--config.data.name=text_folder',
    f'--config.data.path={folder / "texts"}',
    f'--config.data.dir={folder / "prepared"}',
    '--config.data.format=text',  # of rmoe:sft it is another
  ]


def typed(row: str, *flags: str) -> ConfigDict:
  config, _ = cli.parse(['plan', f'--config={row}', *flags], workdir=False)
  config_lib.validate(config, 1)
  return config


@pytest.mark.parametrize(
  'row', fast_only([*TRACED[:1], *CHECKED[:2]], [*TRACED, *CHECKED])
)
def test_a_row_takes_a_tokenizer_of_its_size(
  row: str, corpus: list[str], tokenizers: dict[str, str]
) -> None:
  name = row.partition(':')[0]
  flags = [*corpus, f'--config.data.tokenizer={tokenizers[name]}']
  config = typed(row, *flags)
  tokenizer = run_tokenizer.build(config, '')
  size = config_lib.vocab_size(config, tokenizer.vocab_size)
  assert size == tokenizer.vocab_size == SIZES[name]
  if row in TRACED:
    setup = abstract_setup.on_one_device(config)
    embed = setup.abstract['params']['embed_VD']
    assert embed.shape == (size, config.model.hidden_size)


@pytest.mark.parametrize('row', ['cartesian_moe:base', 'rmoe:pretrain_0.9b'])
def test_a_tokenizer_of_another_size_is_refused_with_both_numbers(
  row: str, corpus: list[str], tokenizers: dict[str, str]
) -> None:
  name = row.partition(':')[0]
  larger = tokenizers[f'{name}1']
  config = typed(row, *corpus, f'--config.data.tokenizer={larger}')
  message = f'= {SIZES[name]} is below the {SIZES[name] + 1} ids'
  with pytest.raises(UserError, match=message):
    abstract_setup.on_one_device(config)


@pytest.mark.parametrize('row', OF_DATA)
def test_a_row_takes_the_vocabulary_of_a_local_corpus(
  row: str, corpus: list[str]
) -> None:
  config = typed(row, *corpus)
  tokenizer = run_tokenizer.build(config, '')
  assert TokenSequences.open(config.data, 'train', tokenizer).num_tokens
  size = config_lib.vocab_size(config, tokenizer.vocab_size)
  assert size == config.model.vocab_size > tokenizer.vocab_size
