// The page: image, questions, answers.

const $ = (id) => document.getElementById(id);
const NAMES = { fp32: '32 bits', fp16: '16 bits', int8: '8 bits', q4: '4 bits' };

let worker = null;
let picture = null; // a Blob
let history = [];
let open = null; // the answer in progress: {question, body, stats}
let busy = true;
let failed = false;

function say(text, isError = false) {
  $('status').textContent = text;
  $('status').classList.toggle('error', isError);
}

function enable() {
  $('ask').disabled = busy && !open;
  $('ask').textContent = open ? 'Stop' : 'Ask';
  for (const button of $('suggestions').children) button.disabled = busy;
}

// Images

// Upright, and with the file's own colours, as Python reads it.
const decode = (blob) =>
  createImageBitmap(blob, { imageOrientation: 'from-image', colorSpaceConversion: 'none', premultiplyAlpha: 'none' });

async function show(blob) {
  let bitmap;
  try {
    bitmap = await decode(blob);
  } catch {
    say('The browser cannot read this file as an image.', true);
    return;
  }
  [picture, history] = [blob, []];
  if (open) {
    open.stale = true; // its answer is about the picture before
    worker.postMessage({ kind: 'stop' });
  }
  $('turns').replaceChildren();
  const canvas = $('canvas');
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.classList.toggle('small', Math.max(bitmap.width, bitmap.height) < 200);
  canvas.getContext('2d').drawImage(bitmap, 0, 0);
  canvas.hidden = false;
  $('hint').hidden = true;
}

$('file').onchange = () => {
  const [file] = $('file').files;
  $('file').value = ''; // so that choosing the same image again also starts a new conversation
  if (file) show(file);
};
$('drop').ondragover = (event) => {
  event.preventDefault();
  $('drop').classList.add('over');
};
$('drop').ondragleave = () => $('drop').classList.remove('over');
$('drop').ondrop = (event) => {
  event.preventDefault();
  $('drop').classList.remove('over');
  if (event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
};
document.onpaste = (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
  if (file) show(file);
};

async function offerSamples() {
  const response = await fetch('models/samples.json').catch(() => null);
  if (!response?.ok) return;
  const { images = [], questions = [] } = await response.json();
  for (const name of images) {
    const button = document.createElement('button');
    const image = document.createElement('img');
    [image.src, image.alt] = [`models/${name}`, `Sample image ${name}`];
    button.append(image);
    button.onclick = async () => show(await (await fetch(image.src)).blob());
    $('samples').append(button);
  }
  for (const text of questions) {
    const button = document.createElement('button');
    [button.textContent, button.title] = [text.split('\n')[0], text];
    button.onclick = () => ask(text);
    $('suggestions').append(button);
  }
  if (images.length) await show(await (await fetch(`models/${images[0]}`)).blob());
  enable();
}

// Conversation

function turn(kind, text) {
  const item = document.createElement('li');
  item.className = kind;
  const body = document.createElement('span');
  body.textContent = text;
  item.append(body);
  $('turns').append(item);
  item.scrollIntoView({ block: 'nearest' });
  return { item, body };
}

async function ask(question) {
  if (busy || !question.trim()) return;
  busy = true;
  turn('question', question);
  const { item, body } = turn('answer', '');
  const stats = document.createElement('small');
  item.append(stats);
  open = { question, body, stats };
  enable();
  say('Looking …');
  const bitmap = picture ? await decode(picture) : null;
  const longest = Math.max(1, Number($('longest').value) || 128);
  worker.postMessage({ kind: 'ask', bitmap, question, history, maxNewTokens: longest }, bitmap ? [bitmap] : []);
}

$('form').onsubmit = (event) => {
  event.preventDefault();
  if (open) {
    worker.postMessage({ kind: 'stop' });
    return;
  }
  const question = $('question').value;
  $('question').value = '';
  ask(question);
};

const handlers = {
  progress({ loaded, total }) {
    if (failed) return; // other files may still arrive
    say(`Loading the student: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  },
  ready() {
    busy = false;
    say('Ready.');
    enable();
  },
  text({ text }) {
    if (open) open.body.textContent += text;
    say('Answering …');
  },
  answer({ text, tokens, first, rate }) {
    open.body.textContent = text;
    const speed = rate ? `, then ${rate.toFixed(1)} tokens/s` : '';
    open.stats.textContent = `${tokens} tokens, first after ${(first / 1000).toFixed(2)} s${speed}`;
    if (!open.stale) history.push([open.question, text]);
    [open, busy] = [null, false];
    say('Ready.');
    enable();
  },
  error({ message }) {
    if (open) open.body.textContent ||= '–';
    [open, busy, failed] = [null, false, true];
    say(message, true);
    enable();
  },
};

function start() {
  worker?.terminate();
  [busy, open, failed] = [true, null, false];
  enable();
  say('Loading …');
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => handlers[data.kind](data);
  worker.onerror = (event) => handlers.error({ message: event.message || 'The student could not be started.' });
  worker.postMessage({ kind: 'load', dtype: $('dtype').value, device: $('device').value });
}

async function main() {
  if ('serviceWorker' in navigator) {
    // All requests go through it from the start, so that everything is available offline.
    await navigator.serviceWorker.register('sw.js', { type: 'module' }).catch(() => null);
    if (!navigator.serviceWorker.controller) {
      const controlled = new Promise((done) => navigator.serviceWorker.addEventListener('controllerchange', done));
      await Promise.race([controlled, new Promise((done) => setTimeout(done, 3000))]);
    }
  }
  const response = await fetch('models/student/config.json').catch(() => null);
  if (!response?.ok) {
    say('There is no student in models/student: run bash scripts/web_demo.sh.', true);
    return;
  }
  const config = await response.json();
  $('about').textContent =
    `${config.vision_config.model_type.split('_')[0]} + ${config.tinyllava.connector_type} + ` +
    `${config.text_config.model_type}. It runs entirely on this device: no image or question leaves it.`;
  const add = (id, value, text) => $(id).add(new Option(text, value));
  for (const dtype of config.tinyllava.dtypes) add('dtype', dtype, NAMES[dtype]);
  add('device', 'wasm', 'processor');
  if (navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) add('device', 'webgpu', 'graphics (WebGPU)');
  $('dtype').onchange = $('device').onchange = start;
  await offerSamples();
  start();
}

main();
