// Loads the program and the compressed weights of a network, and runs it on pictures.

import {openOpq} from './opq.mjs';
import * as ort from './runtime/ort.wasm.min.mjs';
import {prepared, standardised, withoutAlpha} from './pictures.mjs';

const SHOWN = 5; // classes
const RUNTIME = 'ort-wasm-simd-threaded';

const element = (id) => document.getElementById(id);
const seconds = new Map();
let network = null;
let isBusy = false;

start();

async function start() {
  try {
    network = await loaded();
  } catch (error) {
    fail(error);
    return;
  }
  element('about').textContent =
    `${network.title}: its weights are decoded from ${bytes(network.sizes.weights)} bytes, ` +
    `${(network.floatBytes / network.sizes.weights).toFixed(1)} times fewer than as floats, and ` +
    'run by onnxruntime-web.';
  showBytes();
  showSeconds();
  element('picture').disabled = false;
  say('Ready: choose a picture.');
  const chosen = () => {
    const [file] = element('picture').files;
    if (file) classify(file);
  };
  element('picture').addEventListener('change', chosen);
  // one that was chosen before the network was there
  chosen();
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('dragging');
  });
  document.addEventListener('dragleave', (event) => {
    if (event.relatedTarget === null) document.body.classList.remove('dragging');
  });
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dragging');
    const [file] = event.dataTransfer.files;
    if (file) classify(file);
  });
  document.body.dataset.ready = 'true';
}

/** Returns the network: session, what the page says of it, and sizes. */
async function loaded() {
  say('Downloading …');
  const [described, weights, program, runtime] = await timed('download', () =>
    Promise.all([
      fetched('network.json').then((data) => ({
        ...JSON.parse(new TextDecoder().decode(data)),
        bytes: data.length,
      })),
      fetched('network.opq'),
      fetched('network.onnx'),
      fetched(`runtime/${RUNTIME}.wasm`),
    ]),
  );
  say('Decoding the weights …');
  await drawn();
  let floatBytes = 0;
  const externalData = await timed('decode the weights', () => {
    const file = openOpq(weights);
    return file.names.map((name) => {
      // of floats of 16 bits too: the program reads each leaf in its own dtype
      const {buffer, byteOffset, byteLength} = file.leaf(name).values;
      floatBytes += byteLength;
      return {path: name, data: new Uint8Array(buffer, byteOffset, byteLength)};
    });
  });
  say('Opening the network …');
  await drawn();
  ort.env.wasm.wasmBinary = runtime;
  ort.env.wasm.numThreads = 1; // more need headers that few servers send
  const session = await timed('open the network', () =>
    ort.InferenceSession.create(program, {externalData, executionProviders: ['wasm']}),
  );
  const sizes = {
    weights: weights.length,
    program: program.length,
    runtime: runtime.length + described.runtimeScripts,
    page: described.page + described.bytes,
  };
  return {...described, session, sizes, floatBytes};
}

async function fetched(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: found status ${response.status}, expected 200`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Shows the classes of a picture. */
async function classify(file) {
  if (isBusy) return;
  isBusy = true;
  element('alert').textContent = '';
  document.body.dataset.shown = '';
  say(`Looking at ${file.name} …`);
  await drawn();
  try {
    const seen = await timed('prepare the picture', async () =>
      prepared(await pixelsOf(file), network.preprocessing),
    );
    const input = standardised(seen.pixels, network.preprocessing);
    const logits = await timed('run the network', async () => {
      const tensor = new ort.Tensor('float32', input, [1, seen.height, seen.width, 3]);
      const [inputName] = network.session.inputNames;
      const outputs = await network.session.run({[inputName]: tensor});
      return outputs[network.session.outputNames[0]].data;
    });
    show(seen, logits);
    showSeconds();
    say(`${file.name}: ${element('classes').querySelector('th').textContent}`);
    // for programs that drive the page
    window.answer = {name: file.name, logits: [...logits], pixels: [...seen.pixels]};
    document.body.dataset.shown = file.name;
  } catch (error) {
    fail(error);
  }
  isBusy = false;
}

/** Returns the pixels of a picture file: {pixels, width, height}, RGB. */
async function pixelsOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {premultiplyAlpha: 'none'});
  } catch {
    throw new Error(`${file.name}: found no picture that this browser reads`);
  }
  const {width, height} = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return {pixels: withoutAlpha(context.getImageData(0, 0, width, height).data), width, height};
}

function show({pixels, width, height}, logits) {
  const canvas = element('seen');
  [canvas.width, canvas.height] = [width, height];
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    image.data.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
  const largest = logits.reduce((most, one) => Math.max(most, one));
  const exponentials = Array.from(logits, (one) => Math.exp(one - largest));
  const total = exponentials.reduce((sum, one) => sum + one);
  const order = [...logits.keys()].sort((one, other) => logits[other] - logits[one]);
  const rows = order.slice(0, SHOWN).map((label) => {
    const probability = exponentials[label] / total;
    const name = network.classes[label] ?? `class ${label}`;
    const made = row([name, `${(100 * probability).toFixed(1)} %`]);
    made.firstChild.append(bar(probability));
    return made;
  });
  element('classes').replaceChildren(...rows);
  element('answer').hidden = false;
}

function bar(share) {
  const space = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(space, 'svg');
  svg.setAttribute('aria-hidden', 'true');
  const rectangle = document.createElementNS(space, 'rect');
  rectangle.setAttribute('width', `${100 * share}%`);
  rectangle.setAttribute('height', '100%');
  svg.append(rectangle);
  return svg;
}

function showBytes() {
  const {sizes, floatBytes} = network;
  const rows = [
    ['weights', sizes.weights, floatBytes],
    ['program: the operations', sizes.program, sizes.program],
    ['page and decoder of weights', sizes.page, sizes.page - network.decoder],
  ];
  const sum = (column) => rows.reduce((total, one) => total + one[column], 0);
  const network_ = row(['the network', bytes(sum(1)), bytes(sum(2))]);
  const all = [sum(1) + sizes.runtime, sum(2) + sizes.runtime];
  const total = row(['together', ...all.map(bytes)]);
  network_.className = total.className = 'total';
  element('bytes').replaceChildren(
    ...rows.map(([name, ...numbers]) => row([name, ...numbers.map(bytes)])),
    network_,
    row(['onnxruntime-web, for any network', bytes(sizes.runtime), bytes(sizes.runtime)]),
    total,
  );
  element('costs').hidden = false;
}

function showSeconds() {
  const rows = [...seconds].map(([name, time]) => row([name, time.toFixed(3)]));
  element('seconds').replaceChildren(...rows);
}

/** Returns a row of a table: its head, and numbers. */
function row([head, ...numbers]) {
  const made = document.createElement('tr');
  const first = document.createElement('th');
  first.scope = 'row';
  first.textContent = head;
  made.append(first);
  for (const number of numbers) {
    const cell = document.createElement('td');
    cell.className = 'number';
    cell.textContent = number;
    made.append(cell);
  }
  return made;
}

async function timed(name, work) {
  const begin = performance.now();
  const result = await work();
  seconds.set(name, (performance.now() - begin) / 1000);
  return result;
}

/** Waits until the page has been drawn, so that what it says is seen. */
function drawn() {
  return new Promise((resolve) => {
    setTimeout(resolve, 20);
  });
}

function say(text) {
  element('status').textContent = text;
}

function fail(error) {
  say('');
  element('alert').textContent = error.message;
  throw error;
}

function bytes(number) {
  return number.toLocaleString('en');
}
