// How a tokenizer rewrites a text before it cuts it (Unicode forms, case, accents), and which characters of the text
// each rewritten one stands for.
//
// A Run is a piece of text: chars[i] is a code point, text[from[i]:to[i]] in code points is what it was made of. The
// rules are those of Hugging Face's Rust tokenizers, which Python uses; the JavaScript library's own keep no places,
// and differ where they lower-case a whole text (a final sigma), meet characters beyond U+FFFF, or guess at
// SentencePiece's table.

const version = new URL(import.meta.url).search;
const { readTable, rewrite } = await import(`./precompiled.js${version}`);

export class Run {
  constructor(chars, from, to) {
    this.chars = chars;
    this.from = from;
    this.to = to;
  }

  // The run of a whole text: half of a surrogate pair counts as U+FFFD.
  static of(text) {
    const chars = Array.from(text.toWellFormed?.() ?? text.replace(/\p{Surrogate}/gu, "\ufffd"));
    return new Run(chars, chars.map((_, i) => i), chars.map((_, i) => i + 1));
  }

  get length() {
    return this.chars.length;
  }

  get text() {
    return this.chars.join("");
  }

  slice(start, end) {
    return new Run(this.chars.slice(start, end), this.from.slice(start, end), this.to.slice(start, end));
  }

  // Each character becomes those of rewrite(char, i); all of them stand for what it stood for.
  map(rewrite) {
    const made = new Run([], [], []);
    this.chars.forEach((char, i) => {
      for (const one of rewrite(char, i)) made.push(one, this.from[i], this.to[i]);
    });
    return made;
  }

  // Put characters before the first; they stand for what it stands for.
  prepend(text) {
    const first = Array.from(text);
    if (!this.length) return this;
    const repeat = (places) => [...first.map(() => places[0]), ...places];
    return new Run([...first, ...this.chars], repeat(this.from), repeat(this.to));
  }

  push(char, from, to) {
    this.chars.push(char);
    this.from.push(from);
    this.to.push(to);
  }

  // Where a pattern is found: [start, end] in characters of the run. A pattern is a RegExp with the flags "gu".
  find(pattern) {
    const text = this.text;
    const places = new Map(); // place in UTF-16 -> place in code points
    let at = 0;
    this.chars.forEach((char, i) => {
      places.set(at, i);
      at += char.length;
    });
    places.set(at, this.length);
    const found = [];
    for (const match of text.matchAll(pattern)) {
      found.push([places.get(match.index), places.get(match.index + match[0].length)]);
    }
    return found;
  }
}

const CJK = [[0x3400, 0x4dbf], [0x4e00, 0x9fff], [0xf900, 0xfaff], [0x20000, 0x2a6df], [0x2a700, 0x2b81f], [0x2b920, 0x2ceaf], [0x2f800, 0x2fa1f]];
const SPACE = /[\t\n\r\p{White_Space}]/u;
const REMOVED = /[\0\ufffd\p{Co}]|(?![\t\n\r])\p{Cc}|(?![\u0890\u0891\u08e2\u{110cd}\u{13430}-\u{13438}])\p{Cf}/u;
const NONSPACING = /\p{Mn}/u;
const COMBINING = /\p{M}/u;

// Return the function that rewrites a run as tokenizer.json's `normalizer` says; `own` is the library's object for it,
// which knows how a pattern is spelled in JavaScript.
export function makeNormalizer(config, own) {
  switch (config?.type) {
    case undefined:
      return (run) => run;
    case "Sequence": {
      const steps = config.normalizers.map((step, i) => makeNormalizer(step, own.normalizers[i]));
      return (run) => steps.reduce((result, step) => step(result), run);
    }
    case "BertNormalizer":
      return (run) => normalizeBert(run, config);
    case "NFC":
    case "NFKC":
      return (run) => compose(run, config.type);
    case "NFD":
    case "NFKD":
      return (run) => decompose(run, config.type);
    case "Lowercase":
      return (run) => run.map(lower);
    case "StripAccents":
      return (run) => run.map((char) => (COMBINING.test(char) ? "" : char));
    case "Strip":
      return (run) => strip(run, config);
    case "Prepend":
      return (run) => run.prepend(config.prepend);
    case "Replace":
      return (run) => replace(run, own.pattern, config.content);
    case "Precompiled": {
      const table = readTable(config.precompiled_charsmap);
      return (run) => follow(run, rewrite(run, table));
    }
    default:
      throw new Error(`This page cannot follow a tokenizer that rewrites texts by ${config.type}.`);
  }
}

// Make the changes of precompiled.js: a character that is added stands for what the one before it does.
function follow(run, changes) {
  if (changes === null) return run;
  const made = new Run([], [], []);
  let next = 0; // of the run
  for (const [char, change] of changes) {
    const at = change > 0 ? next - 1 : Math.min(next, run.length - 1);
    made.push(char, run.from[at] ?? 0, run.to[at] ?? 0);
    if (change <= 0) next += 1 - change;
  }
  return made;
}

function normalizeBert(run, { clean_text, handle_chinese_chars, strip_accents, lowercase }) {
  if (clean_text) run = run.map((char) => (REMOVED.test(char) ? "" : SPACE.test(char) ? " " : char));
  if (handle_chinese_chars) run = run.map((char) => (isChinese(char) ? ` ${char} ` : char));
  if (strip_accents ?? lowercase) run = decompose(run, "NFD").map((char) => (NONSPACING.test(char) ? "" : char));
  return lowercase ? run.map(lower) : run;
}

function isChinese(char) {
  const code = char.codePointAt(0);
  return code >= 0x3400 && CJK.some(([first, last]) => first <= code && code <= last);
}

function lower(char) {
  return char.toLowerCase(); // of one character: a sigma at the end of a word stays the usual one, as in Rust
}

// Decompose each character; marks that then change places (by their combining class) take theirs along.
function decompose(run, form) {
  const made = run.map((char) => (char < "\x80" ? char : char.normalize(form)));
  const wanted = Array.from(made.text.normalize(form));
  if (wanted.length !== made.length || wanted.every((char, i) => char === made.chars[i])) return made;
  const sorted = new Run([], [], []);
  const used = new Set();
  let first = 0;
  for (const char of wanted) {
    let i = first;
    while (used.has(i) || made.chars[i] !== char) i += 1;
    used.add(i);
    while (used.has(first)) first += 1;
    sorted.push(char, made.from[i], made.to[i]);
  }
  return sorted;
}

// Compose a character with the marks after it. What comes out first stands for the first of them, as in Rust, and the
// others for the last ones. `form` is a Unicode form.
function compose(run, form) {
  const write = (text) => text.normalize(form);
  const whole = run.text;
  if (write(whole) === whole) return run;
  const made = new Run([], [], []);
  const parts = [];
  for (const [start, end] of run.find(/[\u1100-\u115f\ua960-\ua97c]+[\u1160-\u11ff\ud7b0-\ud7fb]*\p{M}*|\P{M}\p{M}*|\p{M}+/gu)) {
    const last = parts.at(-1); // half-width kana and Korean letters go together though no mark follows
    const [one, two] = [last ? run.slice(...last).text : "", run.slice(start, end).text];
    if (last && write(one + two) !== write(one) + write(two)) last[1] = end;
    else parts.push([start, end]);
  }
  for (const [start, end] of parts) {
    const chars = Array.from(write(run.slice(start, end).text));
    const same = chars.length === end - start && chars.every((char, i) => char === run.chars[start + i]);
    chars.forEach((char, i) => {
      const at = same ? start + i : i === 0 ? start : Math.max(start, end - chars.length + i);
      made.push(char, run.from[at], run.to[at]);
    });
  }
  if (made.text !== write(whole)) throw new Error("This text cannot be followed through the model's tokenizer.");
  return made;
}

function strip(run, { strip_left, strip_right }) {
  let start = 0, end = run.length;
  while (strip_left && start < end && SPACE.test(run.chars[start])) start += 1;
  while (strip_right && end > start && SPACE.test(run.chars[end - 1])) end -= 1;
  return run.slice(start, end);
}

// What replaces a match stands for the last character of it.
export function replace(run, pattern, content) {
  const found = run.find(pattern).filter(([start, end]) => end > start);
  if (!found.length) return run;
  const made = new Run([], [], []);
  const copy = (start, end) => {
    for (let i = start; i < end; i += 1) made.push(run.chars[i], run.from[i], run.to[i]);
  };
  let at = 0;
  for (const [start, end] of found) {
    copy(at, start);
    for (const char of content) made.push(char, run.from[end - 1], run.to[end - 1]);
    at = end;
  }
  copy(at, run.length);
  return made;
}
