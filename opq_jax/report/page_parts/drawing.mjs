/**
 * Draws descriptions of .opq files: what a network is, its four sizes, its leaves, two side by side.
 *
 * A description is that of `opq_jax.report.file_description`, whoever made it.  Names and metadata
 * come from files of unknown origin: they become text nodes, with invisible characters escaped, and
 * never markup.
 */

const SVG = 'http://www.w3.org/2000/svg'; // the name of a vocabulary, which nobody fetches
const MAX_LISTED = 8; // leaves that a sentence names
const PARTS = ['compressed leaves', 'other leaves', 'header, index, metadata', 'side files'];
const SIZES = {
  nominal: 'compressed leaves: survivors at the widths of the paper, without positions',
  packed: 'compressed leaves: codes of fixed width, a mask bit a weight, levels',
  entropy: 'compressed leaves: zeroth-order entropy of the codes',
  file: 'bytes on disk: headers and uncompressed leaves included',
};

/**
 * Shows descriptions, and those of files that are dropped on the page or chosen.
 *
 * @param {object[]} given one description, or two for a comparison; none for an empty page
 * @param {(file: File, progress: Function) => Promise<object>} read describes a file
 */
export function start(given, read) {
  const [shown, status, alert] = ['shown', 'status', 'alert'].map((id) => byId(id));
  const [input, beside] = [byId('file'), byId('beside')];
  let current = given;
  let reading = 0; // a file that is chosen meanwhile ends the reading of the one before
  const show = () => {
    shown.replaceChildren(...drawn(current));
    document.title = current.map(({name}) => visible(name)).join(' and ') || document.title;
    beside.disabled = !current.length;
  };
  const open = async (files) => {
    const own = ++reading;
    alert.replaceChildren();
    const found = [];
    let name = '';
    try {
      for (const file of files.slice(0, 2)) {
        name = visible(file.name);
        status.textContent = `Reading ${name} …`;
        const description = await read(file, (done, all) => {
          if (own !== reading) throw new Error('found another file to read');
          status.textContent = `Reading ${name}: ${number(done)} of ${number(all)} leaves`;
        });
        if (own !== reading) return;
        found.push(description);
      }
      current = beside.checked && found.length === 1 ? [current[0], found[0]] : found;
      show();
      status.textContent = `Shown: ${current.map(({name}) => visible(name)).join(' and ')}`;
    } catch (error) {
      if (own !== reading) return;
      status.textContent = '';
      alert.textContent = `${name} is not shown: ${visible(error.message)}`;
    }
  };
  input.addEventListener('change', () => input.files.length && open([...input.files]));
  for (const type of ['dragenter', 'dragover']) {
    document.addEventListener(type, (event) => {
      event.preventDefault();
      document.body.classList.add('dragging');
    });
  }
  document.addEventListener('dragleave', (event) => {
    if (event.relatedTarget === null) document.body.classList.remove('dragging');
  });
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dragging');
    const files = [...event.dataTransfer.files];
    if (files.length) open(files);
  });
  show();
}

/** Returns the elements that show one description, or two side by side. */
function drawn(descriptions) {
  if (descriptions.length === 0) return [];
  if (descriptions.length === 1) return sections(descriptions[0], 'h1');
  const labels = descriptions.map(({name}) => visible(name));
  return [
    element('h1', {}, `A: ${labels[0]}`, element('br', {}), `B: ${labels[1]}`),
    totals(descriptions),
    comparison(descriptions),
    ...descriptions.map((description, i) =>
      disclosure(`All of ${'AB'[i]}: ${labels[i]}`, ...sections(description, 'h2')),
    ),
  ];
}

/** Returns the elements that show one description, under a heading of this kind. */
function sections(description, tag) {
  const sizes = element('div', {}, fourSizes(description), whereBytesGo(description));
  return [
    heading(description, tag),
    element('div', {class: 'overview'}, ...[sizes, origin(description)].filter(Boolean)),
    compressedLeaves(description),
    deadMatter(description),
    otherLeaves(description),
  ].filter(Boolean);
}

// ---- one file

function heading(description, tag) {
  const {original, bytes, leaves} = description;
  const found = compressed(description);
  const weights = total(found, weightsOf);
  const survivors = total(found, (leaf) => leaf.codes.survivors);
  const rate = original
    ? `, ${(original / bytes).toFixed(2)} times fewer than the network had`
    : '';
  const facts = [
    `${number(bytes)} bytes${rate}`,
    `${number(leaves.length)} leaves, of which ${number(found.length)} compressed`,
  ];
  if (weights) {
    const bits = (8 * total(found, (leaf) => leaf.bytes)) / weights;
    facts.push(
      `${number(weights)} compressed weights: ${bits.toFixed(2)} bits each, ` +
        `${percent(1 - survivors / weights)} pruned`,
    );
  }
  const add = (count, one, many) => {
    if (count) facts.push(`${number(count)} ${count === 1 ? one : many}`);
  };
  const count = (is) => found.filter(is).length;
  const tied = leaves.filter(({tiedTo}) => tiedTo !== null).length;
  const scaled = count(({codes}) => codes.scaledOutputs);
  add(
    count(({codes}) => codes.slices),
    'leaf has slices',
    'leaves have slices',
  );
  add(
    count(({codes}) => codes.isRotated),
    'leaf has rotated inputs',
    'leaves have rotated inputs',
  );
  add(scaled, 'leaf has scales of its outputs', 'leaves have scales of their outputs');
  add(tied, 'leaf is an earlier one again', 'leaves are earlier ones again, stored once');
  add(
    total(found, (leaf) => leaf.codes.escaped),
    'weight is stored as it is',
    'weights are stored as they are',
  );
  const list = element('ul', {class: 'facts'}, ...facts.map((text) => element('li', {}, text)));
  return element('header', {}, element(tag, {}, visible(description.name)), list);
}

function origin({metadata, sideFiles}) {
  const lines = (text) => text.split('\n').map(visible).join('\n');
  const rows = metadata.map(([key, text]) => [visible(key), lines(text)]);
  for (const [name, size] of sideFiles) {
    rows.push([`side file ${visible(name)}`, `${number(size)} bytes`]);
  }
  if (rows.length === 0) return null;
  const made = table('Metadata and side files', ['key', 'value'], rows, 'texts');
  return section('How it was made', made);
}

function fourSizes(description) {
  const found = compressed(description);
  const float32 = 4 * total(found, weightsOf);
  const rows = Object.entries(SIZES).map(([name, meaning]) => {
    const [size, base] = sizeOf(description, found, float32, name);
    return [
      name,
      number(Math.round(size)),
      base && size ? `${(base / size).toFixed(2)} ×` : '–',
      meaning,
    ];
  });
  const caption = 'Four sizes in bytes; rate: times smaller than the same leaves in float32';
  return section(
    'Four sizes',
    table(caption, ['size', 'bytes', 'rate', 'what it is'], rows, 'sizes'),
  );
}

/** A size in bytes, and that of the same leaves in float32. */
function sizeOf(description, found, float32, name) {
  if (name === 'file') return [description.bytes, description.asFloat32];
  return [total(found, (leaf) => leaf.codes[name]), float32];
}

function whereBytesGo(description) {
  const {bytes, headers, sideBytes, leaves} = description;
  const inCompressed = total(compressed(description), (leaf) => leaf.bytes);
  const inOthers = total(leaves, (leaf) => leaf.bytes) - inCompressed;
  const sizes = [inCompressed, inOthers, headers, sideBytes];
  const bar = element('div', {class: 'stack', 'aria-hidden': 'true'});
  const rows = [];
  PARTS.forEach((part, i) => {
    if (sizes[i] <= 0) return;
    const piece = element('div', {class: `part${i}`});
    piece.style.flexGrow = String(sizes[i] / bytes);
    bar.append(piece);
    const name = element('span', {}, element('span', {class: `swatch part${i}`}), part);
    rows.push([name, number(sizes[i]), percent(sizes[i] / bytes)]);
  });
  const caption = 'Bytes of the file by what they hold';
  return section(
    'Where the bytes go',
    bar,
    table(caption, ['part', 'bytes', 'share'], rows, 'sizes'),
  );
}

function compressedLeaves(description) {
  const found = compressed(description);
  if (found.length === 0) return null;
  const most = (size) => found.reduce((largest, leaf) => Math.max(largest, size(leaf)), 0) || 1;
  const [mostBits, mostBytes] = [most(bitsOf), most(({bytes}) => bytes)];
  const columns = [
    {name: 'leaf', key: ({path}) => path},
    {name: 'weights', key: weightsOf, isWide: true},
    {name: 'pruned', key: prunedOf},
    {name: 'bits a weight', key: bitsOf},
    {name: 'bytes', key: ({bytes}) => bytes},
    {name: 'codes', isWide: true},
  ];
  const cells = (leaf) => [
    numberCell(number(weightsOf(leaf)), 'wide'),
    barCell(percent(prunedOf(leaf)), prunedOf(leaf)),
    barCell(bitsOf(leaf).toFixed(2), bitsOf(leaf) / mostBits),
    barCell(
      number(leaf.bytes),
      leaf.bytes / mostBytes,
      `${percent(leaf.bytes / description.bytes)} of the file`,
    ),
    element('td', {class: 'wide'}, histogram(leaf.codes, 'spark')),
  ];
  return section(
    'Compressed leaves',
    leafTable(
      'Sparsity, bits and bytes of each compressed leaf; a leaf opens to the histogram of its codes',
      columns,
      found,
      cells,
      leafDetails,
    ),
  );
}

function otherLeaves(description) {
  const found = description.leaves.filter(({codes}) => codes === null);
  if (found.length === 0) return null;
  const columns = [
    {name: 'leaf', key: ({path}) => path},
    {name: 'its bytes', key: ({original}) => original},
    {name: 'in the file', key: ({bytes}) => bytes},
  ];
  const cells = (leaf) => [numberCell(number(leaf.original)), numberCell(number(leaf.bytes))];
  return section(
    'Other leaves',
    leafTable('Leaves that are stored bit for bit', columns, found, cells, null),
  );
}

function deadMatter(description) {
  const found = compressed(description);
  if (found.length === 0) return null;
  const dead = found.filter(({codes}) => codes.survivors === 0);
  const partly = found.filter(({codes}) => codes.deadChannels || codes.deadRows);
  if (partly.length === 0) {
    const text = 'None: every output channel, and every row, has a weight that is not pruned.';
    return section('Dead matter', element('p', {}, text));
  }
  const channels = total(found, ({codes}) => codes.deadChannels);
  const rows = total(found, ({codes}) => codes.deadRows);
  const names = dead
    .slice(0, MAX_LISTED)
    .map(({path}) => visible(path))
    .join(', ');
  const more = dead.length > MAX_LISTED ? ` and ${number(dead.length - MAX_LISTED)} more` : '';
  const leaves = dead.length ? ` All weights are pruned of ${names}${more}.` : '';
  const text =
    `All weights are pruned in ${number(channels)} output channels, and at ${number(rows)} indices ` +
    `of the first axis (rows).${leaves}`;
  const columns = [
    {name: 'leaf', key: ({path}) => path},
    {name: 'channels', key: ({codes}) => codes.deadChannels},
    {name: 'rows', key: ({codes}) => codes.deadRows},
  ];
  const cells = ({codes}) => [
    numberCell(number(codes.deadChannels)),
    numberCell(number(codes.deadRows)),
  ];
  return section(
    'Dead matter',
    element('p', {}, text),
    leafTable(
      'Leaves with output channels or rows in which all is pruned',
      columns,
      partly,
      cells,
      null,
    ),
  );
}

/** The facts of a leaf, the histogram of its codes over the codebook, and both as a table. */
function leafDetails(leaf) {
  const {codes} = leaf;
  const grid = gridOf(codes);
  const facts = [
    ['weights', number(weightsOf(leaf))],
    ['not pruned', number(codes.survivors)],
    ['stored as they are', number(codes.escaped)],
    ['levels a sign', number(codes.levels)],
    ['slices', number(codes.slices)],
    ['scales of outputs', number(codes.scaledOutputs)],
    ['inputs', codes.isRotated ? 'rotated: codes are those of rotated weights' : ''],
    ['stored once, with', leaf.tiedTo === null ? '' : visible(leaf.tiedTo)],
    ['threshold', range(codes.grids.threshold)],
    ['first value', range(codes.grids.first)],
    ['step', range(codes.grids.step)],
    ['nominal, packed', `${bitsText(leaf, 'nominal')}, ${bitsText(leaf, 'packed')} bits`],
    ['entropy, file', `${bitsText(leaf, 'entropy')}, ${bitsOf(leaf).toFixed(3)} bits`],
  ].filter(([, text]) => text && text !== '0');
  const fact = ([key, text]) => element('div', {}, element('dt', {}, key), element('dd', {}, text));
  const list = element('dl', {}, ...facts.map(fact));
  if (total(codes.counts, (count) => count) === 0) return [list];
  const middle = (codes.counts.length - 1) / 2;
  const outermost = grid ? valueOf(grid, middle) : middle;
  const ends = [-outermost, 0, outermost].map((value) => element('span', {}, short(value)));
  const unit = grid
    ? codes.scaledOutputs
      ? 'value, over the scale of its output'
      : 'value'
    : 'code';
  const zeros = codes.counts[middle];
  const note = isCut(codes) ? ' The bar of 0 is cut off.' : '';
  const figure = element(
    'figure',
    {},
    histogram(codes, 'chart'),
    element('div', {class: 'axis', 'aria-hidden': 'true'}, ...ends),
    element(
      'figcaption',
      {},
      `Weights by ${unit}; ${number(zeros)} of ${number(weightsOf(leaf))} are 0.${note}`,
    ),
  );
  const rows = codes.counts.map((count, i) => {
    const code = i - middle;
    const value = grid ? short(valueOf(grid, code)) : '–';
    return [short(code), value, number(count), percent(count / weightsOf(leaf))];
  });
  const counts = table(
    `Codes of ${visible(leaf.path)}`,
    ['code', 'value', 'weights', 'share'],
    rows,
    'sizes',
  );
  return [list, figure, disclosure('Codebook and counts as a table', counts)];
}

/** The one grid of a leaf, null where its slices have several. */
function gridOf({grids}) {
  const isOne = Object.values(grids).every(([least, largest]) => least === largest);
  return isOne ? {first: grids.first[0], step: grids.step[0]} : null;
}

const valueOf = ({first, step}, code) => Math.sign(code) * (first + step * (Math.abs(code) - 1));

/** Whether the bar of 0 is too high for the others to be seen. */
function isCut({counts}) {
  const middle = (counts.length - 1) / 2;
  return counts[middle] > 1.25 * tallest(counts) && tallest(counts) > 0;
}

/** The largest count of a code but 0. */
function tallest(counts) {
  const middle = (counts.length - 1) / 2;
  return counts.reduce((most, count, i) => (i === middle ? most : Math.max(most, count)), 0);
}

/** An SVG of the counts: over the values of the codebook, or over the codes where grids differ. */
function histogram(codes, kind) {
  const {counts} = codes;
  const middle = (counts.length - 1) / 2;
  const grid = gridOf(codes);
  const places = counts.map((_, i) => (grid ? valueOf(grid, i - middle) : i - middle));
  const step = grid ? grid.step : 1;
  const half = places[places.length - 1] + step / 2 || 1;
  const [width, height] = [400, 100];
  const top = isCut(codes) ? 1.25 * tallest(counts) : Math.max(...counts, 1);
  const svg = svgElement('svg', {
    class: kind,
    viewBox: `0 0 ${width} ${height}`,
    'aria-hidden': 'true',
  });
  svg.setAttribute('preserveAspectRatio', 'none');
  const zeroWidth = grid ? Math.min(step, Math.max(2 * grid.first - step, step / 4)) : step;
  let [others, zero] = ['', ''];
  counts.forEach((count, i) => {
    if (count === 0) return;
    const own = i === middle ? zeroWidth : step;
    const x = (width * (places[i] - 0.42 * own + half)) / (2 * half);
    // at least a line: a level that occurs is seen
    const tall = Math.max((height * Math.min(count, top)) / top, 1);
    const wide = (width * 0.84 * own) / (2 * half);
    const path = `M${x.toFixed(2)} ${height}v${(-tall).toFixed(2)}h${wide.toFixed(2)}V${height}z`;
    if (i === middle) zero += path;
    else others += path;
  });
  svg.append(
    svgElement('path', {class: 'kept', d: others}),
    svgElement('path', {class: 'zero', d: zero}),
  );
  if (isCut(codes)) {
    const middleX = width / 2;
    const cut = `M${middleX - width} 9h${2 * width}v5h${-2 * width}z`;
    svg.append(svgElement('path', {class: 'cut', d: cut}));
  }
  return svg;
}

// ---- two files

function totals(descriptions) {
  const found = descriptions.map(compressed);
  const rows = [];
  const compare = (name, numbers, write) => {
    rows.push([name, ...numbers.map(write), difference(numbers[0], numbers[1], write)]);
  };
  for (const name of Object.keys(SIZES)) {
    const sizes = descriptions.map((one, i) => Math.round(sizeOf(one, found[i], 0, name)[0]));
    compare(`${name}, bytes`, sizes, number);
  }
  const weights = found.map((leaves) => total(leaves, weightsOf));
  compare('compressed weights', weights, number);
  const bits = found.map(
    (leaves, i) => (8 * total(leaves, ({bytes}) => bytes)) / (weights[i] || 1),
  );
  compare('bits a weight', bits, (value) => value.toFixed(3));
  const kept = found.map((leaves) => total(leaves, ({codes}) => codes.survivors));
  compare(
    'pruned',
    kept.map((count, i) => (weights[i] ? 1 - count / weights[i] : 0)),
    percent,
  );
  const columns = ['size', 'A', 'B', 'B − A'];
  return section('Sizes', table('Both files side by side', columns, rows, 'sizes'));
}

function comparison(descriptions) {
  const sides = descriptions.map(({leaves}) => new Map(leaves.map((leaf) => [leaf.path, leaf])));
  const paths = new Set(descriptions.flatMap(({leaves}) => leaves.map(({path}) => path)));
  const change = ([one, other]) => (one === null || other === null ? null : other - one);
  const withChange = (numbers) => [...numbers, change(numbers)];
  const pairs = [...paths].map((path) => {
    const both = sides.map((side) => side.get(path));
    const {shape, dtype} = both[0] ?? both[1];
    const bytes = withChange(both.map((leaf) => leaf?.bytes ?? null));
    const bits = withChange(both.map((leaf) => (leaf?.codes ? bitsOf(leaf) : null)));
    return {path, shape, dtype, tiedTo: null, bytes, bits};
  });
  const isCompressed = ({bits}) => bits[0] !== null || bits[1] !== null;
  pairs.sort((one, other) => isCompressed(other) - isCompressed(one));
  const names = ['A', 'B', 'B − A'];
  const columns = [
    {name: 'leaf', key: ({path}) => path},
    ...names.map((name, i) => ({name: `bytes ${name}`, key: ({bytes}) => bytes[i]})),
    ...names.map((name, i) => ({name: `bits ${name}`, key: ({bits}) => bits[i], isWide: true})),
  ];
  const fixed = (value) => value.toFixed(3);
  const write = (value, i, text) => {
    if (value === null) return '–';
    return i === 2 ? signed(value, text) : text(value);
  };
  const cells = ({bytes, bits}) => [
    ...bytes.map((value, i) => {
      const cell = numberCell(write(value, i, number));
      // the columns of bits, where the page is too narrow for them
      if (bits[i] !== null) {
        cell.append(element('span', {class: 'about narrow'}, `${write(bits[i], i, fixed)} bits`));
      }
      return cell;
    }),
    ...bits.map((value, i) => numberCell(write(value, i, fixed), 'wide')),
  ];
  const caption = 'Bytes of each leaf in both files, and bits a weight where it is compressed';
  return section('Leaf by leaf', leafTable(caption, columns, pairs, cells, null));
}

const signed = (value, text) => `${value > 0 ? '+' : value < 0 ? '−' : ''}${text(Math.abs(value))}`;
const difference = (one, other, text) => signed(other - one, text);

// ---- tables

/**
 * A table of leaves whose columns sort it; each row is a group of its own, so that the details of a
 * leaf stay with it.
 */
function leafTable(caption, columns, leaves, cells, details) {
  const groups = leaves.map((leaf, i) => ({
    leaf,
    number: i,
    body: leafRow(leaf, cells(leaf), details),
  }));
  const head = element('tr', {});
  const body = element('table', {class: columns.length > 3 ? 'leaves' : 'leaves few'});
  columns.forEach(({name, key, isWide}, column) => {
    const side = column && key ? 'number' : '';
    const cell = element('th', {scope: 'col', class: isWide ? `${side} wide` : side});
    if (!key) {
      cell.append(name);
    } else {
      const button = element('button', {type: 'button', class: 'sort'}, name);
      button.addEventListener('click', () => sort(cell, key));
      cell.append(button);
      cell.setAttribute('aria-sort', 'none');
    }
    head.append(cell);
  });
  const sort = (cell, key) => {
    const isText = typeof key(leaves[0]) === 'string';
    const before = cell.getAttribute('aria-sort');
    // numbers begin with the largest, names with the first
    const rises = before === 'none' ? isText : before === 'descending';
    for (const other of head.children) {
      if (other.hasAttribute('aria-sort')) other.setAttribute('aria-sort', 'none');
    }
    cell.setAttribute('aria-sort', rises ? 'ascending' : 'descending');
    const compare = (a, b) => {
      const [one, other] = [key(a.leaf), key(b.leaf)];
      if (one === other) return a.number - b.number;
      if (one === null || other === null) return one === null ? 1 : -1; // a leaf without comes last
      return (one < other ? -1 : 1) * (rises ? 1 : -1);
    };
    body.append(...[...groups].sort(compare).map((group) => group.body));
  };
  body.append(element('caption', {}, caption), element('thead', {}, head));
  body.append(...groups.map((group) => group.body));
  return scrolling(body, caption);
}

function leafRow(leaf, cells, details) {
  const path = element(
    'span',
    {class: 'path'},
    ...breakable(visible(leaf.path) || '(the whole tree)'),
  );
  const again = leaf.tiedTo === null ? '' : ` = ${visible(leaf.tiedTo)}`;
  const about = element(
    'span',
    {class: 'about'},
    `${leaf.dtype} ${leaf.shape.join('×') || 'scalar'}${again}`,
  );
  const body = element('tbody', {});
  const name = element('th', {scope: 'row'});
  body.append(element('tr', {}, name, ...cells));
  if (!details) {
    name.append(path, about);
    return body;
  }
  const button = element('button', {type: 'button', class: 'open', 'aria-expanded': 'false'}, path);
  let row = null;
  button.addEventListener('click', () => {
    // drawn when it is asked for: a network has hundreds of leaves
    if (row === null) {
      const cell = element('td', {colspan: String(cells.length + 1)}, ...details(leaf));
      row = element('tr', {class: 'details', hidden: ''}, cell);
      body.append(row);
    }
    row.hidden = !row.hidden;
    button.setAttribute('aria-expanded', String(!row.hidden));
  });
  name.append(button, about);
  return body;
}

const numberCell = (text, kind = '') => element('td', {class: `number ${kind}`}, text);

function barCell(text, share, title = '') {
  const filled = element('span', {});
  filled.style.width = percent(Math.min(Math.max(share, 0), 1)).replace(/\s/g, '');
  const bar = element('span', {class: 'bar', 'aria-hidden': 'true'}, filled);
  return element('td', title ? {class: 'number', title} : {class: 'number'}, text, bar);
}

/** A table whose first column is a heading of each row. */
function table(caption, columns, rows, kind) {
  const side = (column) =>
    kind === 'sizes' && column > 0 && columns[column] !== 'what it is' ? 'number' : '';
  const head = columns.map((name, i) => element('th', {scope: 'col', class: side(i)}, name));
  const body = rows.map(([first, ...rest]) =>
    element(
      'tr',
      {},
      element('th', {scope: 'row'}, first),
      ...rest.map((text, i) => element('td', {class: side(i + 1)}, text)),
    ),
  );
  const whole = element(
    'table',
    {class: kind},
    element('caption', {}, caption),
    element('thead', {}, element('tr', {}, ...head)),
    element('tbody', {}, ...body),
  );
  return scrolling(whole, caption);
}

/** A region that scrolls, by keyboard too, where a table is wider than the page. */
function scrolling(content, label) {
  return element(
    'div',
    {class: 'scrolling', tabindex: '0', role: 'region', 'aria-label': label},
    content,
  );
}

// ---- elements and texts

const byId = (id) => document.getElementById(id);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, text] of Object.entries(attributes)) {
    if (text || name === 'hidden') made.setAttribute(name, text);
  }
  made.append(...children);
  return made;
}

function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, text] of Object.entries(attributes)) made.setAttribute(name, text);
  return made;
}

const section = (title, ...content) => element('section', {}, element('h2', {}, title), ...content);

function disclosure(title, ...content) {
  return element('details', {}, element('summary', {}, title), ...content);
}

/** Text with characters that are not seen, or that turn the direction of others, as escapes. */
function visible(text) {
  return text.replace(/[\p{C}\u2028\u2029]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

/** Text that breaks between the parts of a path. */
function breakable(text) {
  const parts = text.split(/(?<=[/._])/);
  return parts.flatMap((part, i) => (i ? [element('wbr', {}), part] : [part]));
}

const compressed = ({leaves}) => leaves.filter(({codes}) => codes !== null);
const weightsOf = ({shape}) => shape.reduce((all, n) => all * n, 1);
const prunedOf = (leaf) => 1 - leaf.codes.survivors / (weightsOf(leaf) || 1);
const bitsOf = (leaf) => (8 * leaf.bytes) / (weightsOf(leaf) || 1);
const bitsText = (leaf, size) => ((8 * leaf.codes[size]) / (weightsOf(leaf) || 1)).toFixed(3);
const total = (leaves, size) => leaves.reduce((sum, leaf) => sum + size(leaf), 0);
const number = (value) => value.toLocaleString('en');
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const short = (value) => String(Number(value.toPrecision(4))).replace('-', '−');
const range = ([least, largest]) =>
  least === largest ? short(least) : `${short(least)} to ${short(largest)}`;
