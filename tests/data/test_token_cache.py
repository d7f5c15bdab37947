"""Token ids that are written once: the same, whole, and noticed if damaged."""

import hashlib
import os
import pathlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from etils import epath

from moe_jax import errors
from moe_jax.data import encoding, parts, sources, tokenizers, vocabulary
from moe_jax.data.sequences import TokenSequences
from moe_jax.data.token_cache import TokenCache

Make = Callable[..., sources.Documents]
ALPHABET = ['ab', ' ', 'c\n', 'ä', '→', '\n\n', 'x y']


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
  """So that a split has several, with blocks to be verified one by one."""
  monkeypatch.setattr(encoding, '_PART_BYTES', 300)
  monkeypatch.setattr(parts, '_BLOCK', 64)
  monkeypatch.setattr(parts, '_BUFFER', 100)


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Make:
  """Returns a function to documents; some are empty, the first and last too."""

  def made(count: int = 60, single: bool = False) -> sources.Documents:
    rng = np.random.default_rng(count)
    sizes = rng.integers(0, 30, count) * rng.integers(0, 2, count)
    sizes[count // 2], sizes[0], sizes[-1] = 400, 0, 0
    texts = [''.join(rng.choice(ALPHABET, size)) for size in sizes]
    folder = epath.Path(tmp_path / 'data')
    folder.mkdir(exist_ok=True)
    records = [{'text': text.encode()} for text in texts]
    return sources.Documents(records, 'own', 'train', 'text', folder, single)

  return made


def tokenizer_of(
  name: str, documents: sources.Documents
) -> tokenizers.Tokenizer:
  kinds = {
    'words': vocabulary.WordTokenizer,
    'enwik8': vocabulary.EnwikTokenizer,
  }
  if name == 'bytes':
    return tokenizers.ByteTokenizer()
  texts = [documents[i] for i in range(len(documents))]
  found = dict.fromkeys(t for text in texts for t in kinds[name].distinct(text))
  return kinds[name](list(found))


def stream(
  documents: sources.Documents, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
  """What the ids have to be, one document behind the other."""
  eos = [] if documents.single_document else [tokenizer.eos_id]
  pieces = [np.array(eos, int)]
  for i in range(len(documents)):
    pieces += [tokenizer.encode(documents[i]), np.array(eos, int)]
  return np.concatenate(pieces)


def folder_of(documents: sources.Documents) -> pathlib.Path:
  [found] = pathlib.Path(documents.folder).glob('ids-*')
  return found


class Counting(tokenizers.ByteTokenizer):
  """Counts what it encodes, and may stop there."""

  def __init__(self, stop_after: int = sys.maxsize) -> None:
    self.encoded, self._left = 0, stop_after

  def encode(self, text: str) -> np.ndarray:
    self._left -= 1
    if self._left < 0:
      raise KeyboardInterrupt
    self.encoded += 1
    return super().encode(text)


def read(documents: sources.Documents) -> tuple[np.ndarray, int]:
  """The stream, and how many documents were encoded for it."""
  tokenizer = Counting()
  cache = TokenCache.open(documents, tokenizer)
  return cache.read(0, len(cache)), tokenizer.encoded


@pytest.mark.parametrize('single', [False, True])
@pytest.mark.parametrize('name', ['bytes', 'words', 'enwik8'])
def test_ids_are_those_of_the_tokenizer(
  name: str, single: bool, make: Make
) -> None:
  documents = make(single=single)
  tokenizer = tokenizer_of(name, documents)
  expected = stream(documents, tokenizer)
  for _ in range(2):  # made, and read again
    cache = TokenCache.open(documents, tokenizer)
    assert len(cache._parts) > 2
    assert len(cache) == len(expected)
    rng = np.random.default_rng(0)
    for begin, end in np.sort(rng.integers(len(cache) + 1, size=(300, 2))):
      np.testing.assert_array_equal(cache.read(begin, end), expected[begin:end])
    for d in range(len(documents)):
      ids, text = tokenizer.encode(documents[d]), documents[d]
      begin, end = cache.starts[d] + cache.separated, cache.starts[d + 1]
      found = cache.read(begin, end)
      np.testing.assert_array_equal(found, ids)
      assert found.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)
      assert cache.lengths[d].tolist() == [len(ids), len(text.encode())]


@pytest.mark.parametrize(
  ('vocab_size', 'width'), [(256, 1), (257, 2), (2**16, 2), (2**16 + 1, 4)]
)
def test_the_smallest_type_that_holds_the_ids(
  vocab_size: int, width: int, tmp_path: pathlib.Path
) -> None:
  path = str(tmp_path / 'ids')
  with parts.PartWriter(path, 7, vocab_size) as writer:
    writer.ids(np.array([0, vocab_size - 1]))
  found = parts.Part(path, 7).read(0, 2)
  assert found.itemsize == width
  assert found.tolist() == [0, vocab_size - 1]


def test_digest_of_the_stream(make: Make) -> None:
  """It is that of the ids as int32, however they are kept."""
  documents = make()
  tokenizer = tokenizers.ByteTokenizer()
  sequences = TokenSequences(documents, tokenizer, 16)
  content = stream(documents, tokenizer).astype('<i4').tobytes()
  expected = hashlib.blake2b(content, digest_size=16).hexdigest()
  assert sequences.digest() == expected
  assert sequences.lengths.tolist() == [
    len(documents[d].encode()) for d in range(len(documents))
  ]


def test_the_fingerprint_of_checkpoints_stays(make: Make) -> None:
  """That of a run of the version before, which a checkpoint holds."""
  found = TokenSequences(make(), tokenizers.ByteTokenizer(), 16).fingerprint()
  assert found == {
    'name': 'own',
    'split': 'train',
    'documents': 60,
    'tokens': 1734,
    'bytes': 1673,
    'tokenizer': 'bytes',
    'content': 'd5d40041a44b4c4d',
  }


def test_lengths_of_older_versions_are_ignored(make: Make) -> None:
  documents = make()
  np.save(str(documents.folder / 'lengths-train-text-bytes.npy'), [[1, 1]])
  expected = stream(documents, tokenizers.ByteTokenizer())
  np.testing.assert_array_equal(read(documents)[0], expected)


def test_what_is_whole_is_not_encoded_again(make: Make) -> None:
  documents = make()
  with pytest.raises(KeyboardInterrupt):
    TokenCache.open(documents, Counting(stop_after=40))
  whole = len(list(folder_of(documents).glob('*.ids')))
  assert whole > 1
  got, encoded = read(documents)
  np.testing.assert_array_equal(got, stream(documents, Counting()))
  bounds = encoding.Plan.of(
    str(folder_of(documents)), documents, 257, 256
  ).bounds
  assert encoded == len(documents) - bounds[whole]
  assert read(documents)[1] == 0
  names = {path.name for path in folder_of(documents).iterdir()}
  assert names == {
    'plan.json',
    'lock',
    *(f'{k:04}.ids' for k in range(len(bounds) - 1)),
  }


def _flip(path: pathlib.Path, place: int) -> None:
  content = bytearray(path.read_bytes())
  content[place] ^= 4
  path.write_bytes(content)


DAMAGES = {
  'tables': lambda path: _flip(path, -60),
  'trailer': lambda path: _flip(path, -20),
  'checksum': lambda path: _flip(path, -1),
  'cut': lambda path: path.write_bytes(path.read_bytes()[:-10]),
  'cut to a block': lambda path: path.write_bytes(path.read_bytes()[:64]),
  'longer': lambda path: path.write_bytes(path.read_bytes() + b'0'),
  'empty': lambda path: path.write_bytes(b''),
  'other': lambda path: path.write_bytes(b'text ' * 100),
  'missing': os.remove,
}


@pytest.mark.parametrize('kind', DAMAGES)
def test_a_damaged_file_is_made_anew_and_no_other(
  kind: str, make: Make
) -> None:
  documents = make()
  before, _ = read(documents)
  bounds = TokenCache.open(documents, Counting())._parts
  DAMAGES[kind](folder_of(documents) / '0001.ids')
  got, encoded = read(documents)
  np.testing.assert_array_equal(got, before)
  assert encoded == len(bounds[1].lengths)


def test_every_flipped_bit_of_an_id_is_noticed(make: Make) -> None:
  """When it is read; removing what the message says makes it anew."""
  documents = make()
  before, _ = read(documents)
  path = folder_of(documents) / '0001.ids'
  size = 2 * len(TokenCache.open(documents, Counting())._parts[1])
  for place in range(0, size, 37):
    _flip(path, place)
    with pytest.raises(errors.UserError) as caught:
      read(documents)
    said = str(caught.value)
    assert '\n' not in said
    assert said.startswith(f'{path} is damaged') and 'remove that file' in said
    path.unlink()
    np.testing.assert_array_equal(read(documents)[0], before)


def test_a_block_is_verified_once(
  make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
  cache = TokenCache.open(make(), Counting())
  verified = []
  verify = parts.Part._verify

  def counted(self: parts.Part, block: int) -> None:
    verified.append(block)
    verify(self, block)

  monkeypatch.setattr(parts.Part, '_verify', counted)
  part = max(cache._parts, key=len)
  for begin, end in (0, 5), (3, 32), (31, 33):  # of 32 ids each
    part.read(begin, end)
  assert verified == [0, 1]


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"bounds": 3}', 'null'])
def test_a_damaged_plan(content: str, make: Make) -> None:
  documents = make()
  before, _ = read(documents)
  (folder_of(documents) / 'plan.json').write_text(content)
  got, encoded = read(documents)
  np.testing.assert_array_equal(got, before)
  assert encoded == 0  # it follows from the documents


def test_files_of_another_plan_are_not_read(make: Make) -> None:
  """As where a user's tokenizer changed, and its name did not."""
  documents = make()
  read(documents)
  tokenizer = Counting()
  tokenizer.vocab_size, tokenizer.eos_id = 300, 299
  cache = TokenCache.open(documents, tokenizer)
  assert tokenizer.encoded == len(documents)
  assert cache.read(0, 1).tolist() == [299]


@pytest.mark.parametrize('where', ['makedirs', 'replace'])
def test_a_folder_that_may_only_be_read(
  where: str,
  make: Make,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  documents = make()
  private = tmp_path / 'private'
  private.mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(private))
  real = getattr(os, where)

  def refuse(path: str, *args: object, **keys: object) -> None:
    if str(path).startswith(str(documents.folder)):
      raise PermissionError(13, 'Permission denied', path)
    real(path, *args, **keys)

  monkeypatch.setattr(os, where, refuse)
  got, encoded = read(documents)
  np.testing.assert_array_equal(got, stream(documents, Counting()))
  assert encoded == len(documents)
  assert not list(private.iterdir())  # what is mapped needs no name
  monkeypatch.setattr(os, where, real)
  read(documents)
  monkeypatch.setattr(os, where, refuse)
  assert read(documents)[1] == 0  # what is whole is read where it is


@pytest.fixture
def full_disk() -> Iterator[None]:
  """A limit on the size of files, which is told like a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)
  signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line(
  make: Make, request: pytest.FixtureRequest
) -> None:
  documents = make()
  request.getfixturevalue('full_disk')
  with pytest.raises(errors.RetryableError) as caught:
    read(documents)
  said = str(caught.value)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
  assert '\n' not in said
  assert f'the token ids {folder_of(documents)}/0' in said
  assert 'make room, then the same command goes on' in said
  assert not list(folder_of(documents).glob('*.ids.*'))
  got, _ = read(documents)
  np.testing.assert_array_equal(got, stream(documents, Counting()))


def test_all_documents_are_empty(make: Make) -> None:
  documents = make()
  documents = sources.Documents(
    [{'text': b''}] * 3, 'own', 'train', 'text', documents.folder, False
  )
  with pytest.raises(errors.UserError, match='its 3 documents are empty'):
    TokenCache.open(documents, Counting())
