// How tokens are spelled, and how they become text again: tokenizer.json's `decoder`.

const BYTES = Array.from({ length: 256 }, (_, byte) => byte);
BYTES.filter((b) => !((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)).forEach((b, i) => (BYTES[b] = 256 + i));

export const SPELLED = BYTES.map((code) => String.fromCharCode(code)); // how byte-level tokens spell each byte
const VALUES = new Map(SPELLED.map((char, byte) => [char, byte]));
const utf8 = new TextEncoder();
const read = new TextDecoder("utf-8", { ignoreBOM: true });

// The bytes of a text, each as a SentencePiece model spells it.
export function toByteTokens(text) {
  return Array.from(utf8.encode(text), (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
}

// Return the function that writes tokens as text; `own` is the library's decoder, which is right but for bytes.
export function makeWriter(config, own) {
  if (!config) return (tokens) => tokens.join(" ");
  const steps = config.type === "Sequence" ? config.decoders.map((step, i) => [step, own.decoders[i]]) : [[config, own]];
  return (tokens) => steps.reduce((parts, [step, one]) => write(parts, step.type, one), tokens).join("");
}

function write(tokens, type, own) {
  if (!tokens.length) return tokens;
  if (type === "ByteLevel") return [fromBytes(tokens)];
  return type === "ByteFallback" ? joinBytes(tokens) : own.decode_chain(tokens);
}

function fromBytes(tokens) {
  const bytes = tokens.flatMap((token) => {
    const values = Array.from(token, (char) => VALUES.get(char));
    return values.includes(undefined) ? [...utf8.encode(token)] : values;
  });
  return read.decode(Uint8Array.from(bytes));
}

// Neighbouring byte tokens are characters together, or each of them is none.
function joinBytes(tokens) {
  const made = [];
  let bytes = [];
  const flush = () => {
    if (!bytes.length) return;
    const text = read.decode(Uint8Array.from(bytes));
    const whole = utf8.encode(text);
    const same = whole.length === bytes.length && whole.every((byte, i) => byte === bytes[i]);
    made.push(...(same ? [text] : bytes.map(() => "\ufffd")));
    bytes = [];
  };
  for (const token of tokens) {
    const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
    if (byte) bytes.push(parseInt(byte[1], 16));
    else {
      flush();
      made.push(token);
    }
  }
  flush();
  return made;
}
