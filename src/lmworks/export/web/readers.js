// What each task makes of its input: the windows that the model reads, and the answer from their numbers.
//
// A reader is made for one model and one set of options, which have the names and defaults of Python's (src/lmworks/tasks):
// `encode(input)` -> features { tokens, … } or { pixels }, in order; `decode(features, outputs, input)` -> the answer;
// `record(feature, output)` -> the numbers that a self-test compares.

const version = new URL(import.meta.url).search;
const { InputError } = await import(`./encoding.js${version}`);
const { bestTokens, chooseScores, findAnswers, pool, rank, toLength1, toRows, toScores } = await import(`./answers.js${version}`);
const { findEntities, kindOf, readTokens, tag } = await import(`./entities.js${version}`);
const { prepare, readPicture } = await import(`./pictures.js${version}`);

const OVERLAP = 128;
const SPELLINGS = ["[MASK]", "<mask>", "<|mask|>", "[mask]", "<MASK>", "___"]; // what people write for a mask
const CHOICES = {
  long: ["error", "truncate", "window"],
  scores: ["auto", "softmax", "sigmoid", "none"],
  aggregation: ["none", "simple", "first", "average", "max", "tokens"],
  words: ["auto", "tokenizer", "spaces"],
  pooling: ["auto", "mean", "cls", "max", "last", "none"],
};
const NUMBERS = { top_k: 1, max_answer_length: 1, max_length: 1, overlap: 0 }; // the least of each

// Options with the defaults filled in; an InputError for one that the task does not have, or a value that makes no sense.
function readOptions(given, defaults) {
  const options = { ...defaults };
  for (const [name, value] of Object.entries(given ?? {})) {
    if (!(name in defaults)) throw new InputError(`There is no option ${name} here: ${Object.keys(defaults).join(", ")}.`);
    if (CHOICES[name] && !CHOICES[name].includes(value)) throw new InputError(`${name} must be one of ${CHOICES[name].join(", ")}, not ${value}.`);
    if (name in NUMBERS && value !== null && !(Number.isInteger(value) && value >= NUMBERS[name])) {
      throw new InputError(`${name} must be a whole number from ${NUMBERS[name]} up, not ${value}.`);
    }
    options[name] = value ?? defaults[name];
  }
  return options;
}

function textOf(input, key = "text") {
  if (typeof input?.[key] !== "string") throw new InputError(`The input has no ${key}.`);
  return input[key];
}

function tooLong(tokens, most) {
  const found = `${tokens} tokens, special ones included; it reads ${most}`;
  return new InputError(`This text is longer than the model: ${found}. Shorten it, or choose truncate or window.`);
}

function usualOverlap(overlap, length) {
  return overlap ?? Math.min(OVERLAP, Math.floor(length / 4));
}

function classifyText({ encoder, facts }, given) {
  const options = readOptions(given, { top_k: null, scores: "auto", long: "error", overlap: null });
  const length = facts.length;

  function cut(text, pair) {
    const parts = [text, ...(pair === null ? [] : [pair])].map((part) => encoder.bare(part));
    const room = Math.max(0, length - encoder.countSpecials(parts.length === 2));
    const [short, long] = parts.length === 1 ? [0] : parts[0].length <= parts[1].length ? [0, 1] : [1, 0]; // the longer gives way
    parts[short] = parts[short].slice(0, long === undefined ? room : Math.min(parts[short].length, room >> 1));
    if (long !== undefined) parts[long] = parts[long].slice(0, room - parts[short].length);
    return { tokens: encoder.join(parts[0], parts[1] ?? null) };
  }

  function windows(text, pair, whole) {
    const own = pair === null ? 0 : 1;
    const count = (tokens) => tokens.filter((token) => token.sequence === own).length;
    const room = length - whole.length + count(whole);
    const overlap = options.overlap ?? Math.min(usualOverlap(null, length), Math.max(0, room) >> 1);
    const parts = pair === null ? encoder.windows(text, { length, overlap }) : encoder.windows(pair, { before: text, length, overlap });
    return parts.map((tokens, i) => ({ tokens, weight: count(tokens) - (i ? overlap : 0) }));
  }

  return {
    encode(input) {
      const [text, pair] = [textOf(input), input.pair == null ? null : textOf(input, "pair")];
      const whole = encoder.encode(text, pair);
      if (!whole.length) throw new InputError("The text is empty, and this model reads no special tokens.");
      if (whole.length <= length) return [{ tokens: whole }];
      if (options.long === "error") throw tooLong(whole.length, length);
      return options.long === "truncate" ? [cut(text, pair)] : windows(text, pair, whole);
    },
    decode(features, outputs) {
      const sum = facts.labels.map(() => 0);
      let weights = 0;
      features.forEach(({ weight = 1 }, i) => {
        toScores(toRows(outputs[i])[0], facts, options.scores).forEach((score, label) => (sum[label] += weight * score));
        weights += weight;
      });
      return rank(sum.map((total) => total / weights), facts.labels, options.top_k);
    },
    kind: chooseScores(options.scores, facts),
  };
}

function classifyImage({ facts, steps, library }, given) {
  const options = readOptions(given, { top_k: null, scores: "auto" });
  return {
    async encode(input) {
      return [{ pixels: prepare(await readPicture(input?.image, library), steps) }];
    },
    decode: (_, outputs) => rank(toScores(toRows(outputs[0])[0], facts, options.scores), facts.labels, options.top_k),
    kind: chooseScores(options.scores, facts),
  };
}

function findNames({ encoder, facts }, given) {
  const options = readOptions(given, { aggregation: "none", ignore_labels: null, words: "auto", long: "error", overlap: null });
  const known = new Set([...facts.labels, ...facts.labels.map(kindOf)]);
  const unknown = (options.ignore_labels ?? []).find((label) => !known.has(label));
  if (unknown !== undefined) throw new InputError(`The model has no label ${unknown}.`);
  const marked = Boolean(encoder.json.model.continuing_subword_prefix);
  const entities = {
    aggregation: options.aggregation,
    ignored: new Set(options.ignore_labels ?? ["O"]),
    words: options.words === "auto" ? (marked ? "tokenizer" : "spaces") : options.words,
    unknown: encoder.unknown,
    write: encoder.write,
  };
  const overlap = usualOverlap(options.overlap, facts.length);
  return {
    encode(input) {
      const text = textOf(input);
      let parts = [encoder.encode(text)];
      if (parts[0].length > facts.length) {
        if (options.long === "error") throw tooLong(parts[0].length, facts.length);
        parts = encoder.windows(text, { length: facts.length, overlap: options.long === "window" ? overlap : 0 });
        if (options.long === "truncate") parts.length = 1;
      }
      const step = parts[0].filter((token) => !token.special).length - overlap;
      const features = parts.map((tokens, i) => ({ tokens, start: i * step, first: i === 0, last: i === parts.length - 1 }));
      return features.filter(({ tokens }) => tokens.length);
    },
    decode(features, outputs, input) {
      if (!features.length) return [];
      const tokens = readTokens(features.map((feature, i) => ({ ...feature, rows: toRows(outputs[i]) })));
      if (options.aggregation === "tokens") return tokens.map((token) => tag(token, facts.labels));
      return findEntities(tokens, input.text, facts.labels, entities);
    },
  };
}

function answerQuestion({ encoder, facts }, given) {
  const options = readOptions(given, {
    top_k: 1, max_answer_length: 15, max_length: null, overlap: null, no_answer: false, align_to_words: true,
  });
  const length = options.max_length ?? Math.min(384, facts.length);
  const clsId = encoder.find("cls_token", "[CLS]");
  if (length > facts.length) throw new InputError(`max_length is longer than the model: ${length} of ${facts.length} tokens.`);
  if (options.no_answer && clsId === null) throw new InputError("This model cannot say that there is no answer.");
  const settings = {
    topK: options.top_k,
    most: options.max_answer_length,
    noAnswer: options.no_answer,
    align: options.align_to_words && Boolean(encoder.json.pre_tokenizer),
    clsId: clsId ?? -1,
  };
  return {
    encode(input) {
      const [question, context] = [textOf(input, "question"), textOf(input, "context")];
      for (const [name, text] of Object.entries({ question, context })) if (!text.trim()) throw new InputError(`The ${name} is empty.`);
      let { overlap } = options;
      if (overlap === null) {
        const room = length - encoder.countSpecials(true) - encoder.ids(question).length;
        const usual = Math.min(OVERLAP, length >> 1);
        overlap = usual < room ? usual : Math.max(room >> 1, 0); // a long question leaves less to share
      }
      const windows = encoder.windows(context, { before: question, length, overlap });
      if (!windows[0].some((token) => token.sequence === 1)) throw new InputError("The context has no tokens.");
      return windows.map((tokens) => ({ tokens }));
    },
    decode(features, outputs, { context }) {
      const windows = features.map(({ tokens }, i) => ({ tokens, rows: toRows(outputs[i]) }));
      const answers = findAnswers(windows, context, settings);
      return options.top_k > 1 ? answers : answers[0];
    },
  };
}

function fillMask({ encoder, facts }, given) {
  const options = readOptions(given, { top_k: 5, targets: null, long: "error" });
  const maskId = encoder.find("mask_token", "[MASK]") ?? encoder.idOf("<mask>");
  if (maskId === null) throw new InputError("This model's tokenizer has no mask token.");
  const mask = encoder.spell(maskId);
  const targets = options.targets === null ? null : findTargets(encoder, [options.targets].flat());
  const topK = Math.min(options.top_k, targets ? targets.length : encoder.size);
  const padId = encoder.find("pad_token");

  function cut(whole, kept, masks) {
    const rows = masks.map((place) => kept.indexOf(place));
    if (rows.includes(-1)) throw new InputError("A mask is in the part that would be cut off: choose window.");
    const tokens = kept.map((place) => whole[place]);
    const truncated = options.long === "truncate";
    return { tokens, rows, shown: (truncated ? tokens : whole).map((token) => token.id), places: truncated ? rows : masks };
  }

  // The places of as many tokens as the model reads: some around a centre, and the special ones.
  function around(whole, centre) {
    const text = whole.map((_, i) => i).filter((i) => whole[i].sequence !== null);
    const [first, after] = [text[0], text.at(-1) + 1];
    const room = facts.length - first - (whole.length - after);
    const start = Math.min(Math.max(centre - (room >> 1), first), after - room);
    return whole.map((_, i) => i).filter((i) => i < first || i >= after || (i >= start && i < start + room));
  }

  function fill(ids, place, [token, score], alone) {
    const filled = ids.with?.(place, token) ?? [...ids.slice(0, place), token, ...ids.slice(place + 1)];
    const sequence = encoder.decode(filled.filter((id) => id !== padId), { skip: alone });
    return { token_str: encoder.decode([token], { skip: false }), token, score, sequence };
  }

  return {
    encode(input) {
      const text = textOf(input);
      const whole = encoder.encode(text);
      const places = whole.map((_, i) => i);
      const masks = places.filter((i) => whole[i].id === maskId);
      if (!masks.length) {
        const other = SPELLINGS.find((spelling) => text.includes(spelling));
        throw new InputError(`The text has no mask: write ${mask} where a word is to be filled in${other ? `, not ${other}` : ""}.`);
      }
      if (whole.length <= facts.length) return [cut(whole, places, masks)];
      if (options.long === "error") throw tooLong(whole.length, facts.length);
      if (options.long === "truncate") return [cut(whole, around(whole, 0), masks)];
      return masks.map((place) => cut(whole, around(whole, place), [place]));
    },
    decode(features, outputs) {
      const found = features.flatMap(({ rows, shown, places }, i) => {
        const logits = toRows(outputs[i]);
        return rows.map((row, k) => [shown, places[k], bestTokens(logits[row], topK, targets)]);
      });
      const fills = found.map(([ids, place, best]) => best.map((one) => fill(ids, place, one, found.length === 1)));
      return fills.length === 1 ? fills[0] : fills;
    },
    record({ rows }, output) {
      const logits = toRows(output);
      return Float32Array.from(rows.flatMap((row) => Array.from(logits[row])));
    },
    mask,
  };
}

// The ids of words that are one token each, in order, each once.
function findTargets(encoder, words) {
  const found = words.map((word) => {
    const own = encoder.idOf(word);
    const ids = own === null ? encoder.ids(word) : [own];
    if (ids.length === 1 && (own !== null || ids[0] !== encoder.unknown)) return ids[0];
    throw new InputError(`${JSON.stringify(word)} is not one token of this model.`);
  });
  if (!found.length) throw new InputError("There are no targets.");
  return [...new Set(found)];
}

const PLAIN = { pooling: "mean", normalize: false, length: null, lowerCase: false, prompt: "" };

function embed({ encoder, facts, recipe: stated }, given) {
  const options = readOptions(given, { pooling: "auto", normalize: null, long: "error" });
  const recipe = options.pooling === "auto" ? stated : PLAIN; // whoever chooses a pooling leaves the published recipe
  if (recipe.problem) throw new InputError(recipe.problem);
  const pooling = options.pooling === "auto" ? recipe.pooling : options.pooling;
  const normalize = options.normalize ?? (recipe.normalize && pooling === recipe.pooling);
  const length = Math.min(facts.length, recipe.length ?? facts.length);
  if (options.long === "window" && !["mean", "max"].includes(pooling)) {
    throw new InputError(`The pooling ${pooling} does not work over windows: choose truncate, or the pooling mean.`);
  }
  const finish = (vector) => (normalize ? toLength1(vector) : Array.from(vector, Math.fround));
  return {
    encode(input) {
      if (!Array.isArray(input?.texts)) throw new InputError("The input has no texts.");
      return input.texts.flatMap((one, example) => {
        if (typeof one !== "string") throw new InputError(`Text ${example + 1} is no text.`);
        const text = recipe.lowerCase ? (recipe.prompt + one).toLowerCase() : recipe.prompt + one;
        let windows = [encoder.encode(text)];
        if (!windows[0].length) throw new InputError(`Text ${example + 1} has no tokens.`);
        if (windows[0].length > length) {
          if (options.long === "error") throw tooLong(windows[0].length, length);
          windows = encoder.windows(text, { length, overlap: 0 });
          if (options.long === "truncate") windows.length = 1;
        }
        return windows.map((tokens) => ({ tokens, example }));
      });
    },
    decode(features, outputs, { texts }) {
      const windows = texts.map(() => []);
      features.forEach(({ example }, i) => windows[example].push(toRows(outputs[i])));
      if (pooling === "none") return { embeddings: windows.map((rows) => rows.flat().map(finish)) };
      return { embeddings: windows.map((rows) => finish(pool(rows, pooling))) };
    },
  };
}

export const READERS = {
  "text-classification": classifyText,
  "image-classification": classifyImage,
  "token-classification": findNames,
  "question-answering": answerQuestion,
  "fill-mask": fillMask,
  "feature-extraction": embed,
};
