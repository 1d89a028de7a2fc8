// Small things that pages are built of.

export const $ = (id) => document.getElementById(id);

export function element(name, text = "", attributes = {}) {
  const made = Object.assign(document.createElement(name), { textContent: text });
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// A name, a number and a bar; `part` of 1 fills the whole width.
export function bar(name, number, part, tag = "li") {
  const row = element(tag, "", { class: "bar" });
  row.append(element("span", name), element("b", number), element("i"));
  row.style.setProperty("--part", `${100 * Math.max(0, Math.min(1, part))}%`);
  return row;
}

export function percent(score) {
  const value = 100 * score;
  return `${value > 0 && value < 0.1 ? "< 0.1" : value.toFixed(1)} %`;
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toLocaleString("en", { maximumSignificantDigits: bytes < 1e6 ? 2 : 3 })} MB`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

export function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}
