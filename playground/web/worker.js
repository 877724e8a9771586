// Runs the student in a separate thread, so that the page stays responsive.

import * as library from './vendor/transformers.min.js';
import { dropAlpha } from './preprocess.js';
import { Student } from './student.js';

const here = (path) => new URL(path, self.location.href).href;
library.env.allowRemoteModels = false;
library.env.allowLocalModels = true;
library.env.localModelPath = new URL(here('models/')).pathname; // the library accepts only paths here
library.env.useBrowserCache = false; // sw.js caches everything
library.env.useWasmCache = false;
library.env.backends.onnx.wasm.wasmPaths = {
  mjs: here('vendor/ort-wasm-simd-threaded.asyncify.mjs'),
  wasm: here('vendor/ort-wasm-simd-threaded.asyncify.wasm'),
};
if (!self.crossOriginIsolated) library.env.backends.onnx.wasm.numThreads = 1;

let student = null;
let stop = null;

async function load({ dtype, device }) {
  const files = {};
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status !== 'progress') return;
    files[file] = [loaded, total];
    const sums = Object.values(files).reduce((all, one) => [all[0] + one[0], all[1] + one[1]], [0, 0]);
    self.postMessage({ kind: 'progress', loaded: sums[0], total: sums[1] });
  };
  const processor = await (await fetch(here('models/student/preprocessor_config.json'))).json();
  student = await Student.load(library, 'student', processor, { dtype, device, progress_callback });
  self.postMessage({ kind: 'ready' });
}

async function answer({ bitmap, question, history, maxNewTokens }) {
  let image = null;
  if (bitmap) {
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    image = { data: dropAlpha(context.getImageData(0, 0, width, height).data), width, height };
  }
  stop = new library.InterruptableStoppingCriteria();
  const onText = (text) => self.postMessage({ kind: 'text', text });
  const found = await student.answer(question, image, { maxNewTokens, history, onText, stop });
  self.postMessage({ kind: 'answer', ...found });
}

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === 'load') await load(data);
    else if (data.kind === 'ask') await answer(data);
    else if (data.kind === 'stop') stop?.interrupt();
  } catch (error) {
    self.postMessage({ kind: 'error', message: error?.message ?? String(error) });
  }
};
