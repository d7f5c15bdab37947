"""What is told while data is prepared."""

import pytest

from moe_jax.data import progress


def test_a_line_every_few_seconds(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  # The clock goes on by two seconds for each document.
  clock = iter(range(0, 100, 2))
  monkeypatch.setattr(progress.time, 'monotonic', lambda: float(next(clock)))
  assert list(progress.counted('it', range(6))) == list(range(6))
  out, err = capsys.readouterr()
  assert out == ''
  # At 6 s two of six are done, at 12 s five.
  assert err.splitlines() == [
    'preparing it: 2 of 6 documents, 12 s left',
    'preparing it: 5 of 6 documents, 2 s left',
  ]


def test_what_is_soon_over_is_not_told(
  capsys: pytest.CaptureFixture[str],
) -> None:
  assert list(progress.counted('it', ['a', 'b'])) == ['a', 'b']
  assert capsys.readouterr() == ('', '')
