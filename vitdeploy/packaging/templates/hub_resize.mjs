// Resizes images for transformers.js as Pillow does for Python: the filter is as wide as the image gets smaller, so
// that every pixel counts, rows first, columns then, rounded to whole levels after each.
//
//     processor.image_processor.resize = resize;
//
// transformers.js itself looks at the nearest pixels only, however much smaller the image gets.

import { RawImage } from '@huggingface/transformers';

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// By Pillow's number of the filter, which is `resample` in preprocessor_config.json: how far it reaches, and its shape.
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, (x) => cubic(Math.abs(x))], // bicubic
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)], // box
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)], // Hamming
};

// Keys 1981, with the slope -0.5 at 1.
function cubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

const UNIT = 2 ** 22; // of weights, as whole numbers

// For each pixel of the result: the first pixel that it is made of, and the weights from there on.
function weightsOf(before, after, [reach, shape]) {
  const scale = before / after;
  const width = Math.max(scale, 1);
  return Array.from({ length: after }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * width + 0.5));
    const end = Math.min(before, Math.trunc(centre + reach * width + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => shape((first + i - centre + 0.5) / width));
    const sum = weights.reduce((a, b) => a + b, 0);
    // Halves away from zero.
    return [first, weights.map((w) => Math.sign(w) * Math.floor(Math.abs(w / sum) * UNIT + 0.5))];
  });
}

// One axis: `rows` lines of `before` pixels to lines of `after`; steps are between lines and between pixels.
function along(data, out, rows, channels, weights, rowStep, step, outRowStep, outStep) {
  for (let row = 0; row < rows; ++row) {
    weights.forEach(([first, kernel], place) => {
      for (let channel = 0; channel < channels; ++channel) {
        let sum = UNIT / 2;
        kernel.forEach((weight, i) => {
          sum += weight * data[row * rowStep + (first + i) * step + channel];
        });
        out[row * outRowStep + place * outStep + channel] = Math.min(255, Math.max(0, Math.floor(sum / UNIT)));
      }
    });
  }
}

// Takes the place of an image processor's method of this name; returns a new image.
export async function resize(image) {
  const [width, height] = this.get_resize_output_image_size(image, this.size);
  const filter = FILTERS[this.resample];
  if (!filter) return image.resize(width, height, { resample: this.resample });
  const { channels } = image;
  let { data } = image;
  if (width !== image.width) {
    const out = new Uint8ClampedArray(width * image.height * channels);
    const weights = weightsOf(image.width, width, filter);
    along(data, out, image.height, channels, weights, image.width * channels, channels, width * channels, channels);
    data = out;
  }
  if (height !== image.height) {
    const out = new Uint8ClampedArray(width * height * channels);
    const weights = weightsOf(image.height, height, filter);
    along(data, out, width, channels, weights, channels, width * channels, channels, width * channels);
    data = out;
  }
  return new RawImage(data, width, height, channels);
}
