// SentencePiece's table of rewritings, as tokenizer.json holds it (Precompiled): a trie, and what its leaves stand for.
//
// The rules are those of Hugging Face's Rust tokenizers: a grapheme of less than six bytes becomes what its shortest
// known beginning stands for, else each of its characters does; what is in no table stays. The trie is darts-clone's
// (Yata 2008): a unit of 32 bits has a label, an offset to its children, and whether a leaf is among them.

const LABEL = 0x800000ff; // a leaf has the highest bit, so that it is no byte's unit
const SHORT = 6; // bytes
const utf8 = new TextEncoder();
const read = new TextDecoder("utf-8", { ignoreBOM: true });
const graphemes = globalThis.Intl?.Segmenter && new Intl.Segmenter("en", { granularity: "grapheme" });

// Return the function that says what a text stands for, null where that is itself; `charsmap` is in base64.
export function readTable(charsmap) {
  const bytes = Uint8Array.from(atob(charsmap), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = view.getUint32(0, true);
  const unit = (place) => (4 * place + 4 <= size ? view.getUint32(4 + 4 * place, true) : LABEL);
  const step = (one) => (one >>> 10) << ((one & 512) >>> 6);
  const known = new Map();
  function find(text) {
    let place = step(unit(0));
    for (const byte of utf8.encode(text)) {
      place ^= byte;
      const one = unit(place);
      if (!byte || (one & LABEL) >>> 0 !== byte) return null;
      place ^= step(one);
      if ((one >>> 8) & 1) {
        const start = 4 + size + (unit(place) & 0x7fffffff);
        return read.decode(bytes.subarray(start, bytes.indexOf(0, start)));
      }
    }
    return null;
  }
  return (text) => {
    if (!known.has(text)) known.set(text, find(text));
    return known.get(text);
  };
}

// Rewrite a run by a table: [[character, change], …], where a change of 1 adds one to those that stand for the text, and
// one of -n takes n more of the text with it. What becomes nothing goes with the character before it.
export function rewrite(run, table) {
  const made = [];
  const replace = (old, text) => {
    const chars = Array.from(text);
    const more = chars.length - Array.from(old).length;
    chars.forEach((char, i) => made.push([char, i >= chars.length - more ? 1 : 0]));
    if (more < 0 && made.length) made.at(-1)[1] += more;
  };
  let changed = false;
  for (const part of split(run.text)) {
    const whole = utf8.encode(part).length < SHORT ? table(part) : null;
    for (const [old, text] of whole === null ? Array.from(part, (char) => [char, table(char)]) : [[part, whole]]) {
      if (text === null) made.push([old, 0]);
      else replace(old, text);
      changed ||= text !== null;
    }
  }
  return changed ? made : null;
}

function split(text) {
  if (/^[\0-\x7f]*$/.test(text)) return text.match(/\r\n|[^]/g) ?? [];
  return graphemes ? Array.from(graphemes.segment(text), ({ segment }) => segment) : text.match(/\r\n|\P{M}\p{M}*|\p{M}+/gu) ?? [];
}
