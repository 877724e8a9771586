// An exported student in transformers.js; the page and Node use the same code.

import { preprocess } from './preprocess.js';

/** Typed text, in which `<image>` would be a placeholder. */
const asText = (text) => text.replaceAll('<image>', '< image>');

export class Student {
  constructor(library, model, tokenizer, processor) {
    Object.assign(this, { library, model, tokenizer, processor });
    this.settings = model.config.tinyllava;
    this.count = model.config.image_seq_length;
  }

  /**
   * @param {object} library the module `@huggingface/transformers`.
   * @param {string} name the model's folder in `env.localModelPath`.
   * @param {object} processor its `preprocessor_config.json`.
   * @param {object} options dtype (fp32, fp16, int8, q4), device (wasm, webgpu, cpu), progress_callback.
   */
  static async load(library, name, processor, options) {
    const [model, tokenizer] = await Promise.all([
      library.LlavaForConditionalGeneration.from_pretrained(name, options),
      library.AutoTokenizer.from_pretrained(name),
    ]);
    return new Student(library, model, tokenizer, processor);
  }

  /** The prompt's text from the chat template, with `<image>` repeated for each visual token. */
  prompt(question, withImage, history = []) {
    const messages = [];
    [...history, [question, null]].forEach(([asked, answer], index) => {
      const marked = index === 0 && withImage;
      const content = marked ? `<image>\n${asked.replaceAll('<image>', '').trim()}` : asText(asked);
      messages.push({ role: 'user', content });
      if (answer !== null) messages.push({ role: 'assistant', content: asText(answer) });
    });
    const text = this.tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
    return text.replaceAll('<image>', '<image>'.repeat(this.count));
  }

  /**
   * A greedy answer.
   *
   * @param {string} question
   * @param {?{data: Uint8ClampedArray, width: number, height: number}} image RGB.
   * @param {object} options maxNewTokens; history, pairs of question and answer; onText, called with each new piece;
   *   stop, an InterruptableStoppingCriteria.
   * @returns {Promise<{text: string, tokens: number, first: number, rate: number}>} the answer, its tokens, milliseconds
   *   to the first one, and tokens per second after it.
   */
  async answer(question, image, { maxNewTokens = 128, history = [], onText = () => {}, stop = null } = {}) {
    const { Tensor, TextStreamer } = this.library;
    const started = performance.now();
    const inputs = this.tokenizer(this.prompt(question, Boolean(image), history), { add_special_tokens: false });
    if (image) {
      const { data, dims } = preprocess(image, this.processor, this.settings.image_aspect_ratio);
      inputs.pixel_values = new Tensor('float32', data, [1, ...dims]);
    }
    const times = [];
    const streamer = new TextStreamer(this.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: onText,
      token_callback_function: () => times.push(performance.now()),
    });
    const ids = await this.model.generate({
      ...inputs,
      max_new_tokens: maxNewTokens,
      do_sample: false,
      streamer,
      ...(stop ? { stopping_criteria: stop } : {}),
    });
    const fresh = ids.slice(null, [inputs.input_ids.dims[1], null]);
    const text = this.tokenizer.batch_decode(fresh, { skip_special_tokens: true })[0].trim();
    const seconds = (times.at(-1) - times[0]) / 1000;
    return { text, tokens: times.length, first: times[0] - started, rate: times.length > 1 ? (times.length - 1) / seconds : 0 };
  }
}
