"use strict";
// The page's data, small helpers, the theme and the curves. page.py joins this file, explanation.js and
// completions.js into one script. Whatever a completion contains, it enters the page only as text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs, questions, answers, columns } = data;
const total = columns.step.length;
const byId = (id) => document.getElementById(id);
const isRight = (i) => columns.flags[i] & 1;
const isFinished = (i) => columns.flags[i] & 2;
const isClamped = (i) => columns.flags[i] & 4;
const verdictOf = (i) => (isRight(i) ? "right" : "wrong"); // also the names of classes in style.css
const checkMark = (i) => (isRight(i) ? "\u2713" : "\u2717");

// --------------------------------------------------------------------------------------------------- helpers

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children); // strings become text nodes
  return element;
}

function makeButton(className, text) {
  const button = make("button", className, text);
  button.type = "button";
  return button;
}

function number(value, digits = 2) {
  if (value === null) return "-";
  const size = Math.abs(value);
  if (size >= 1000) return value.toPrecision(3);
  return size && size < 0.5 * 10 ** -digits ? value.toPrecision(1) : value.toFixed(digits);
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);

// Characters that are invisible or move others: control characters except newline and tab, direction marks,
// and characters without width.
const INVISIBLE = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]|[\\u{e0000}-\\u{e007f}]|[\\ud800-\\udfff]",
  "gu",
);

// A visible stand-in: the Unicode symbol of a control character, or the code point of any other character.
function standIn(character) {
  if (character < " ") return String.fromCharCode(0x2400 + character.charCodeAt(0));
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}
const visible = (text) => text.replace(INVISIBLE, standIn);

// Turn a text into nodes, with stand-ins for invisible characters and highlights on what is searched for.
function textNodes(text, query) {
  const nodes = [];
  const addHighlighted = (part) => {
    const lower = query ? part.toLowerCase() : "";
    if (!query || lower.length !== part.length) { // some letters are longer in lower case
      nodes.push(part);
      return;
    }
    let from = 0;
    for (let at; (at = lower.indexOf(query, from)) >= 0; from = at + query.length)
      nodes.push(part.slice(from, at), make("mark", "", part.slice(at, at + query.length)));
    nodes.push(part.slice(from));
  };
  let from = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    addHighlighted(text.slice(from, match.index));
    nodes.push(make("span", "stand-in", standIn(match[0])));
    from = match.index + match[0].length;
  }
  addHighlighted(text.slice(from));
  return nodes;
}

// ----------------------------------------------------------------------------------------------------- theme

const themes = ["auto", "light", "dark"];
let theme = "auto";
try {
  theme = localStorage.getItem("theme") || "auto";
} catch { /* some browsers have no storage for pages from disk */ }

function showTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `theme: ${theme}`;
}

byId("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  try {
    localStorage.setItem("theme", theme);
  } catch { /* as above */ }
  showTheme();
});
showTheme();

// ---------------------------------------------------------------------------------------------------- curves

// Show a figure's values at the step under the pointer. A click lists the completions of that step.
function addHover(figure) {
  const { left, right, low, high, share, curves } = JSON.parse(figure.dataset.hover);
  const plot = figure.querySelector(".plot"), values = figure.querySelector(".values");
  const cursor = make("div", "cursor");
  const show = (value) => (value === null ? "-" : share ? (100 * value).toFixed(1) + "%" : String(value));
  const stepAt = (event) => {
    const box = plot.getBoundingClientRect();
    const step = low + (((event.clientX - box.left) / box.width - left) / (right - left)) * (high - low);
    const steps = curves.flatMap((curve) => curve.steps);
    return steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
  };
  plot.addEventListener("pointermove", (event) => {
    const step = stepAt(event);
    cursor.style.left = 100 * (left + ((step - low) / (high - low)) * (right - left)) + "%";
    plot.append(cursor);
    values.replaceChildren(make("b", "", `step ${step}`));
    for (const curve of curves) {
      const at = curve.steps.indexOf(step);
      const label = curve.label ? curve.label + " " : "";
      if (at >= 0) values.append(`\u2003${label}`, make("b", "", show(curve.values[at])));
    }
  });
  plot.addEventListener("pointerleave", () => { cursor.remove(); values.replaceChildren(); });
  plot.addEventListener("click", (event) => {
    if (event.pointerType === "touch") return; // a tap shows the values, as pointing does
    const step = String(stepAt(event)), field = byId("step");
    // The step of the last evaluation has no completions.
    if (![...field.options].some((option) => option.value === step)) return;
    field.value = step;
    refresh();
    byId("rollouts").scrollIntoView();
  });
}
for (const figure of document.querySelectorAll("figure[data-hover]")) addHover(figure);
