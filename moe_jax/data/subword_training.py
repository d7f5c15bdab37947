"""Sub-word vocabularies made of texts: the same texts make the same file."""

import io
from collections.abc import Callable, Iterable, Iterator

import sentencepiece
import tokenizers as huggingface
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax.data.subwords import ADDED_EOS
from moe_jax.errors import UserError, choose, said

_UNKNOWN = '<unk>'


def train(texts: Iterable[str], kind: str, size: int) -> bytes:
  """Returns the file of a tokenizer whose vocabulary is made of texts.

  bpe merges the commonest pairs of bytes, as GPT-2 does. unigram is
  SentencePiece's (Kudo 2018, arXiv 1804.10959), with bytes for what it has no
  piece of; Hugging Face's trainer of it gives another vocabulary each time.
  Both decode to the text that was encoded. words are what white space
  separates; a word that is not among them is `<unk>`.

  Args:
    texts: The texts, read once.
    kind: A key of `KINDS`.
    size: The most ids, that which ends a document included.

  Raises:
    UserError: There are too few ids for that kind, or no text.
  """
  make, least, _ = KINDS[choose('--kind', kind, KINDS)]
  if size < least:
    raise UserError(
      f'--size = {size} must be at least {least} for --kind={kind}'
    )
  return make((_unicode(text) for text in texts), size)


def _bpe(texts: Iterator[str], size: int) -> bytes:
  made = huggingface.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[ADDED_EOS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  return made.to_str(pretty=True).encode()


def _words(texts: Iterator[str], size: int) -> bytes:
  made = huggingface.Tokenizer(models.WordLevel(unk_token=_UNKNOWN))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  trainer = trainers.WordLevelTrainer(
    vocab_size=size,
    special_tokens=[ADDED_EOS, _UNKNOWN],
    show_progress=False,
  )
  made.train_from_iterator(texts, trainer)
  return made.to_str(pretty=True).encode()


def _unigram(texts: Iterator[str], size: int) -> bytes:
  failed: list[BaseException] = []

  def lines() -> Iterator[str]:
    try:
      for text in texts:
        yield from text.splitlines(keepends=True)
    except BaseException as error:  # which C++ would not hand on
      failed.append(error)

  made = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines(),
      model_writer=made,
      model_type='unigram',
      vocab_size=size,
      hard_vocab_limit=False,  # fewer, where the texts have no more
      # What is decoded is what was encoded.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      byte_fallback=True,
      allow_whitespace_only_pieces=True,
      eos_id=0,
      unk_id=1,
      bos_id=-1,
      pad_id=-1,
      max_sentence_length=2**20,
      num_threads=1,  # sums of several come out otherwise each time
      minloglevel=2,
    )
  except RuntimeError as error:
    if not failed:
      raise UserError(
        f'--size = {size} does not do for --kind=unigram: {said(error)}'
      ) from error
  if failed:
    raise failed[0]
  return made.getvalue()


def _unicode(text: str) -> str:
  """Returns a text whose bytes of half characters are U+FFFD."""
  return text.encode(errors='surrogateescape').decode(errors='replace')


# The maker of a kind, the least ids it can have, and the ending of its files.
KINDS: dict[str, tuple[Callable[[Iterator[str], int], bytes], int, str]] = {
  'bpe': (_bpe, 257, '.json'),
  'unigram': (_unigram, 259, '.model'),
  'words': (_words, 3, '.json'),
}
