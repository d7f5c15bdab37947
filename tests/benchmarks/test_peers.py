"""The peers' benchmark: that both sides are the same, and what it refuses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peer_sizes import MODELS, Sizes
from moe_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = Sizes(16, 2, 2, 1, 8, 4, 2, vocab_size=257, batch_size=2, seq_len=8)


def test_sizes_survive_a_command_line() -> None:
  for sizes in MODELS.values():
    assert Sizes.from_json(sizes.to_json()) == sizes


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rounds': 0}, '--rounds = 0'),
    ({'warmup': -1}, '--warmup = -1'),
    ({'threads': 0}, '--threads = 0'),
  ],
)
def test_numbers_out_of_range(changes: dict[str, int], message: str) -> None:
  numbers = {'rounds': 1, 'warmup': 0, 'threads': 1} | changes
  with pytest.raises(UserError, match=message):
    peers.measure(TINY, **numbers)


def test_without_pytorch_one_line_says_how_to_get_it(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '.\[interop\]'"):
    peers.measure(TINY, rounds=1, warmup=0, threads=1)


def test_an_unknown_model_is_one_line() -> None:
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.peers', '--models=mixtral_18'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: --models = 'mixtral_18' is not known")
  assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_both_sides_train_the_same_model() -> None:
  pytest.importorskip('transformers')
  row = peers.measure(TINY, rounds=2, warmup=0, threads=1)
  assert row['fastest_peer'] in peers.PEERS
  assert row['speedup'][peers.OURS] == 1
  assert set(row['tokens_per_second']) == {peers.OURS, *peers.PEERS}
  assert all(peak > 0 for peak in row['peak_resident_bytes'].values())
  # Per layer attention, router, experts and two norms; embedding, head, norm.
  attention = 2 * 16 * 16 + 2 * 16 * 8
  layer = attention + 16 * 4 + 4 * 3 * 16 * 8 + 2 * 16
  assert row['parameters'] == 2 * layer + 2 * 257 * 16 + 16
  json.dumps(row)
