"""Tokenizers as transformers' `AutoTokenizer.from_pretrained` reads them."""

import os
from pathlib import Path
from typing import Any

import tokenizers as huggingface
from tokenizers import decoders, models, pre_tokenizers

from moe_jax import strict_json
from moe_jax.data import subwords
from moe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from moe_jax.errors import UserError

# It reads either file as it is; classes of models rebuild some of it.
_CLASS = 'PreTrainedTokenizerFast'
# The defaults of `moe_jax generate`.
_SAMPLING = {'do_sample': True, 'temperature': 0.8, 'top_k': 0, 'top_p': 1.0}


def read(folder: Path) -> subwords.SubwordTokenizer | None:
  """Reads the tokenizer that lies beside a released checkpoint.

  Of a `tokenizer.json` and a `tokenizer.model` it is the former, which
  `AutoTokenizer` takes too.

  Args:
    folder: The folder of the checkpoint.

  Returns:
    The tokenizer, or None where there is neither file.

  Raises:
    UserError: The file cannot be read, or is damaged.
  """
  for kind in (subwords.HuggingFaceTokenizer, subwords.SentencePieceTokenizer):
    path = folder / kind.file_name
    if os.path.lexists(path):  # a link to nowhere is told, too
      try:
        return subwords.load(str(path), 'the tokenizer of the checkpoint')
      except UserError as error:
        raise UserError(f'{error}; --tokenizer names another') from error
  return None


def write(folder: Path, tokenizer: Tokenizer, max_positions: int) -> str:
  """Writes the files of a tokenizer beside a released checkpoint.

  They are the tokenizer, `tokenizer_config.json` and `generation_config.json`,
  by which text is generated from what begins a document to what ends it, and
  sampled as `moe_jax generate` does if nothing is said.

  Args:
    folder: The folder of the checkpoint.
    tokenizer: The tokenizer.
    max_positions: The longest sequence that the model is for, in tokens.

  Returns:
    The name of the file of the tokenizer; '' where it has none, and nothing is
    written.
  """
  if isinstance(tokenizer, subwords.HuggingFaceTokenizer):
    name, content = tokenizer.file_name, tokenizer.with_eos()
  elif isinstance(tokenizer, subwords.SentencePieceTokenizer):
    name, content = tokenizer.file_name, tokenizer.content
  elif isinstance(tokenizer, ByteTokenizer):
    name, content = 'tokenizer.json', of_bytes()
  else:
    return ''
  eos = getattr(tokenizer, 'eos', subwords.ADDED_EOS)
  (folder / name).write_bytes(content)
  _write_json(
    folder / 'tokenizer_config.json',
    tokenizer_class=_CLASS,
    bos_token=eos,
    eos_token=eos,
    pad_token=eos,
    padding_side='left',  # so that what is generated follows every prompt
    add_bos_token=False,
    add_eos_token=False,
    clean_up_tokenization_spaces=False,
    model_max_length=max_positions,
  )
  _write_json(
    folder / 'generation_config.json',
    **special_ids(tokenizer),
    **_SAMPLING,
    max_length=max_positions,
  )
  return name


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """Returns the ids of special tokens by their names in transformers.

  One stands between documents, and so begins and ends them. Padding is masked,
  and may be any.
  """
  names = 'bos_token_id', 'eos_token_id', 'pad_token_id'
  return dict.fromkeys(names, tokenizer.eos_id)


def of_bytes() -> bytes:
  """Returns a tokenizer.json with the ids of `ByteTokenizer`."""
  # What stands for a byte: itself where that is printable, else one of the
  # characters from U+0100 on, in order.
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = (byte for byte in range(256) if byte not in printable)
  stands = {byte: chr(256 + n) for n, byte in enumerate(others)}
  ids = {stands.get(byte, chr(byte)): byte for byte in range(256)}
  made = huggingface.Tokenizer(models.BPE(vocab=ids, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([subwords.ADDED_EOS])
  return made.to_str(pretty=True).encode()


def _write_json(path: Path, **values: Any) -> None:
  path.write_text(strict_json.dumps(values, indent=2) + '\n', 'utf-8')
