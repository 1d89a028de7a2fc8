// The names in a text, out of the labels of its tokens: what src/lmworks/tasks/ner.py does, in the same order.

const version = new URL(import.meta.url).search;
const { best, softmax } = await import(`./answers.js${version}`);

const FAR = 2 ** 30; // tokens between a token and a cut that does not exist

// Take each token from the window in which it lies farthest from a cut: [{ tokens, rows, start, first, last }] -> tokens
// with their `probabilities`.
export function readTokens(windows) {
  const final = windows.at(-1);
  const length = final.start + final.tokens.length;
  const deepest = new Array(length).fill(-FAR);
  const found = new Array(length);
  for (const { tokens, rows, start, first, last } of windows) {
    const inside = tokens.map((_, i) => i).filter((i) => !tokens[i].special);
    tokens.slice(0, length - start).forEach((token, i) => {
      const left = first ? i + FAR : i - inside[0];
      const right = last ? i + FAR : inside.at(-1) - i;
      const depth = Math.min(left, right);
      if (depth <= deepest[start + i]) return;
      deepest[start + i] = depth;
      found[start + i] = { ...token, probabilities: softmax(rows[i]) };
    });
  }
  return found;
}

export function tag(token, labels) {
  const place = best(token.probabilities);
  const { start, end } = token;
  return { token: token.token, label: labels[place], score: token.probabilities[place], attends: !token.special, start, end };
}

// `options`: aggregation, ignored (a Set of labels), words ("tokenizer" or "spaces"), unknown (id), write (tokens -> text).
export function findEntities(tokens, text, labels, options) {
  const chars = Array.from(text);
  const real = tokens.filter((token) => !token.special);
  const alone = ["none", "simple"].includes(options.aggregation);
  const words = alone ? real.map((token) => [token]) : toWords(real, chars, options.words);
  let units = words.map((word) => toEntity(word, chars, labels, options));
  if (options.aggregation !== "none") units = groupByKind(units).map((group) => join(group, options.write));
  return units.filter((unit) => !options.ignored.has(unit.label));
}

// The tokens of each word. Tokens may share a character, as the bytes of an emoji do: no word ends within it.
function toWords(tokens, chars, kind) {
  const words = [];
  const isSpace = (i) => i >= 0 && i < chars.length && /[\x1c-\x1f\p{White_Space}]/u.test(chars[i]); // Python's isspace
  for (const token of tokens) {
    const last = words.at(-1)?.at(-1);
    const changed = !last || (kind === "tokenizer" && token.word !== last.word);
    const spaced = last && token.start >= last.end && (isSpace(token.start - 1) || isSpace(token.start));
    if (changed || spaced) words.push([token]);
    else words.at(-1).push(token);
  }
  return words;
}

function toEntity(word, chars, labels, { aggregation, unknown, write }) {
  const rows = word.map((token) => token.probabilities);
  let row = rows[0];
  if (aggregation === "average") row = row.map((_, i) => rows.reduce((sum, one) => sum + one[i], 0) / rows.length);
  if (aggregation === "max") row = rows[best(rows.map((one) => Math.max(...one)))];
  const place = best(row);
  const parts = word.map((token) => (token.id === unknown ? chars.slice(token.start, token.end).join("") : token.token));
  const spelled = ["none", "simple"].includes(aggregation) ? parts[0] : write(parts);
  return { label: labels[place], score: row[place], word: spelled, start: word[0].start, end: word.at(-1).end };
}

function join(group, write) {
  const score = group.reduce((sum, unit) => sum + unit.score, 0) / group.length;
  const dash = group[0].label.indexOf("-");
  const word = write(group.map((unit) => unit.word));
  return { label: group[0].label.slice(dash + 1), score, word, start: group[0].start, end: group.at(-1).end };
}

// What a label names: "B-person" and "I-person" -> "person", "O" -> "O".
export function kindOf(label) {
  return label.replace(/^[BI]-/, "");
}

function groupByKind(units) {
  const groups = [];
  for (const unit of units) {
    const last = groups.at(-1)?.at(-1);
    if (last && kindOf(unit.label) === kindOf(last.label) && !unit.label.startsWith("B-")) groups.at(-1).push(unit);
    else groups.push([unit]);
  }
  return groups;
}
