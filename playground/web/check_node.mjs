// The student's answers in Node, as JSON lines: node check_node.mjs MODEL_FOLDER QUESTIONS.jsonl IMAGE_FOLDER [DTYPE]
//
// Each line is {image, text, answer, pixels: sum of all pixel values, first: milliseconds to the first token, rate: tokens
// per second}. tests/model/test_export_web.py compares them with Python's.

import { readFileSync } from 'node:fs';
import path from 'node:path';
import * as library from '@huggingface/transformers';
import { preprocess } from './preprocess.js';
import { Student } from './student.js';

const [folder, questions, images, dtype = 'fp32', maxNewTokens = '32'] = process.argv.slice(2);
library.env.allowRemoteModels = false;
library.env.localModelPath = path.resolve(folder, '..') + path.sep;
const processor = JSON.parse(readFileSync(path.join(folder, 'preprocessor_config.json'), 'utf-8'));
const student = await Student.load(library, path.basename(folder), processor, { dtype, device: 'cpu' });
for (const line of readFileSync(questions, 'utf-8').split('\n').filter(Boolean)) {
  const { image: name, text } = JSON.parse(line);
  const raw = (await library.RawImage.read(path.join(images, name))).rgb();
  const image = { data: raw.data, width: raw.width, height: raw.height };
  const pixels = preprocess(image, processor, student.settings.image_aspect_ratio);
  const found = await student.answer(text, image, { maxNewTokens: Number(maxNewTokens) });
  const sum = pixels.data.reduce((total, value) => total + value, 0);
  console.log(JSON.stringify({ image: name, text, answer: found.text, pixels: sum, first: found.first, rate: found.rate }));
}
