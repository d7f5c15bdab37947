
// The token explorer.

const HUES = [
  '#0072b2', '#d55e00', '#009e73', '#cc79a7',
  '#e69f00', '#56b4e9', '#f0e442', '#8c8c8c',
];

// Eight colours; the experts after them have lighter and darker ones.
function expertColour(expert) {
  const hue = HUES[expert % 8].match(/\w\w/g).map((part) => parseInt(part, 16));
  const turn = Math.floor(expert / 8);
  if (turn === 0) return hue;
  const towards = turn % 2 ? 255 : 0;
  const part = 0.45 * (1 - 0.6 ** Math.ceil(turn / 2)) / 0.4;
  return hue.map((value) => Math.round(value + (towards - value) * Math.min(part, 0.7)));
}
const css = (rgb) => `rgb(${rgb.join(' ')})`;
const isDark = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b < 110;

function lossColour(loss) {
  const part = Math.min((loss ?? 0) / 6, 1);
  return `rgb(213 94 0 / ${(0.08 + 0.82 * part).toFixed(2)})`;
}

class Pane {
  constructor(data, onMove) {
    this.data = data;
    this.count = data.tokens.length;
    this.onMove = onMove;
    this.node = element('section', { className: 'pane' });
    this.passage = element('div', { className: 'passage', tabIndex: 0 });
    this.passage.setAttribute('role', 'listbox');
    this.passage.setAttribute('aria-label', `Tokens of ${data.name}`);
    this.passage.setAttribute('aria-describedby', 'explorer-help');
    this.detail = element('div', { className: 'detail' });
    this.node.append(element('h3', { textContent: data.name }), this.passage, this.detail);
    this.makeTokens();
    this.makeDetail();
    this.listen();
  }

  // Of all routers one picture, a column per token: each token shows its own.
  makeTokens() {
    const { routers, layers, chosen, tokens } = this.data;
    const steps = [...new Set(layers)];
    const rows = routers.map((_, r) => 3 * r + steps.indexOf(layers[r]));
    const height = rows.at(-1) + 3;
    const canvas = element('canvas', { width: this.count, height });
    const context = canvas.getContext('2d');
    const image = context.createImageData(this.count, height);
    const colours = Array.from({ length: this.data.experts }, (_, e) => expertColour(e));
    routers.forEach((_, r) => {
      for (let t = 0; t < this.count; t++) {
        const colour = colours[chosen[r][0]?.[t]];
        if (!colour) continue; // a token that no expert was given
        for (let line = 0; line < 3; line++) {
          const at = 4 * ((rows[r] + line) * this.count + t);
          image.data.set([...colour, 255], at);
        }
      }
    });
    context.putImageData(image, 0, 0);
    const prefix = `token-${Pane.made++}`;
    this.passage.id = `${prefix}-passage`;
    const bands = height * (routers.length > 6 ? 1 : 2);
    // One rule for all, as a style of each would be read two thousand times.
    this.node.append(element('style', { textContent: `
      #${this.passage.id} .token {
        padding-bottom: ${bands}px;
        background-image: url(${canvas.toDataURL()}), none;
        background-size: ${100 * this.count}% ${bands}px;
      }` }));
    const share = 100 / Math.max(this.count - 1, 1);
    const parts = [];
    this.tokens = tokens.map((text, t) => {
      const blank = !text.trim();
      const token = element('span', {
        className: blank ? 'token blank' : 'token',
        id: `${prefix}-${t}`,
        textContent: visible(text),
      });
      token.dataset.t = t;
      token.dataset.path = this.path(t);
      token.style.backgroundPosition = `${t * share}% 100%`;
      token.setAttribute('role', 'option');
      parts.push(token);
      if (text.endsWith('\n')) parts.push(element('br'));
      return token;
    });
    this.passage.append(...parts);
  }

  // The experts of a token, a line per layer: '5·2' is a pair.
  path(t) {
    const { layers, chosen } = this.data;
    const lines = new Map();
    layers.forEach((layer, r) => {
      const expert = chosen[r][0]?.[t] ?? -1;
      const known = expert >= 0 && expert < this.data.experts;
      lines.set(layer, [...(lines.get(layer) ?? []), known ? expert : '–']);
    });
    return [...lines.values()].map((experts) => experts.join('·')).join('\n');
  }

  makeDetail() {
    const { routers, layers, top } = this.data;
    this.heading = element('h4');
    const grid = element('div', { className: 'routers' });
    this.rows = routers.map((name, r) => {
      const first = layers[r] !== layers[r - 1] ? 'first' : '';
      const bars = element('div', { className: `bars ${first}` });
      const each = top[r].map(() => bars.appendChild(element('span', { className: 'bar' })));
      const weights = element('span', { className: first });
      grid.append(element('span', { className: first, textContent: name }), bars, weights);
      return { each, weights };
    });
    this.detail.append(this.heading, grid);
  }

  listen() {
    const at = (event) => event.target.closest?.('.token')?.dataset.t;
    const point = (event) => {
      this.column = null;
      const t = at(event);
      if (t !== undefined) this.onMove(Number(t), false);
    };
    this.passage.addEventListener('pointerover', point);
    this.passage.addEventListener('click', point);
    this.passage.addEventListener('keydown', (event) => {
      const t = this.moved(event.key);
      if (t === null) return;
      event.preventDefault();
      this.onMove(t, true);
    });
  }

  moved(key) {
    const t = this.current ?? 0;
    const page = 20;
    const last = this.count - 1;
    if (key !== 'ArrowUp' && key !== 'ArrowDown') this.column = null;
    switch (key) {
      case 'ArrowLeft': return Math.max(t - 1, 0);
      case 'ArrowRight': return Math.min(t + 1, last);
      case 'ArrowUp': return this.line(t, -1);
      case 'ArrowDown': return this.line(t, 1);
      case 'PageUp': return Math.max(t - page, 0);
      case 'PageDown': return Math.min(t + page, last);
      case 'Home': return 0;
      case 'End': return last;
      default: return null;
    }
  }

  // The token above or below, in the column that the keys set out from.
  line(t, way) {
    const from = this.tokens[t];
    this.column ??= from.offsetLeft;
    let best = null;
    let row = null;
    for (let i = t + way; i >= 0 && i < this.count; i += way) {
      const { offsetTop, offsetLeft } = this.tokens[i];
      if (offsetTop === from.offsetTop) continue;
      row ??= offsetTop;
      if (offsetTop !== row) break;
      const distance = Math.abs(offsetLeft - this.column);
      if (best === null || distance < best.distance) best = { i, distance };
    }
    return best?.i ?? t;
  }

  show(t, follow) {
    this.tokens[this.current]?.classList.remove('current');
    this.tokens[this.current]?.removeAttribute('aria-selected');
    this.current = t;
    const token = this.tokens[t];
    token.classList.add('current');
    token.setAttribute('aria-selected', 'true');
    this.passage.setAttribute('aria-activedescendant', token.id);
    if (follow) this.reveal(token);
    const { tokens, loss, top, probability, levels, chosen, weights } = this.data;
    this.heading.replaceChildren(
      element('b', { textContent: shown(tokens[t]) }),
      element('span', { textContent: `token ${t}` }),
      element('span', {
        textContent: loss[t] === null ? 'not predicted' : `loss ${loss[t].toFixed(2)} nats`,
      }),
    );
    this.rows.forEach(({ each, weights: text }, r) => {
      const experts = chosen[r].map((column) => column[t]);
      each.forEach((bar, k) => {
        const expert = top[r][k][t];
        const share = Math.max(probability[r][k][t], 0) / levels;
        const colour = expertColour(Math.max(expert, 0));
        bar.style.width = `${100 * share}%`;
        bar.style.background = css(colour);
        bar.className = 'bar'
          + (experts.includes(expert) ? ' chosen' : '')
          + (isDark(colour) ? ' dark' : '');
        bar.textContent = share > 0.06 ? expert : '';
        bar.title = `expert ${expert}: ${(100 * share).toFixed(0)} %`;
      });
      text.textContent = experts
        .map((expert, k) => [expert, weights[r][k][t] / levels])
        .filter(([expert]) => expert >= 0 && expert < this.data.experts)
        .map(([expert, weight]) => `${expert} × ${weight.toFixed(2)}`)
        .join(', ');
    });
  }

  // The first token of the line at the top of what is seen.
  get top() {
    const above = this.passage.scrollTop;
    let [low, high] = [0, this.count - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      const { offsetTop, offsetHeight } = this.tokens[middle];
      if (offsetTop + offsetHeight <= above) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  set top(t) {
    this.passage.scrollTop = this.tokens[t].offsetTop - this.tokens[0].offsetTop;
  }

  reveal(token) {
    const box = this.passage;
    const [above, below] = [token.offsetTop - 8, token.offsetTop + token.offsetHeight + 8];
    if (above < box.scrollTop) box.scrollTop = above;
    else if (below > box.scrollTop + box.clientHeight) box.scrollTop = below - box.clientHeight;
  }

  colour(by) {
    const { chosen, loss } = this.data;
    const router = by === 'loss' ? null : Math.min(Number(by), chosen.length - 1);
    const tints = Array.from({ length: this.data.experts }, (_, e) =>
      `color-mix(in srgb, ${css(expertColour(e))} var(--tint), transparent)`,
    );
    this.tokens.forEach((token, t) => {
      const mark = router === null ? lossColour(loss[t]) : tints[chosen[router][0]?.[t]];
      token.style.backgroundColor = mark ?? 'transparent';
    });
  }

  keep(expert, by) {
    const { chosen } = this.data;
    const router = Math.min(Number(by) || 0, chosen.length - 1);
    this.passage.classList.toggle('dimmed', expert !== null);
    this.tokens.forEach((token, t) =>
      token.classList.toggle('kept', chosen[router].some((column) => column[t] === expert)),
    );
  }

  spoken() {
    const { tokens, loss, routers, chosen } = this.data;
    const t = this.current;
    const path = routers.map((name, r) =>
      `${name}: ${chosen[r].map((column) => column[t]).filter((e) => e >= 0).join(' and ')}`,
    );
    const nats = loss[t] === null ? '' : `, loss ${loss[t].toFixed(2)}`;
    return `${shown(tokens[t])}${nats}, experts ${path.join(', ')}`;
  }
}
Pane.made = 0;

// In the passage blanks stay as they are; control characters never do.
const visible = (text) => text.replace(/[^ ]+/g, shown);

async function explore() {
  const home = document.getElementById('panes');
  if (!home) return;
  const loaded = new Map();
  const load = async (index) => {
    if (!loaded.has(index)) loaded.set(index, await unpack(`passage-${index}`));
    return loaded.get(index);
  };
  const get = (id) => document.getElementById(id);
  const colourBy = get('colour-by');
  let panes = [];
  let kept = null;

  const show = (t, follow) => {
    for (const pane of panes) {
      if (t < pane.count) pane.show(t, follow || pane.current === undefined);
    }
    if (follow) get('spoken').textContent = panes[0].spoken();
  };
  const paint = () => {
    for (const pane of panes) {
      pane.colour(colourBy.value);
      pane.keep(kept, colourBy.value);
    }
  };
  const legend = () => {
    const count = Math.max(...panes.map((pane) => pane.data.experts));
    const buttons = Array.from({ length: count }, (_, expert) => {
      const colour = expertColour(expert);
      const button = element('button', { type: 'button', textContent: expert });
      button.style.background = css(colour);
      button.style.color = isDark(colour) ? '#fff' : '#000';
      button.setAttribute('aria-pressed', kept === expert);
      button.setAttribute('aria-label', `expert ${expert}`);
      button.addEventListener('click', () => {
        kept = kept === expert ? null : expert;
        legend();
        get('expert-legend').children[expert].focus();
        paint();
      });
      return button;
    });
    get('expert-legend').replaceChildren(...buttons);
  };
  const choose = async () => {
    const indices = [get('run-first').value, get('run-second')?.value ?? ''];
    const data = await Promise.all(indices.filter((i) => i !== '').map(load));
    const t = panes[0]?.current ?? 0;
    panes = data.map((each) => new Pane(each, show));
    home.classList.toggle('two', panes.length > 1);
    home.replaceChildren(...panes.map((pane) => pane.node));
    // Both scroll together: the same tokens stay at the top.
    panes.forEach((pane, i) => {
      const other = panes[1 - i];
      if (!other) return;
      pane.passage.addEventListener('scroll', () => {
        if (!pane.passage.matches(':hover, :focus')) return;
        const { top } = pane;
        if (top < other.count) other.top = top;
      }, { passive: true });
    });
    const before = colourBy.value;
    const routers = panes.map((pane) => pane.data.routers).reduce((a, b) => (b.length > a.length ? b : a));
    colourBy.replaceChildren(
      ...routers.map((name, r) => element('option', { value: r, textContent: `router ${name}` })),
      element('option', { value: 'loss', textContent: 'loss' }),
    );
    if ([...colourBy.options].some((option) => option.value === before)) colourBy.value = before;
    legend();
    paint();
    show(Math.min(t, panes[0].count - 1), true);
  };

  get('run-first').addEventListener('change', choose);
  get('run-second')?.addEventListener('change', choose);
  colourBy.addEventListener('change', paint);
  get('show-paths').addEventListener('change', (event) =>
    home.classList.toggle('paths', event.target.checked),
  );
  await choose();
  await vocabulary(load);
}

// What each expert of a router sees more often than chance.
async function vocabulary(load) {
  const table = document.getElementById('vocabulary-table');
  if (!table) return;
  const [run, router] = ['run', 'router'].map((name) =>
    document.getElementById(`vocabulary-${name}`),
  );
  const fill = async () => {
    const { routers, vocabulary: words } = await load(run.value);
    const before = router.value;
    router.replaceChildren(
      ...routers.map((name, r) => element('option', { value: r, textContent: name })),
    );
    router.value = before in routers ? before : 0;
    table.tBodies[0].replaceChildren(
      ...words[router.value].map((list, expert) => {
        const chips = list.map(({ token, share, lift }) =>
          element(
            'span',
            { className: 'word', title: `${(100 * share).toFixed(1)} % of the expert's tokens` },
            element('code', { textContent: shown(token) }),
            element('small', { textContent: `${lift.toFixed(1)}×` }),
          ),
        );
        const heading = element('th', { scope: 'row', textContent: `expert ${expert}` });
        return element('tr', {}, heading, element('td', {}, ...chips));
      }),
    );
  };
  run.addEventListener('change', fill);
  router.addEventListener('change', fill);
  await fill();
}
