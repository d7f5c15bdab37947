"""Paths and files of others: what is no file, no text or no JSON of ours."""

import os
from pathlib import Path

import pytest

from moe_jax import errors, files


def test_messages_show_no_control_characters() -> None:
  """A terminal would obey them; one is turned round by U+202E."""
  said = errors.said(ValueError('a\x1b[31m b\n\tc \u202egnp.x \x07 é→'))
  assert said == 'a\\x1b[31m b c \\u202egnp.x \\x07 é→'


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('HOME', '/home/me')
  for path, expanded in (
    ('~', '/home/me'),
    ('~/a~b', '/home/me/a~b'),
    ('a/~', 'a/~'),
    ('./~', './~'),
    ('', ''),
  ):
    assert files.expand(path) == expanded
  with pytest.raises(errors.UserError, match=r'no home of ~nobody-x; .*\./~'):
    files.expand('~nobody-x/runs')


def test_what_is_no_regular_file(tmp_path: Path) -> None:
  """Reading a pipe would wait for ever."""
  os.mkfifo(tmp_path / 'pipe')
  for path, strerror in (
    (tmp_path / 'pipe', 'Not a regular file'),
    (Path('/dev/zero'), 'Not a regular file'),
    (tmp_path, 'Is a directory'),
    (tmp_path / 'none', 'No such file or directory'),
  ):
    with pytest.raises(OSError, match=strerror) as caught:
      files.read_text(path)
    assert caught.value.filename == str(path)


def test_json(tmp_path: Path) -> None:
  path = tmp_path / 'a.json'
  path.write_text('{"a": [1]}', 'utf-8-sig')
  assert files.read_json(path) == {'a': [1]}
  assert files.parse_json('[' * 100 + ']' * 100)
  for text in ('[' * 101 + ']' * 101, '[' * 10**6, '{"a":' * 3000, '{"a"'):
    with pytest.raises(ValueError):
      files.parse_json(text)


def test_patterns(tmp_path: Path) -> None:
  for name in ('exp[1]', 'a*', 'q?', 's**t'):
    with pytest.raises(errors.UserError, match='one of the characters'):
      files.refuse_pattern('workdir', str(tmp_path / name / 'run'))
  files.refuse_pattern('workdir', str(tmp_path / "a b'%41:$HOME\n"))
  (tmp_path / 'qa').mkdir()
  for name, said in (('q?', True), ('x?', False), ('s**t', True)):
    path = tmp_path / name
    path.mkdir()
    if said:
      with pytest.raises(errors.UserError, match='also a pattern for other'):
        files.refuse_ambiguous('workdir', str(path))
    else:
      files.refuse_ambiguous('workdir', str(path))


def test_what_is_irregular_in_a_folder(tmp_path: Path) -> None:
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'file').write_text('')
  (tmp_path / 'a' / 'link').symlink_to('file')
  assert not files.irregular(tmp_path)
  os.mkfifo(tmp_path / 'a' / 'b' / 'pipe')
  (tmp_path / 'a' / 'zero').symlink_to('/dev/zero')
  assert files.irregular(tmp_path) == [
    str(tmp_path / 'a' / 'b' / 'pipe'),
    str(tmp_path / 'a' / 'zero'),
  ]
