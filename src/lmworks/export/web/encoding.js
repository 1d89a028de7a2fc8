// Text to tokens that know where they came from: Python's `tokenizers.Encoding` in JavaScript.
//
// transformers.js reads tokenizer.json, spells its patterns and merges its pairs; it keeps no places. Here the same
// steps run over Runs (see normalizing.js), so that each token has the characters (code points) that it covers, its
// word, and its text of a pair. A token is { id, token, start, end, word, type, sequence, special }.

const version = new URL(import.meta.url).search;
const { Run, makeNormalizer, replace } = await import(`./normalizing.js${version}`);
const { SPELLED, makeWriter, toByteTokens } = await import(`./spelling.js${version}`);

const USUAL = { // where nothing names a special token: the first of these that the vocabulary has
  pad_token: ["<|pad|>", "[PAD]", "<pad>"],
  unk_token: ["<|unk|>", "[UNK]", "<unk>"],
  cls_token: ["[CLS]"],
  mask_token: ["[MASK]", "<mask>"],
};
const PUNCTUATION = /[\p{P}$+<=>^`|~]/gu;
const WHITE = /[\t\n\r\p{White_Space}]/gu;
const LETTERS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const WORDS = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
const WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;
const utf8 = new TextEncoder();

export class Encoder {
  // `tokenizer` is transformers.js's; `beside` what special_tokens_map.json holds, or null.
  constructor(tokenizer, beside = null) {
    const own = (this.own = tokenizer._tokenizer);
    const json = (this.json = tokenizer._tokenizerJSON);
    this.config = { ...beside, ...tokenizer.config };
    this.normalize = makeNormalizer(json.normalizer ?? undefined, own.normalizer);
    this.cut = makeCutter(json.pre_tokenizer, own.pre_tokenizer);
    this.word = makeModel(json.model, own.model);
    this.frame = makeFrame(json.post_processor);
    const added = json.added_tokens ?? [];
    this.plain = makeSplitter(added.filter((one) => !one.normalized));
    this.rewritten = makeSplitter(added.filter((one) => one.normalized), (text) => this.normalize(Run.of(text)).text);
    this.specials = new Set(added.filter((one) => one.special).map((one) => one.id));
    this.write = makeWriter(json.decoder, own.decoder); // the text that tokens spell together
  }

  // The tokens of a text, or a pair of texts, with the model's special tokens.
  encode(text, second = null) {
    return this.join(this.bare(text), second === null ? null : this.bare(second));
  }

  ids(text) {
    return this.bare(text).map((token) => token.id);
  }

  // The tokens of a text alone; places are not trimmed yet.
  bare(text) {
    const tokens = [];
    let word = 0;
    for (const [rough, known] of this.plain(Run.of(text))) {
      if (known) tokens.push(toToken(known, rough, word++));
      else {
        for (const [run, found] of this.rewritten(this.normalize(rough))) {
          if (found) tokens.push(toToken(found, run, word++));
          else for (const piece of this.cut(run)) tokens.push(...this.word(piece).map((one) => ({ ...one, word }))), word++;
        }
      }
    }
    return tokens;
  }

  join(first, second = null) {
    const texts = [first, second].filter(Boolean).map((tokens) => this.frame.trims.reduce((kept, trim) => trim(kept), tokens));
    const made = [];
    for (const { sequence, type, specials } of second ? this.frame.pair : this.frame.single) {
      if (specials) made.push(...specials.map(([id, token]) => ({ id, token, start: 0, end: 0, word: null, type, sequence: null, special: true })));
      else made.push(...texts[sequence].map((token) => ({ ...token, type, sequence, special: false })));
    }
    return made;
  }

  countSpecials(pair) {
    return (pair ? this.frame.pair : this.frame.single).reduce((sum, part) => sum + (part.specials?.length ?? 0), 0);
  }

  // A text in windows of at most `length` tokens, of which neighbours share `overlap`; `before` is repeated in each.
  windows(text, { before = null, length, overlap }) {
    const first = before === null ? null : this.bare(before);
    const room = length - this.countSpecials(first !== null) - (first?.length ?? 0);
    if (room <= overlap) {
      throw new InputError(`There is no room for the text in a window of ${length} tokens: shorten the question, or choose a smaller overlap.`);
    }
    const rest = this.bare(text);
    const windows = [];
    for (let start = 0; ; start += room - overlap) {
      const part = rest.slice(start, start + room);
      windows.push(first ? this.join(first, part) : this.join(part));
      if (start + room >= rest.length) return windows;
    }
  }

  idOf(token) {
    return this.own.model.tokens_to_ids.get(token) ?? null;
  }

  // The id of a special token that the configuration names, else of the first usual one.
  find(key, ...usual) {
    const named = this.config[key];
    const names = key in this.config ? [named?.content ?? named].filter(Boolean) : [...usual, ...(USUAL[key] ?? [])];
    return names.map((name) => this.idOf(name)).find((id) => id !== null) ?? null;
  }

  get unknown() {
    if (this.json.model.type === "BPE") return this.json.model.unk_token ? this.idOf(this.json.model.unk_token) : null;
    return this.find("unk_token");
  }

  get size() {
    return this.own.model.tokens_to_ids.size;
  }

  spell(id) {
    return this.own.model.vocab[id];
  }

  // Tokens to be read: "##ing" -> "ing", "Ġdog" -> "dog". Of the pieces of one character the last has it, the others a dot.
  show(tokens) {
    const { prefix = "" } = this.json.decoder ?? {};
    let pieces = [];
    return tokens.map(({ token, special }) => {
      pieces.push(token);
      const text = special ? token : this.write(pieces).trim();
      if (text.endsWith("\ufffd")) return "·";
      pieces = [];
      return (prefix && text.startsWith(prefix) ? text.slice(prefix.length) : text) || token;
    });
  }

  decode(ids, { skip = true } = {}) {
    return this.write(ids.filter((id) => !(skip && this.specials.has(id)) && this.spell(id) !== undefined).map((id) => this.spell(id)));
  }
}

// An error in what somebody asked for: the model itself is fine.
export class InputError extends Error {
  name = "InputError";
}

function toToken({ id }, run, word) {
  return { id, token: run.text, start: run.from[0], end: run.to.at(-1), word };
}

// Return the function that finds added tokens in a run: [[run, token or null], …]. The longest one at a place wins.
function makeSplitter(added, rewrite = (text) => text) {
  const byText = new Map(added.map((one) => [rewrite(one.content), one]).filter(([text]) => text));
  if (!byText.size) return (run) => (run.length ? [[run, null]] : []);
  const longest = [...byText.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(longest.map((text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&")).join("|"), "gu");
  return (run) => {
    const parts = [];
    let at = 0;
    for (let [start, end] of run.find(pattern)) {
      const token = byText.get(run.slice(start, end).text);
      const inWord = (i) => i >= 0 && i < run.length && WORD.test(run.chars[i]);
      if (token.single_word && (inWord(start - 1) || inWord(end))) continue;
      const white = (i) => /\p{White_Space}/u.test(run.chars[i]);
      while (token.lstrip && start > at && white(start - 1)) start -= 1;
      while (token.rstrip && end < run.length && white(end)) end += 1;
      if (start > at) parts.push([run.slice(at, start), null]);
      parts.push([run.slice(start, end), token]);
      at = end;
    }
    if (at < run.length) parts.push([run.slice(at, run.length), null]);
    return parts;
  };
}

// Return the function that cuts a run into words, as tokenizer.json's `pre_tokenizer` says.
function makeCutter(config, own) {
  switch (config?.type) {
    case undefined:
      return (run) => (run.length ? [run] : []);
    case "Sequence": {
      const steps = config.pretokenizers.map((step, i) => makeCutter(step, own.tokenizers[i]));
      return (run) => steps.reduce((runs, step) => runs.flatMap(step), [run]);
    }
    case "BertPreTokenizer":
      return (run) => cutAt(run, WHITE, "Removed").flatMap((one) => cutAt(one, PUNCTUATION, "Isolated"));
    case "ByteLevel":
      return (run) => {
        if (config.add_prefix_space && !run.text.startsWith(" ")) run = run.prepend(" ");
        const words = config.use_regex ?? true ? cutAt(run, LETTERS, "Isolated") : [run];
        return words.map((one) => one.map((char) => Array.from(utf8.encode(char), (byte) => SPELLED[byte]).join("")));
      };
    case "Metaspace": {
      const mark = config.replacement ?? "\u2581";
      const scheme = config.prepend_scheme ?? (config.add_prefix_space === false ? "never" : "always");
      return (run) => {
        run = replace(run, / /gu, mark);
        const here = scheme === "always" || (scheme === "first" && run.from[0] === 0);
        if (here && !run.text.startsWith(mark)) run = run.prepend(mark);
        return config.split === false ? [run] : cutAt(run, new RegExp(mark, "gu"), "MergedWithNext");
      };
    }
    case "Whitespace":
      return (run) => cutAt(run, WORDS, "Removed", true);
    case "WhitespaceSplit":
      return (run) => cutAt(run, /\p{White_Space}/gu, "Removed");
    case "Digits":
      return (run) => cutAt(run, /\p{N}/gu, config.individual_digits ? "Isolated" : "Contiguous");
    case "Punctuation":
      return (run) => cutAt(run, PUNCTUATION, config.behavior ?? "Isolated");
    case "Split":
      return (run) => cutAt(run, own.pattern, config.behavior, config.invert);
    default:
      throw new Error(`This page cannot follow a tokenizer that cuts texts by ${config.type}.`);
  }
}

// Cut a run at the matches of a pattern. `behavior` says what becomes of them; `invert` swaps them with the rest.
function cutAt(run, pattern, behavior, invert = false) {
  const parts = []; // [start, end, is it a match]
  let at = 0;
  for (const [start, end] of run.find(pattern)) {
    if (start > at) parts.push([at, start, invert]);
    if (end > start) parts.push([start, end, !invert]);
    at = end;
  }
  if (at < run.length) parts.push([at, run.length, invert]);
  const kept = [];
  let match = null; // whether the part before was one
  for (const [start, end, is] of behavior === "MergedWithNext" ? parts.reverse() : parts) {
    const last = kept.at(-1);
    if (behavior === "Contiguous" && is === match) last[1] = end;
    else if (behavior === "MergedWithPrevious" && is && match === false) last[1] = end;
    else if (behavior === "MergedWithNext" && is && match === false) last[0] = start;
    else if (!(behavior === "Removed" && is)) kept.push([start, end]);
    match = is;
  }
  if (behavior === "MergedWithNext") kept.reverse();
  return kept.map(([start, end]) => run.slice(start, end));
}

// Return the function that cuts a word into tokens with their places.
function makeModel(config, own) {
  const ids = own.tokens_to_ids;
  const unknown = { id: ids.get(own.unk_token) ?? own.unk_token_id, token: own.unk_token };
  const place = (run, start, end) => ({ start: run.from[start], end: run.to[end - 1] });
  const whole = (run, known) => ({ ...known, ...place(run, 0, run.length) });
  if (config.type === "WordLevel" || (!config.type && !config.merges && !config.continuing_subword_prefix && !Array.isArray(config.vocab))) {
    const rest = { id: ids.get(config.unk_token), token: config.unk_token };
    return (run) => [whole(run, ids.has(run.text) ? { id: ids.get(run.text), token: run.text } : rest)];
  }
  if (config.type === "WordPiece" || (!config.type && !config.merges && config.continuing_subword_prefix)) {
    const most = config.max_input_chars_per_word ?? 100;
    return (run) => {
      const found = [];
      for (let start = 0, end; start < run.length; start = end) {
        let token;
        for (end = run.length <= most ? run.length : start; end > start; end -= 1) {
          token = (start ? config.continuing_subword_prefix : "") + run.chars.slice(start, end).join("");
          if (ids.has(token)) break;
        }
        if (end === start) return [whole(run, unknown)];
        found.push({ id: ids.get(token), token, ...place(run, start, end) });
      }
      return found;
    };
  }
  const pieces = own.bpe ? (text) => (own.ignore_merges && ids.has(text) ? [text] : own.bpe(text)) : (text) => own.tokenize(text);
  return (run) => {
    const found = [];
    let at = 0, open = false; // whether the last token is an unknown one that may grow
    for (const piece of pieces(run.text)) {
      const start = at;
      at += Array.from(piece).length;
      const bytes = config.byte_fallback ? toByteTokens(piece) : [];
      const known = ids.has(piece) && !(own.unk_token === piece && own.tokenize);
      if (known) found.push({ id: ids.get(piece), token: piece, ...place(run, start, at) });
      else if (bytes.length && bytes.every((one) => ids.has(one))) {
        const chars = Array.from(piece).flatMap((char, i) => Array(utf8.encode(char).length).fill(start + i));
        bytes.forEach((token, i) => found.push({ id: ids.get(token), token, ...place(run, chars[i], chars[i] + 1) }));
      } else if (open && (own.fuse_unk || config.fuse_unk)) {
        found.at(-1).end = run.to[at - 1];
        if (!own.bpe) found.at(-1).token += piece;
        continue;
      } else if (unknown.id !== undefined) {
        found.push({ ...unknown, ...(own.bpe ? {} : { token: piece }), ...place(run, start, at) }); // Unigram spells it
        open = true;
        continue;
      }
      open = false;
    }
    if (at !== run.length) throw new Error("This text cannot be followed through the model's tokenizer.");
    return found;
  };
}

// Read tokenizer.json's `post_processor`: the special tokens around a text and a pair, and what trims places.
function makeFrame(config) {
  const text = (sequence, type) => ({ sequence, type });
  const frame = { trims: [], single: [text(0, 0)], pair: [text(0, 0), text(1, 1)] };
  for (const step of config?.type === "Sequence" ? config.processors : [config].filter(Boolean)) {
    const special = (name, type) => ({ type, specials: [[step[name][1], step[name][0]]] });
    if (["ByteLevel", "RobertaProcessing"].includes(step.type) && (step.trim_offsets ?? true)) {
      frame.trims.push((tokens) => trimSpaces(tokens, step.add_prefix_space ?? true));
    }
    if (step.type === "TemplateProcessing") {
      for (const kind of ["single", "pair"]) {
        frame[kind] = step[kind].map(({ Sequence, SpecialToken }) => {
          if (Sequence) return text(Sequence.id === "A" ? 0 : 1, Sequence.type_id);
          const { ids, tokens } = step.special_tokens[SpecialToken.id];
          return { type: SpecialToken.type_id, specials: ids.map((id, i) => [id, tokens[i]]) };
        });
      }
    } else if (step.type === "BertProcessing" || step.type === "RobertaProcessing") {
      const second = step.type === "BertProcessing" ? 1 : 0;
      frame.single = [special("cls", 0), text(0, 0), special("sep", 0)];
      frame.pair = [...frame.single, ...(second ? [] : [special("sep", 0)]), text(1, second), special("sep", second)];
    } else if (step.type !== "ByteLevel") {
      throw new Error(`This page cannot follow a tokenizer with ${step.type}.`);
    }
  }
  return frame;
}

// Move places past the spaces that byte-level tokens begin or end with; one that was put before the text has no place.
function trimSpaces(tokens, prefixed) {
  const isSpace = (char) => char === SPELLED[32] || /\p{White_Space}/u.test(char);
  return tokens.map((token, i) => {
    const chars = Array.from(token.token);
    let leading = 0, trailing = 0;
    while (leading < chars.length && isSpace(chars[leading])) leading += 1;
    while (trailing < chars.length && isSpace(chars[chars.length - 1 - trailing])) trailing += 1;
    let { start, end } = token;
    if (leading === 1 && prefixed && (i === 0 || start === 0)) leading = 0; // more than one were in the text
    start = Math.min(start + leading, end);
    if (trailing && end >= trailing) end = Math.max(end - trailing, start);
    return { ...token, start, end };
  });
}
