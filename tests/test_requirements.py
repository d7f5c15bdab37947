"""`requirements.lock` has what `requirements.txt` asks for, with hashes."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def requirements() -> list[Requirement]:
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  texts = [line.split('#')[0].strip() for line in lines]
  return [Requirement(text) for text in texts if text]


def locked() -> dict[str, tuple[str, list[str]]]:
  """The version and the hashes of every package."""
  text = (ROOT / 'requirements.lock').read_text()
  text = re.sub(r' *#.*', '', text.replace('\\\n', ' '))
  found = {}
  for line in filter(str.strip, text.splitlines()):
    [pinned, *hashes] = line.split()
    name, version = pinned.split('==')
    found[name] = version, hashes
  return found


def test_every_requirement_is_locked_in_its_range() -> None:
  versions = locked()
  for requirement in requirements():
    version, _ = versions[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), requirement


def test_every_version_has_hashes() -> None:
  for name, (version, hashes) in locked().items():
    assert hashes, f'{name}=={version}'
    for each in hashes:
      assert re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', each), each
