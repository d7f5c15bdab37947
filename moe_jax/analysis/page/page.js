'use strict';

// What is embedded as compressed JSON: see report.py, `_packed`.
async function unpack(id) {
  const text = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes])
    .stream()
    .pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).json();
}

function fail(error) {
  const note = document.getElementById('failure');
  note.hidden = false;
  note.textContent = `This page could not be drawn: ${error}`;
  throw error;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Characters that are not seen get a symbol; report.py has the same.
function shown(text) {
  return Array.from(text, (letter) => {
    const code = letter.codePointAt(0);
    if (letter === '\n') return '⏎';
    if (letter === '\t') return '⇥';
    if (letter === ' ') return '␣';
    if (code === 0x7f) return '␡';
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    const lone = code >= 0xd800 && code < 0xe000;
    return lone || (code >= 0x80 && code < 0xa0) ? '\ufffd' : letter;
  }).join('');
}

// Charts: Vega, drawn where they are seen first, the others when idle.

const dark = matchMedia('(prefers-color-scheme: dark)');
const views = new Map();
const signals = new Map();

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line] = ['--ink', '--muted', '--line'].map((name) =>
    style.getPropertyValue(name).trim(),
  );
  // Lines by depth: neither end of the scale may vanish in the background.
  const extent = dark.matches ? [0.3, 1] : [0, 0.88];
  return {
    axis: {
      labelColor: muted,
      titleColor: muted,
      gridColor: line,
      domainColor: line,
      tickColor: line,
    },
    legend: { labelColor: muted, titleColor: muted },
    title: { color: ink },
    range: {
      ordinal: { scheme: 'viridis', extent },
      heatmap: { scheme: 'viridis' },
      ramp: { scheme: 'viridis' },
    },
  };
}

const tooltip = document.getElementById('tooltip');

function tell(handler, event, item, value) {
  tooltip.hidden = value == null || value === '';
  if (tooltip.hidden) return;
  const rows = typeof value === 'object' ? Object.entries(value) : [['', value]];
  tooltip.replaceChildren(
    ...rows.map(([key, text]) =>
      element('div', {}, element('span', { textContent: key }), element('span', { textContent: text })),
    ),
  );
  const { width, height } = tooltip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - width - 6);
  const below = event.clientY + 16;
  const y = below + height > innerHeight ? event.clientY - height - 12 : below;
  tooltip.style.left = `${Math.max(x, 6)}px`;
  tooltip.style.top = `${y}px`;
}

const isOf = (chart, panel) => chart.replace(/-\d+$/, '') === panel;

async function draw(name, chart) {
  const container = document.getElementById(`chart-${name}`);
  views.get(name)?.finalize();
  const { view } = await vegaEmbed(container, chart.vega, {
    mode: 'vega',
    renderer: chart.renderer,
    config: theme(),
    tooltip: tell,
    actions: false,
    defaultStyle: false,
  });
  views.set(name, view);
  if (setSignals(name, view, chart)) await view.runAsync();
  container.dataset.drawn = '';
}

function setSignals(name, view, chart) {
  const known = new Set((chart.vega.signals ?? []).map((signal) => signal.name));
  let any = false;
  for (const [key, value] of signals) {
    const [panel, signal] = key.split('/');
    if (isOf(name, panel) && known.has(signal)) {
      view.signal(signal, value);
      any = true;
    }
  }
  return any;
}

async function drawAll(charts) {
  const place = (name) =>
    document.getElementById(`chart-${name}`).getBoundingClientRect();
  const names = Object.keys(charts);
  const seen = names.filter((name) => place(name).top < innerHeight);
  const queue = [...seen, ...names.filter((name) => !seen.includes(name))];
  let since = performance.now();
  for (const name of queue) {
    await draw(name, charts[name]);
    // The page stays responsive: it is let go after some milliseconds.
    if (performance.now() - since > 30) {
      await new Promise((resolve) => setTimeout(resolve));
      since = performance.now();
    }
  }
}

function connectControls(charts) {
  for (const control of document.querySelectorAll('[data-signal]')) {
    control.addEventListener('change', () => {
      const panel =
        control.closest('[data-for]')?.dataset.for ?? control.closest('.panel').id;
      const value =
        control.type === 'radio' ? control.value : Number(control.value);
      signals.set(`${panel}/${control.dataset.signal}`, value);
      for (const [name, view] of views) {
        if (isOf(name, panel) && setSignals(name, view, charts[name])) view.runAsync();
      }
    });
  }
}

// Tables: a click on a heading sorts, a second one turns the order around.

function sortable(table) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  headings.forEach((heading, column) => {
    const button = element('button', { type: 'button' }, ...heading.childNodes);
    heading.append(button);
    button.addEventListener('click', () => {
      const down = heading.getAttribute('aria-sort') === 'ascending';
      headings.forEach((each) => each.removeAttribute('aria-sort'));
      heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const sign = down ? -1 : 1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        // What is not known comes last, in either order.
        if (x === '' || y === '') return (x === '') - (y === '');
        const numbers = [Number(x), Number(y)];
        return sign * (numbers.some(Number.isNaN)
          ? x.localeCompare(y)
          : numbers[0] - numbers[1]);
      });
      body.append(...rows);
    });
  });
}

(async () => {
  document.querySelectorAll('table.sortable').forEach(sortable);
  const charts = await unpack('charts');
  connectControls(charts);
  await explore();
  await drawAll(charts);
  dark.addEventListener('change', () => drawAll(charts));
  document.documentElement.dataset.drawn = Math.round(performance.now());
})().catch(fail);
