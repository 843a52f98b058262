// The list of completions: filters, search and order. Only the visible rows are drawn.

const list = byId("list"), spacer = byId("spacer"), form = byId("filters"), search = byId("search");
let shown = []; // the completions that pass the filters, in order
let selected = -1; // index into `shown`
let chip = ""; // the pressed chip

// --------------------------------------------------------------------------------------------------- filters

function median(values) {
  return values.length ? values.sort((a, b) => a - b)[values.length >> 1] : null;
}

// For each run, the score halfway between the medians of right and wrong answers; null if the run has no
// reward model or only one kind of answer.
const halfway = runs.map((about, run) => {
  const medianScore = (verdict) =>
    median(columns.rm_score.filter((_, i) => columns.run[i] === run && isRight(i) === verdict));
  const right = medianScore(1), wrong = medianScore(0);
  return !about.scores || right === null || wrong === null ? null : (right + wrong) / 2;
});
const halfwayOf = (i) => halfway[columns.run[i]];
const sizes = columns.advantage.map((a) => Math.abs(a)).sort((a, b) => b - a);
const largeAdvantage = sizes[Math.floor(total / 10)] || 0;
const passesChip = {
  fooled: (i) => halfwayOf(i) !== null && !isRight(i) && columns.rm_score[i] > halfwayOf(i),
  missed: (i) => halfwayOf(i) !== null && isRight(i) && columns.rm_score[i] < halfwayOf(i),
  truncated: (i) => !isFinished(i),
  unread: (i) => columns.parsed[i] === null,
  strong: (i) => columns.advantage[i] !== 0 && Math.abs(columns.advantage[i]) >= largeAdvantage,
};
const chipOrder = { fooled: "rm_score", missed: "-rm_score", strong: "advantage" };

let lowerCase = null; // all texts of each completion; made for the first search
function makeLowerCase() {
  const problems = questions.map((question, q) => `${question}\n${answers[q]}\n`.toLowerCase());
  lowerCase = columns.completion.map(
    (text, i) => `${problems[columns.question[i]]}${columns.parsed[i] ?? ""}\n${text}`.toLowerCase(),
  );
}

function makeOption(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}
const allSteps = [...new Set(columns.step)].sort((a, b) => a - b);
byId("step").append(...allSteps.map((step) => makeOption(step, step)));

// List the questions of the chosen run and step. The questions of all steps would be too many for a menu.
function fillQuestions(run, step, question) {
  const asked = new Set();
  if (step !== "")
    for (let i = 0; i < total; i++)
      if (columns.step[i] === +step && (run === "" || columns.run[i] === +run))
        asked.add(columns.question[i]);
  if (question !== "") asked.add(+question);
  const label = (q) => {
    const question = visible(questions[q]);
    return questions[q].length > 60 ? question.slice(0, 60) + "..." : question;
  };
  const all = makeOption("", step === "" && question === "" ? "all (choose a step first)" : "all");
  byId("question").replaceChildren(all, ...[...asked].map((q) => makeOption(q, label(q))));
  byId("question").value = question;
}

// Make a function that tells whether a completion passes all filters.
function makeFilter(run, step, question, verdict, query) {
  const passes = passesChip[chip];
  return (i) =>
    (run === "" || columns.run[i] === +run) &&
    (step === "" || columns.step[i] === +step) &&
    (question === "" || columns.question[i] === +question) &&
    (verdict === "" || isRight(i) === +verdict) &&
    (!passes || passes(i)) &&
    (!query || lowerCase[i].includes(query));
}

function sortShown() {
  const order = byId("order").value || chipOrder[chip] || "";
  if (!order) return;
  const column = columns[order.replace("-", "")];
  const sign = order.startsWith("-") ? 1 : -1;
  const key = order === "advantage" ? (i) => Math.abs(column[i]) : (i) => column[i];
  shown.sort((a, b) => sign * (key(a) - key(b)) || a - b);
}

function countText() {
  if (!total) return "No completions have been written yet.";
  let text = `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")} completions`;
  const right = shown.reduce((sum, i) => sum + isRight(i), 0);
  text += shown.length ? `, ${Math.round((100 * right) / shown.length)}% right.` : ".";
  if (runs.some((run) => run.kept < run.steps)) {
    const kept = runs.map((run) => `${run.kept} of ${run.steps}`).join(" and ");
    text += ` This page has the completions of ${kept} steps; rollouts.jsonl has all of them.`;
  }
  return text;
}

// List the completions that pass the filters. Completion `keep` stays selected if it is one of them.
function refresh(keep = -1) {
  const run = byId("run")?.value ?? "", step = byId("step").value, question = byId("question").value;
  const query = search.value.trim().toLowerCase();
  fillQuestions(run, step, question);
  if (query && !lowerCase) makeLowerCase();
  const passes = makeFilter(run, step, question, byId("verdict").value, query);
  shown = [];
  for (let i = 0; i < total; i++) if (passes(i)) shown.push(i);
  sortShown();
  for (const button of form.querySelectorAll("[data-chip]"))
    button.setAttribute("aria-pressed", button.dataset.chip === chip);
  byId("count").textContent = countText();
  spacer.style.height = shown.length * rowHeight() + "px";
  list.scrollTop = 0;
  selectRow(keep >= 0 ? shown.indexOf(keep) : shown.length && !isNarrow() ? 0 : -1, keep >= 0, false);
}

// ------------------------------------------------------------------------------------------------------ list

const rowHeight = () => parseFloat(getComputedStyle(list).getPropertyValue("--row"));
const isNarrow = () => matchMedia("(max-width: 760px)").matches;

// A cell of a row; style.css shows its label on narrow screens.
function cell(text, className = "cell", label = "") {
  const element = make("span", className, text);
  if (label) element.dataset.label = label;
  return element;
}

function makeRow(place) {
  const i = shown[place], question = visible(questions[columns.question[i]]);
  const completion = visible(columns.completion[i].slice(0, 400)) || "(empty)";
  const answer = columns.parsed[i] === null ? "none" : visible(columns.parsed[i]).slice(0, 60);
  const hasScore = runs[columns.run[i]].scores;
  const score = hasScore ? number(columns.rm_score[i], 1) + (isClamped(i) ? "*" : "") : "-";
  const text = make("span", "text" + (isFinished(i) ? "" : " truncated"));
  text.append(make("small", "", question.slice(0, 300)), make("span", "", completion));
  const element = make(
    "div",
    "row" + (columns.group[i] % 2 ? " odd" : ""),
    cell(String(columns.step[i])),
    cell(checkMark(i), `mark is-${verdictOf(i)}`),
    text,
    cell(answer, `cell is-${verdictOf(i)}`),
    cell(score),
    cell(number(columns.r_hat[i])),
    cell("\u00d7" + number(columns.weight[i])),
    cell(signed(columns.reward[i]), "cell", "reward"),
    cell(signed(columns.advantage[i]), "cell", "advantage"),
    bar(i),
  );
  element.id = `row-${place}`;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", place === selected);
  element.setAttribute("aria-posinset", place + 1);
  element.setAttribute("aria-setsize", shown.length);
  element.setAttribute(
    "aria-label",
    `step ${columns.step[i]}, ${verdictOf(i)}, ${question}, ` +
      `reward ${number(columns.reward[i])}, advantage ${number(columns.advantage[i])}`,
  );
  element.style.top = place * rowHeight() + "px";
  element.dataset.place = place;
  return element;
}

function drawList() {
  const height = rowHeight(), first = Math.max(0, Math.floor(list.scrollTop / height) - 4);
  const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / height) + 9);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(makeRow(place));
  list.replaceChildren(spacer, ...rows);
}

// Select the row at `place`, or none if that is -1. On a phone, the explanation covers the list, so it opens
// only if `open` is set.
function selectRow(place, scroll = true, open = true) {
  selected = place;
  if (place >= 0 && scroll) {
    const top = place * rowHeight(), bottom = top + rowHeight();
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  }
  drawList();
  if (place >= 0) list.setAttribute("aria-activedescendant", `row-${place}`);
  else list.removeAttribute("aria-activedescendant");
  detail.hidden = place < 0 || (isNarrow() && !open);
  if (!detail.hidden) explain(shown[place]);
}

// Select a completion; if it is not listed, clear the filters first.
function showCompletion(i) {
  if (shown.includes(i)) return selectRow(shown.indexOf(i));
  form.reset();
  setTimeout(() => refresh(i)); // after the refresh of the "reset" listener, which selects the first row
}

// ---------------------------------------------------------------------------------------- mouse and keyboard

let drawIsPlanned = false;
list.addEventListener("scroll", () => {
  if (drawIsPlanned) return;
  drawIsPlanned = true;
  requestAnimationFrame(() => { drawIsPlanned = false; drawList(); });
});

list.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row) return;
  selectRow(+row.dataset.place, false);
  if (isNarrow()) detail.focus();
});

list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / rowHeight()) - 1), last = shown.length - 1;
  const target = {
    ArrowDown: selected + 1, j: selected + 1, ArrowUp: selected - 1, k: selected - 1,
    PageDown: selected + page, PageUp: selected - page, Home: 0, End: last, Enter: selected,
  }[event.key];
  if (target === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  selectRow(Math.min(Math.max(target, 0), last), true, event.key === "Enter" || !isNarrow());
  if (event.key === "Enter") detail.focus();
});

detail.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (isNarrow()) selectRow(-1);
  list.focus();
});

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea")) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
  } else if (event.key === "[" || event.key === "]") {
    const field = byId("step"), next = field.selectedIndex + (event.key === "]" ? 1 : -1);
    field.selectedIndex = Math.min(Math.max(next, 0), field.options.length - 1);
    byId("question").value = "";
    refresh();
  }
});

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  if (["step", "run"].includes(event.target.id)) byId("question").value = "";
  refresh();
});
form.addEventListener("click", (event) => {
  const button = event.target.closest("[data-chip]");
  if (!button) return;
  chip = chip === button.dataset.chip ? "" : button.dataset.chip;
  refresh();
});
form.addEventListener("reset", () => {
  chip = "";
  setTimeout(refresh); // after the fields have been cleared
});

for (const button of form.querySelectorAll("[data-chip]"))
  if (!columns.step.some((_, i) => passesChip[button.dataset.chip](i))) {
    button.disabled = true;
    button.title += ". No completion matches.";
  }
addEventListener("resize", () => { spacer.style.height = shown.length * rowHeight() + "px"; drawList(); });
refresh();
