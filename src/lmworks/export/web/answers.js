// Numbers to answers, for tasks that give scores: labels of a text, spans of an answer, words for a mask, vectors.
//
// Each function does what lmworks' Python does (src/lmworks/tasks), in the same order and with the same ties: an answer
// here has the keys, the values and the order of the JSON there. Logits of T tokens and L numbers each are rows.

export function softmax(row) {
  const most = row.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(row, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

// The place of the largest, the first of equals.
export function best(row) {
  let found = 0;
  row.forEach((x, i) => {
    if (x > row[found]) found = i;
  });
  return found;
}

// The rows of a (1, T, L) or (1, L) output.
export function toRows({ data, dims }) {
  const width = dims.at(-1);
  return Array.from({ length: data.length / width }, (_, i) => data.subarray(i * width, (i + 1) * width));
}

// "auto": a regression keeps its numbers; labels that may hold together go through the sigmoid, others the softmax.
export function chooseScores(scores, facts) {
  if (scores !== "auto") return scores;
  if (facts.problemType === "regression") return "none";
  return facts.labels.length === 1 || facts.problemType === "multi_label_classification" ? "sigmoid" : "softmax";
}

export function toScores(row, facts, scores) {
  const kind = chooseScores(scores, facts);
  if (kind === "softmax") return softmax(row);
  return Array.from(row, (x) => (kind === "sigmoid" ? 0.5 * (1 + Math.tanh(x / 2)) : x));
}

export function rank(scores, labels, topK) {
  const order = scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
  return order.slice(0, topK ?? undefined).map((i) => ({ label: labels[i], score: scores[i] }));
}

// The spans of a question's windows: [{ tokens, rows }] -> answers, the best first, each span once.
export function findAnswers(windows, context, { topK, most, noAnswer, align, clsId }) {
  const chars = Array.from(context);
  const found = new Map(); // "start end" -> score
  let nothing = 1;
  for (const { tokens, rows } of windows) {
    const inside = tokens.map((token) => token.sequence === 1);
    const counted = tokens.map((token, i) => inside[i] || token.id === clsId);
    const [starts, ends] = [0, 1].map((side) => softmax(rows.map((row, i) => (counted[i] ? row[side] : -Infinity))));
    nothing = Math.min(nothing, starts[0] * ends[0]);
    const scored = [];
    tokens.forEach((_, first) => {
      for (let last = first; inside[first] && last < Math.min(tokens.length, first + most); last += 1) {
        const score = inside[last] ? starts[first] * ends[last] : 0;
        if (score > 0) scored.push([score, first, last]);
      }
    });
    scored.sort((a, b) => b[0] - a[0]);
    const spans = new Map();
    for (const [score, first, last] of scored) {
      if (spans.size === topK) break;
      const place = findCharacters(tokens, first, last, align).join(" ");
      if (!spans.has(place)) spans.set(place, score);
    }
    for (const [place, score] of spans) found.set(place, Math.max(score, found.get(place) ?? 0));
  }
  const answers = Array.from(found, ([place, score]) => {
    const [start, end] = place.split(" ").map(Number);
    return { text: chars.slice(start, end).join(""), score, start, end };
  });
  if (noAnswer || !answers.length) answers.push({ text: "", score: noAnswer ? nothing : 0, start: 0, end: 0 });
  return answers.sort((a, b) => b.score - a.score).slice(0, topK);
}

// Where in the context the tokens first … last are, or the words that they belong to.
function findCharacters(tokens, first, last, align) {
  if (!align) return [tokens[first].start, tokens[last].end];
  const ofWord = (word) => tokens.filter((token) => token.sequence === 1 && token.word === word);
  return [ofWord(tokens[first].word)[0].start, ofWord(tokens[last].word).at(-1).end];
}

// The best tokens for a mask: [[id, score], …]; among equals the lower id.
export function bestTokens(row, topK, targets = null) {
  const scores = softmax(row);
  const ids = targets ?? scores.map((_, id) => id);
  const limit = targets ? -Infinity : findLimit(scores, topK);
  const likely = ids.filter((id) => scores[id] >= limit);
  return likely.sort((a, b) => scores[b] - scores[a] || a - b).slice(0, topK).map((id) => [id, scores[id]]);
}

// The topK-th largest, so that a vocabulary need not be sorted.
function findLimit(scores, topK) {
  const top = [];
  for (const score of scores) {
    if (top.length === topK && score <= top[0]) continue;
    top.push(score);
    top.sort((a, b) => a - b);
    if (top.length > topK) top.shift();
  }
  return top[0];
}

// One vector of the rows of several windows; `pooling` is mean, max, cls or last.
export function pool(windows, pooling) {
  if (pooling === "cls" || pooling === "last") return windows[0].at(pooling === "cls" ? 0 : -1);
  const rows = windows.flat();
  const made = Array.from(rows[0]);
  for (const row of rows.slice(1)) {
    for (let i = 0; i < made.length; i += 1) made[i] = pooling === "mean" ? made[i] + row[i] : Math.max(made[i], row[i]);
  }
  return pooling === "mean" ? made.map((x) => x / rows.length) : made;
}

export function toLength1(vector) {
  const floats = Array.from(vector, Math.fround);
  const norm = Math.max(Math.sqrt(floats.reduce((sum, x) => sum + x * x, 0)), 1e-12);
  return floats.map((x) => Math.fround(x / norm));
}
