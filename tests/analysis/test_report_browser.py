"""Reports in a browser: what is drawn, how fast, and what keys do.

`make test-browser` installs Chromium and what drives it, and prints what was
measured. Times of drawing are those of the processor, as others may use it.
"""

import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_jax.analysis import report
from tests.helpers import workdirs

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
try:
  from playwright import sync_api
except ImportError:
  CHROMIUM = None

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    CHROMIUM is None, reason='needs Chromium and playwright: make test-browser'
  ),
]

FLAGS = """
--disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync
""".split()
DESKTOP = {'width': 1280, 'height': 900}
PHONE = {'width': 390, 'height': 844}
DRAWN = 'document.documentElement.dataset.drawn'
# Charts that hold marks: elements in groups, or pixels that differ.
EMPTY = """() => [...document.querySelectorAll('.chart')].filter((chart) => {
  const canvas = chart.querySelector('canvas');
  if (!canvas) return chart.querySelectorAll('.mark-group path').length < 5;
  const {width, height} = canvas;
  const {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
  return new Set(new Uint32Array(data.buffer)).size < 10;
}).map((chart) => chart.id)"""
# Whether the passage has been scrolled to the token.
IN_SIGHT = """() => {
  const [box, token] = ['.passage', '.current'].map((name) =>
    document.querySelector(name).getBoundingClientRect());
  return token.top >= box.top && token.bottom <= box.bottom;
}"""
# Scrolls a passage from end to end, and returns milliseconds between frames.
SCROLL = """() => new Promise((resolve) => {
  const box = document.querySelector('.passage');
  const way = box.scrollHeight - box.clientHeight;
  const times = [];
  let before = null;
  const frame = (now) => {
    if (before !== null) times.push(now - before);
    before = now;
    box.scrollTop = (way * times.length) / 120;
    if (times.length < 120) requestAnimationFrame(frame);
    else resolve(times);
  };
  requestAnimationFrame(frame);
})"""


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
  with sync_api.sync_playwright() as playwright:
    # Without a sandbox, which needs rights that containers rarely have.
    chromium = playwright.chromium.launch(
      executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False
    )
    yield chromium
    chromium.close()


@pytest.fixture(scope='module')
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The page of four runs of twelve and six routers, and 2,000 tokens."""
  folder = tmp_path_factory.mktemp('four')
  sizes = {
    'both': {'factors': 2, 'experts': 8, 'router__recurrent': 'gru'},
    'cartesian': {'factors': 2, 'experts': 8},
    'rmoe': {'factors': 1, 'experts': 16, 'router__recurrent': 'gru'},
    'linear': {'factors': 1, 'experts': 16},
  }
  made = [
    workdirs.make_workdir(folder / name, layers=6, **size)
    for name, size in sizes.items()
  ]
  return written(folder / 'four.html', made)


@pytest.fixture(scope='module')
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The page of a comparison of three variants with two seeds."""
  folder = tmp_path_factory.mktemp('compared')
  made = workdirs.make_comparison(folder / 'all', seeds=(0, 1), tokens=200)
  return written(folder / 'compared.html', [made])


def written(path: Path, directories: list[str]) -> Path:
  assert report.main([*directories, f'--output={path}']) == 0
  return path


def passage(page: Path, name: str) -> dict[str, Any]:
  """The passage of a run that lies beside a page."""
  path = page.parent / name / 'analysis' / '400.json'
  return json.loads(path.read_text())['passage']


class Opened:
  """A page that has been drawn, and what its console says."""

  def __init__(self, browser: Any, path: Path, **options: Any):
    options = {'viewport': DESKTOP, **options}
    self.context = browser.new_context(offline=True, **options)
    self.page = self.context.new_page()
    self.said: list[str] = []
    self.page.on('console', lambda message: self.said.append(message.text))
    self.page.on('pageerror', lambda error: self.said.append(str(error)))
    self.page.goto(path.as_uri())
    self.page.wait_for_function(DRAWN, timeout=120_000)

  def __enter__(self) -> Any:
    return self.page

  def __exit__(self, failed: Any, *_: object) -> None:
    self.context.close()
    if failed is None:
      assert not self.said


@pytest.mark.parametrize('name', ['four', 'compared'])
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'color_scheme': 'dark'},
    {'viewport': PHONE, 'has_touch': True, 'device_scale_factor': 2},
  ],
  ids=['light', 'dark', 'phone'],
)
def test_everything_is_drawn_and_fits(
  name: str,
  options: dict[str, Any],
  browser: Any,
  request: pytest.FixtureRequest,
) -> None:
  path = request.getfixturevalue(name)
  with Opened(browser, path, **options) as page:
    assert page.locator('.chart').count() > 40
    assert page.evaluate(EMPTY) == []
    width = page.evaluate('document.documentElement.scrollWidth')
    assert width <= page.viewport_size['width']


def luminance(page: Any, selector: str, what: str) -> float:
  """The relative luminance of a colour of an element (WCAG 2.2)."""
  colour = page.eval_on_selector(
    selector, f'(element) => getComputedStyle(element).{what}'
  )
  parts = [float(part) / 255 for part in colour[4:-1].split(',')[:3]]
  linear = [
    part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
    for part in parts
  ]
  return sum(
    weight * part
    for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
  )


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_texts_and_charts_go_with_the_scheme(
  scheme: str, browser: Any, compared: Path
) -> None:
  with Opened(browser, compared, color_scheme=scheme) as page:
    paper = luminance(page, 'body', 'backgroundColor')
    assert (paper > 0.5) == (scheme == 'light')
    texts = [
      luminance(page, 'body', 'color'),
      luminance(page, '.about', 'color'),
      luminance(page, '#chart-curves-0 .role-axis-label text', 'fill'),
    ]
    for text in texts:
      low, high = sorted((paper, text))
      assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, level AA
    # Charts are drawn anew when the scheme changes.
    page.emulate_media(color_scheme='dark' if scheme == 'light' else 'light')
    page.wait_for_function(
      '(before) => getComputedStyle(document.querySelector('
      "'#chart-curves-0 .role-axis-label text')).fill !== before",
      arg=page.eval_on_selector(
        '#chart-curves-0 .role-axis-label text',
        '(element) => getComputedStyle(element).fill',
      ),
    )


def test_keys_move_the_token(browser: Any, four: Path) -> None:
  with Opened(browser, four) as page:
    page.focus('.passage')

    def current() -> int:
      return int(page.locator('.token.current').get_attribute('data-t'))

    def press(key: str) -> int:
      page.keyboard.press(key)
      return current()

    assert current() == 0
    assert press('ArrowRight') == 1
    assert press('ArrowRight') == 2
    assert press('ArrowLeft') == 1
    below = press('ArrowDown')
    assert below > 2 and press('ArrowUp') == 1
    assert press('End') == 1999
    assert page.evaluate(IN_SIGHT)
    assert 'token 1999' in page.inner_text('.detail')
    assert page.inner_text('#spoken').count(' and ') == 12  # pairs of experts
    assert press('Home') == 0
    active = page.get_attribute('.passage', 'aria-activedescendant')
    assert page.locator(f'#{active}').get_attribute('data-t') == '0'


def test_a_token_tells_what_the_analysis_says(browser: Any, four: Path) -> None:
  packed = passage(four, 'both')
  with Opened(browser, four) as page:
    page.locator('.token[data-t="30"]').hover()
    said = page.inner_text('.detail')
    assert f'loss {packed["loss"][30]:.2f} nats' in said
    for router in range(12):
      first, second = packed['experts'][router][30]
      weight = page.locator('.routers > :nth-child(3n)').nth(router)
      assert weight.inner_text().startswith(f'{first} × ')
      assert f', {second} × ' in weight.inner_text()
    widths = page.eval_on_selector_all(
      '.routers .bar',
      '(bars) => bars.map((bar) => parseFloat(bar.style.width))',
    )
    given = [100 * p for row in packed['top_probability'] for p in row[30]]
    assert widths == pytest.approx(given, abs=0.3)


def test_two_runs_are_beside_each_other(browser: Any, four: Path) -> None:
  with Opened(browser, four) as page:
    page.select_option('#run-second', '2')
    page.wait_for_selector('.pane:nth-child(2) .token')
    page.locator('.token[data-t="40"]').first.hover()
    assert page.locator('.token.current').count() == 2
    assert (
      page.locator('.detail')
      .all_inner_texts()[1]
      .startswith(page.locator('.detail').all_inner_texts()[0].splitlines()[0])
    )
    # What is seen of one is seen of the other.
    page.evaluate("document.querySelector('.passage').scrollTop = 2000")
    page.wait_for_function(
      "[...document.querySelectorAll('.passage')].every((x) => x.scrollTop > 0)"
    )
    page.click('#expert-legend button:nth-child(3)')
    kept = page.locator('.pane:first-child .token.kept').count()
    chosen = passage(four, 'both')['experts']
    assert kept == sum(2 in experts for experts in chosen[0])


def test_a_switch_changes_what_curves_are_over(
  browser: Any, compared: Path
) -> None:
  labels = '#chart-curves-0 .role-axis-label text'
  with Opened(browser, compared) as page:
    assert '400' in page.locator(labels).all_text_contents()
    page.check('input[value=flops]')
    page.wait_for_function(
      f"""[...document.querySelectorAll('{labels}')]
        .some((label) => label.textContent.endsWith('T'))"""
    )


def test_a_heading_sorts(browser: Any, compared: Path) -> None:
  with Opened(browser, compared) as page:
    heading = page.locator('#comparison th', has_text='bits per byte')

    def order() -> list[str]:
      rows = page.locator('#comparison tbody th').all_inner_texts()
      return [row.split()[0] for row in rows]

    heading.locator('button').press('Enter')
    assert heading.get_attribute('aria-sort') == 'ascending'
    assert order() == ['rmoe', 'rnn', 'linear']
    heading.locator('button').press('Enter')
    assert order() == ['linear', 'rnn', 'rmoe']


def test_tables_are_read_without_javascript(
  browser: Any, compared: Path
) -> None:
  context = browser.new_context(java_script_enabled=False, viewport=PHONE)
  page = context.new_page()
  page.goto(compared.as_uri())
  assert 'rmoe' in page.inner_text('#comparison tbody')
  assert 'router.recurrent' in page.inner_text('#differences')
  assert 'need it' in page.inner_text('noscript')
  context.close()


def test_it_is_drawn_and_scrolls_fast(
  browser: Any, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  with Opened(browser, four) as page:
    session = page.context.new_cdp_session(page)
    session.send('Performance.enable')
    page.reload()
    page.wait_for_function(DRAWN, timeout=120_000)
    metrics = session.send('Performance.getMetrics')['metrics']
    [busy] = [m['value'] for m in metrics if m['name'] == 'ThreadTime']
    wall = float(page.evaluate(DRAWN)) / 1000
    page.locator('.passage').scroll_into_view_if_needed()
    times = page.evaluate(SCROLL)
  median = statistics.median(times)
  ninth = statistics.quantiles(times, n=10)[-1]
  with capsys.disabled():
    print(
      f'\nfour runs, {four.stat().st_size / 1e6:.1f} MB: drawn after'
      f' {wall:.2f} s, {busy:.2f} s of the processor; 2,000 tokens scrolled:'
      f' {median:.1f} ms a frame, nine of ten below {ninth:.1f} ms'
    )
  assert busy < 2
  assert median < 34  # thirty frames a second, whoever else computes
