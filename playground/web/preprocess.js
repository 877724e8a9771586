// The same pixels as in Python: pad to a square, resize, crop, normalise.
//
// Students are trained on Pillow's resized images. A browser's own resizing differs from them by dozens of grey levels at
// edges. So this is Pillow's algorithm: two passes of weighted sums with 22-bit weights, each rounded to 8 bits. The result
// equals Pillow's bit for bit.

const PRECISION_BITS = 22;

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Pillow's filter number -> its reach in pixels, and its weight as a function of distance.
const FILTERS = {
  1: [3, (x) => (x > -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [
    2, // bicubic, a = -0.5
    (x) => {
      const d = Math.abs(x);
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
    },
  ],
};

// For every output pixel of a line: the first input pixel, and the fixed-point weights from there.
function weightsOf(from, to, resample) {
  const [reach, filter] = FILTERS[resample];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = reach * stretch;
  return Array.from({ length: to }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = [];
    let total = 0;
    for (let x = first; x < last; x++) {
      weights.push(filter((x - center + 0.5) * (1 / stretch)));
      total += weights.at(-1);
    }
    const fixed = weights.map((w) => {
      const scaled = (total === 0 ? w : w / total) * 2 ** PRECISION_BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return [first, fixed];
  });
}

// One pass along lines. `step` is the distance between neighbours on a line, `next` that between lines, in bytes.
function pass(source, target, weights, lines, [sourceStep, sourceNext], [targetStep, targetNext]) {
  for (let line = 0; line < lines; line++) {
    for (let index = 0; index < weights.length; index++) {
      const [first, fixed] = weights[index];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (PRECISION_BITS - 1);
        let at = line * sourceNext + first * sourceStep + channel;
        for (let k = 0; k < fixed.length; k++, at += sourceStep) sum += source[at] * fixed[k];
        target[line * targetNext + index * targetStep + channel] = sum >> PRECISION_BITS; // clamped by the array
      }
    }
  }
}

/** Pillow's resize of an RGB image {data, width, height}. */
export function resize(image, width, height, resample) {
  if (!FILTERS[resample]) throw new Error(`Pillow's resize filter ${resample} is not supported here, only 1, 2 and 3.`);
  let { data, width: w, height: h } = image;
  if (w !== width) {
    const target = new Uint8ClampedArray(width * h * 3);
    pass(data, target, weightsOf(w, width, resample), h, [3, w * 3], [3, width * 3]);
    [data, w] = [target, width];
  }
  if (h !== height) {
    const target = new Uint8ClampedArray(width * height * 3);
    pass(data, target, weightsOf(h, height, resample), w, [w * 3, 3], [w * 3, 3]);
    [data, h] = [target, height];
  }
  return { data, width, height };
}

// A window of an image; where it extends beyond the image, it has one colour.
function window_(image, left, top, width, height, colour) {
  const data = new Uint8ClampedArray(width * height * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [sx, sy] = [x + left, y + top];
      const inside = sx >= 0 && sy >= 0 && sx < image.width && sy < image.height;
      for (let c = 0; c < 3; c++) {
        data[(y * width + x) * 3 + c] = inside ? image.data[(sy * image.width + sx) * 3 + c] : colour[c];
      }
    }
  }
  return { data, width, height };
}

/** RGBA bytes to RGB; transparency is dropped, as in Pillow. */
export function dropAlpha(rgba) {
  const data = new Uint8ClampedArray((rgba.length / 4) * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    data[j++] = rgba[i];
    data[j++] = rgba[i + 1];
    data[j++] = rgba[i + 2];
  }
  return data;
}

/**
 * Pixel values of an image.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGB, three bytes per pixel.
 * @param {object} processor `preprocessor_config.json`.
 * @param {string} aspect `square`, or `pad` (first padded to a square with the mean colour).
 * @returns {{data: Float32Array, dims: number[]}} [3, height, width].
 */
export function preprocess(image, processor, aspect) {
  const { size, image_mean: mean, image_std: std, rescale_factor: factor = 1 / 255 } = processor;
  if (processor.do_resize === false || processor.do_normalize === false || processor.do_rescale === false) {
    throw new Error('This student does not resize, rescale and normalise its images, but this page always does all three.');
  }
  if (aspect === 'pad' && image.width !== image.height) {
    const side = Math.max(image.width, image.height);
    const colour = mean.map((value) => Math.trunc(value * 255));
    const [left, top] = [Math.floor((side - image.width) / 2), Math.floor((side - image.height) / 2)];
    image = window_(image, -left, -top, side, side, colour);
  }
  let { width, height } = size;
  if (!width || !height) {
    const shortest = Math.min(image.width, image.height);
    width = Math.floor((image.width * size.shortest_edge) / shortest);
    height = Math.floor((image.height * size.shortest_edge) / shortest);
  }
  image = resize(image, width, height, processor.resample);
  if (processor.do_center_crop) {
    const crop = processor.crop_size;
    const [left, top] = [Math.floor((width - crop.width) / 2), Math.floor((height - crop.height) / 2)];
    image = window_(image, left, top, crop.width, crop.height, [0, 0, 0]);
  }
  const area = image.width * image.height;
  const values = new Float32Array(3 * area);
  for (let c = 0; c < 3; c++) {
    const table = Float32Array.from({ length: 256 }, (_, v) => (Math.fround(v * factor) - mean[c]) / std[c]);
    for (let i = 0; i < area; i++) values[c * area + i] = table[image.data[i * 3 + c]];
  }
  return { data: values, dims: [3, image.height, image.width] };
}
