"use strict";
// The completions: a list that draws only the rows in sight, filters, search, and why each earned what it did. Whatever a
// completion holds gets into the page as text nodes alone.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs, questions, answers, columns } = data;
const total = columns.step.length;
const byId = (id) => document.getElementById(id);
const correct = (i) => columns.flags[i] & 1, finished = (i) => columns.flags[i] & 2, clamped = (i) => columns.flags[i] & 4;

// ---------------------------------------------------------------------------------------------------------- small things

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children); // strings become text nodes
  return element;
}

function number(value, digits = 2) {
  if (value === null) return "-";
  const size = Math.abs(value);
  return size >= 1000 ? value.toPrecision(3) : size && size < 0.5 * 10 ** -digits ? value.toPrecision(1) : value.toFixed(digits);
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);

// Characters that cannot be seen, or that move the others: control characters but newline and tab, direction marks, zero widths.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|[\ud800-\udfff]/gu;
const nameOf = (c) => (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
const plain = (text) => text.replace(ODD, nameOf);

// Text with odd characters spelled out and what is searched for marked, as nodes.
function said(text, query) {
  const nodes = [];
  const marked = (part) => {
    const lower = query ? part.toLowerCase() : "";
    if (!query || lower.length !== part.length) return void nodes.push(part); // a letter whose small form is longer
    let from = 0;
    for (let at; (at = lower.indexOf(query, from)) >= 0; from = at + query.length)
      nodes.push(part.slice(from, at), make("mark", "", part.slice(at, at + query.length)));
    nodes.push(part.slice(from));
  };
  let from = 0;
  for (const match of text.matchAll(ODD)) {
    marked(text.slice(from, match.index));
    nodes.push(make("span", "odd-character", nameOf(match[0])));
    from = match.index + match[0].length;
  }
  marked(text.slice(from));
  return nodes;
}

// ------------------------------------------------------------------------------------------------------------- the theme

const themes = ["auto", "light", "dark"];
let theme = "auto";
try { theme = localStorage.getItem("theme") || "auto"; } catch { /* a browser that keeps nothing for files */ }
function showTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `theme: ${theme}`;
}
byId("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  try { localStorage.setItem("theme", theme); } catch { /* as above */ }
  showTheme();
});
showTheme();

// ------------------------------------------------------------------------------------------------------------ the curves

for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const about = JSON.parse(figure.dataset.hover), plot = figure.querySelector(".plot"), values = figure.querySelector(".values");
  const cursor = make("div", "cursor");
  const show = (value) => (value === null ? "-" : about.share ? (100 * value).toFixed(1) + " %" : String(value));
  const stepAt = (event) => {
    const box = plot.getBoundingClientRect(), span = about.right - about.left;
    const step = about.low + (((event.clientX - box.left) / box.width - about.left) / span) * (about.high - about.low);
    const steps = about.curves.flatMap((curve) => curve.steps);
    return steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
  };
  plot.addEventListener("pointermove", (event) => {
    const step = stepAt(event);
    cursor.style.left = 100 * (about.left + ((step - about.low) / (about.high - about.low)) * (about.right - about.left)) + "%";
    plot.append(cursor);
    values.replaceChildren(make("b", "", `step ${step}`));
    for (const curve of about.curves) {
      const at = curve.steps.indexOf(step);
      if (at >= 0) values.append(`  ${curve.label ? curve.label + " " : ""}`, make("b", "", show(curve.values[at])));
    }
  });
  plot.addEventListener("pointerleave", () => { cursor.remove(); values.replaceChildren(); });
  plot.addEventListener("click", (event) => {
    if (event.pointerType === "touch") return; // a tap reads values, as pointing does
    const step = String(stepAt(event)), select = byId("step");
    if (![...select.options].some((option) => option.value === step)) return; // the last evaluation has no completions
    select.value = step;
    refresh();
    byId("rollouts").scrollIntoView();
  });
}

// -------------------------------------------------------------------------------------------------- filters and order

const list = byId("list"), spacer = byId("spacer"), detail = byId("detail"), form = byId("filters"), search = byId("search");
const orderNames = ["-rm_score", "-reward"];
let shown = [];   // completions that pass the filters, in order
let chosen = -1;  // its place in `shown`
let only = "";    // the pressed chip

const median = (values) => (values.length ? values.sort((a, b) => a - b)[values.length >> 1] : null);
// Halfway between what the reward model gives the middle right and the middle wrong answer of each run; null where it cannot be said.
const halfway = runs.map((about, run) => {
  const middle = (verdict) => median(columns.rm_score.filter((_, i) => columns.run[i] === run && correct(i) === verdict));
  const [right, wrong] = [middle(1), middle(0)];
  return !about.scores || right === null || wrong === null ? null : (right + wrong) / 2;
});
const strongest = columns.advantage.map((a) => Math.abs(a)).sort((a, b) => b - a)[Math.floor(total / 10)] || 0;
const is = {
  fooled: (i) => halfway[columns.run[i]] !== null && !correct(i) && columns.rm_score[i] > halfway[columns.run[i]],
  missed: (i) => halfway[columns.run[i]] !== null && correct(i) && columns.rm_score[i] < halfway[columns.run[i]],
  cut: (i) => !finished(i),
  unread: (i) => columns.parsed[i] === null,
  strong: (i) => columns.advantage[i] !== 0 && Math.abs(columns.advantage[i]) >= strongest,
};
const orderOf = { fooled: "rm_score", missed: "-rm_score", strong: "advantage" };

let lowered = null; // made at the first search
const haystack = (i) => lowered[i];
function lower() {
  const small = questions.map((question, q) => `${question}\n${answers[q]}\n`.toLowerCase());
  lowered = columns.completion.map((text, i) => `${small[columns.question[i]]}${columns.parsed[i] ?? ""}\n${text}`.toLowerCase());
}

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}
byId("step").append(...[...new Set(columns.step)].sort((a, b) => a - b).map((step) => option(step, step)));

// The questions of the chosen run and step; of all steps there would be too many to choose from.
function fillQuestions(run, step, question) {
  const asked = new Set();
  if (step !== "") for (let i = 0; i < total; i++) if (columns.step[i] === +step && (run === "" || columns.run[i] === +run)) asked.add(columns.question[i]);
  if (question !== "") asked.add(+question);
  const label = (q) => (questions[q].length > 60 ? plain(questions[q]).slice(0, 60) + "..." : plain(questions[q]));
  byId("question").replaceChildren(option("", step === "" && question === "" ? "all (choose a step first)" : "all"), ...[...asked].map((q) => option(q, label(q))));
  byId("question").value = question;
}

function refresh(keep = -1) {
  const run = byId("run")?.value ?? "", step = byId("step").value, verdict = byId("verdict").value, query = search.value.trim().toLowerCase();
  let question = byId("question").value;
  fillQuestions(run, step, question);
  if (query && !lowered) lower();
  const passes = is[only];
  shown = [];
  for (let i = 0; i < total; i++)
    if (
      (run === "" || columns.run[i] === +run) && (step === "" || columns.step[i] === +step) && (question === "" || columns.question[i] === +question) &&
      (verdict === "" || correct(i) === +verdict) && (!passes || passes(i)) && (!query || haystack(i).includes(query))
    ) shown.push(i);
  const order = byId("order").value || orderOf[only] || "";
  if (order) {
    const column = columns[order.replace("-", "")], sign = orderNames.includes(order) ? 1 : -1;
    const key = order === "advantage" ? (i) => Math.abs(column[i]) : (i) => column[i];
    shown.sort((a, b) => sign * (key(a) - key(b)) || a - b);
  }
  for (const chip of form.querySelectorAll("[data-only]")) chip.setAttribute("aria-pressed", chip.dataset.only === only);
  const right = shown.reduce((sum, i) => sum + correct(i), 0);
  const thinned = runs.some((r) => r.kept < r.steps) ? ` This page holds ${runs.map((r) => `${r.kept} of ${r.steps}`).join(" and ")} steps; rollouts.jsonl has them all.` : "";
  byId("count").textContent = total
    ? `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")} completions` + (shown.length ? `, ${Math.round((100 * right) / shown.length)} % right.` : ".") + thinned
    : "No completion has been written yet.";
  spacer.style.height = shown.length * rowHeight() + "px";
  list.scrollTop = 0;
  choose(keep >= 0 ? shown.indexOf(keep) : shown.length && !narrow() ? 0 : -1, keep >= 0, false);
}

// -------------------------------------------------------------------------------------------------------------- the list

const rowHeight = () => parseFloat(getComputedStyle(list).getPropertyValue("--row"));
const narrow = () => matchMedia("(max-width: 760px)").matches;

// Rewards of all completions on one axis, so that bars can be compared.
let [least, most] = [0, 0];
for (const r of columns.reward) { least = Math.min(least, r); most = Math.max(most, r); }
for (const r of columns.r_hat) { least = Math.min(least, r); most = Math.max(most, r); }
const margin = (most - least) * 0.03 || 1;
[least, most] = [least - margin, most + margin];
const along = (value) => (100 * (Math.min(Math.max(value, least), most) - least)) / (most - least);

function piece(className, from, to = null) {
  const element = make("i", className);
  element.style.left = along(Math.min(from, to ?? from)) + "%";
  if (to !== null) element.style.width = Math.abs(along(to) - along(from)) + "%";
  return element;
}

// The band of r_hat that a verdict opens.
function bandOf(i) {
  const run = runs[columns.run[i]];
  if (run.reward_mode !== "hybrid") return [0, 1];
  return correct(i) ? [1 - run.beta, 1 + run.beta] : [-run.alpha, run.alpha];
}

function bar(i, parts = ["band", "fill", "tick"]) {
  const verdict = correct(i) ? "right" : "wrong";
  const element = make("span", "why");
  if (parts.includes("band")) element.append(piece(`band ${verdict}`, ...bandOf(i)));
  if (parts.includes("fill")) element.append(piece(`fill ${verdict}`, 0, columns.reward[i]));
  element.append(piece("zero", 0));
  if (parts.includes("tick")) element.append(piece("tick", columns.r_hat[i]));
  return element;
}

function cell(text, label, className = "cell") {
  const element = make("span", className, text);
  if (label) element.dataset.label = label;
  return element;
}

function row(place) {
  const i = shown[place], verdict = correct(i) ? "right" : "wrong", scores = runs[columns.run[i]].scores;
  const element = make(
    "div", "row" + (columns.group[i] % 2 ? " odd" : ""),
    cell(String(columns.step[i])),
    make("span", `mark is-${verdict}`, correct(i) ? "\u2713" : "\u2717"),
    make("span", "text" + (finished(i) ? "" : " cut"), make("small", "", plain(questions[columns.question[i]]).slice(0, 300)), make("span", "", plain(columns.completion[i].slice(0, 400)) || "(nothing)")),
    cell(columns.parsed[i] === null ? "none" : plain(columns.parsed[i]).slice(0, 60), "", `cell is-${verdict}`),
    cell(scores ? number(columns.rm_score[i], 1) + (clamped(i) ? "*" : "") : "-"),
    cell(number(columns.r_hat[i])),
    cell("\u00d7" + number(columns.weight[i])),
    cell(signed(columns.reward[i]), "reward"),
    cell(signed(columns.advantage[i]), "advantage"),
    bar(i),
  );
  element.id = `row-${place}`;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", place === chosen);
  element.setAttribute("aria-posinset", place + 1);
  element.setAttribute("aria-setsize", shown.length);
  element.setAttribute("aria-label", `step ${columns.step[i]}, ${verdict}, ${plain(questions[columns.question[i]])}, reward ${number(columns.reward[i])}, advantage ${number(columns.advantage[i])}`);
  element.style.top = place * rowHeight() + "px";
  element.dataset.place = place;
  return element;
}

function draw() {
  const height = rowHeight(), first = Math.max(0, Math.floor(list.scrollTop / height) - 4);
  const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / height) + 9);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(row(place));
  list.replaceChildren(spacer, ...rows);
}

function choose(place, scroll = true, open = true) {
  chosen = place;
  if (place >= 0 && scroll) {
    const height = rowHeight(), top = place * height;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
  }
  draw();
  if (place >= 0) list.setAttribute("aria-activedescendant", `row-${place}`);
  else list.removeAttribute("aria-activedescendant");
  detail.hidden = place < 0 || (narrow() && !open);
  if (!detail.hidden) explain(shown[place]);
}

// ----------------------------------------------------------------------------------------------- why it earned what it did

function explain(i) {
  const run = runs[columns.run[i]], q = columns.question[i], query = search.value.trim().toLowerCase(), verdict = correct(i) ? "right" : "wrong";
  const group = [];
  for (let j = 0; j < total; j++) if (columns.group[j] === columns.group[i]) group.push(j);
  const mean = group.reduce((sum, j) => sum + columns.reward[j], 0) / group.length;
  const over = columns.reward[i] - mean, divisor = columns.advantage[i] ? over / columns.advantage[i] : null;
  const parsed = columns.parsed[i] === null ? "no final answer found" : `reads ${plain(columns.parsed[i]).slice(0, 200)}`;
  const close = make("button", "close", "close");
  close.type = "button";
  close.addEventListener("click", () => { choose(-1); list.focus(); });
  const same = make("button", "", "this question in all steps"), here = make("button", "", "this step");
  same.type = here.type = "button";
  same.addEventListener("click", () => { byId("step").value = ""; fillQuestions("", "", String(q)); refresh(i); });
  here.addEventListener("click", () => { byId("step").value = columns.step[i]; byId("question").value = ""; refresh(i); });

  const steps = make("div", "steps");
  const line = (drawing, ...words) => steps.append(make("span", "", ...words), drawing);
  const bold = (text) => make("b", "", text);
  const [low, high] = bandOf(i);
  if (run.reward_mode === "hybrid") {
    line(bar(i, ["band"]), "The verdict, ", make("b", `is-${verdict}`, verdict), ", opens the band from ", bold(number(low)), " to ", bold(number(high)), ".");
    if (run.scores) {
      const bounds = run.rm_bounds === "group" ? "between the lowest and highest of its question and verdict" : run.bounds ? `between the bounds ${number(run.bounds[0], 1)} and ${number(run.bounds[1], 1)}` : "between the bounds";
      const held = clamped(i) ? ", held at the nearer bound," : "";
      line(bar(i, ["band", "tick"]), "The RM score ", bold(number(columns.rm_score[i])), held, ` lies ${Math.round(100 * columns.n[i])} % of the way ${bounds}: r_hat is `, bold(number(columns.r_hat[i])), ".");
    } else line(bar(i, ["band", "tick"]), "There is no reward model, so r_hat is the band's lower end, ", bold(number(columns.r_hat[i])), ".");
    const bar_ = run.sigma_bar[columns.step[i]];
    const why = run.reward_scorer === "tanh" ? "by its own r_hat" : `its question's scores spread by ${number(columns.sigma_u[i])}` + (bar_ === undefined ? "" : `, the usual is ${number(bar_)}`);
    line(bar(i), "The weight is ", bold("\u00d7" + number(columns.weight[i])), ` (${why}): the reward is `, bold(signed(columns.reward[i])), ".");
  } else if (run.reward_mode === "verifier") line(bar(i), "The verdict, ", make("b", `is-${verdict}`, verdict), ", alone is the reward: ", bold(number(columns.reward[i])), ".");
  else line(bar(i), "The RM score ", bold(number(columns.rm_score[i])), " alone is the reward, as its place between the bounds: ", bold(number(columns.reward[i])), ".");
  const scale = { batch: "the std of the step's rewards", group: "the std of the group's rewards", none: "" }[run.advantage_scale];
  const dots = make("span", "why");
  for (const j of group) { const dot = piece("tick", columns.reward[j]); dot.style.opacity = j === i ? 1 : 0.3; dots.append(dot); }
  dots.append(piece(`fill ${over >= 0 ? "right" : "wrong"}`, mean, columns.reward[i]));
  line(dots, `The ${group.length} completions of its group earned `, bold(number(mean)), " on the mean, this one ", bold(number(Math.abs(over))), over < 0 ? " less" : " more", ...(scale && divisor ? [`, in units of ${scale} (${number(divisor)})`] : []), ": the advantage is ", bold(signed(columns.advantage[i])), columns.advantage[i] > 0 ? ", so it becomes more likely." : columns.advantage[i] < 0 ? ", so it becomes less likely." : ", so it teaches nothing.");

  const table = make("table", "group"), body = make("tbody");
  table.append(make("thead", "", make("tr", "", ...["", "answer read", "RM score", "reward", "advantage"].map((name) => make("th", "", name)))), body);
  for (const j of group) {
    const jump = make("button", `mark is-${correct(j) ? "right" : "wrong"}`, correct(j) ? "\u2713" : "\u2717");
    jump.type = "button";
    jump.title = "show this one";
    const tr = make("tr", j === i ? "here" : "", make("td", "", jump), make("td", "", columns.parsed[j] === null ? "none" : plain(columns.parsed[j]).slice(0, 60)), make("td", "", run.scores ? number(columns.rm_score[j]) : "-"), make("td", "", signed(columns.reward[j])), make("td", "", signed(columns.advantage[j])));
    tr.addEventListener("click", () => { if (!shown.includes(j)) { form.reset(); only = ""; refresh(j); } else choose(shown.indexOf(j)); });
    body.append(tr);
  }
  const heading = make("span", "", runs.length > 1 ? `${run.name}, ` : "", `step ${columns.step[i]}: `, make("span", `is-${verdict}`, `${correct(i) ? "\u2713" : "\u2717"} ${verdict}`), `, ${parsed}`);
  detail.replaceChildren(
    make("h3", "", heading, close),
    make("h4", "", `question (the true answer is ${plain(answers[q]).slice(0, 200)})`), make("p", "said", ...said(questions[q], query)),
    make("h4", "", `completion, ${columns.tokens[i]} tokens` + (finished(i) ? "" : ", cut off by a length limit")), make("p", "said completion", ...said(columns.completion[i], query)),
    make("h4", "", "why this reward"), steps,
    make("h4", "", "the group"), table,
    make("p", "", same, " ", here),
  );
  detail.scrollTop = 0;
}

// -------------------------------------------------------------------------------------------------------------- the hands

let waiting = false;
list.addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
});
list.addEventListener("click", (event) => {
  const element = event.target.closest(".row");
  if (element) { choose(+element.dataset.place, false); if (narrow()) detail.focus(); }
});
list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / rowHeight()) - 1), last = shown.length - 1;
  const to = { ArrowDown: chosen + 1, j: chosen + 1, ArrowUp: chosen - 1, k: chosen - 1, PageDown: chosen + page, PageUp: chosen - page, Home: 0, End: last, Enter: chosen }[event.key];
  if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(Math.min(Math.max(to, 0), last), true, event.key === "Enter" || !narrow());
  if (event.key === "Enter") detail.focus();
});
detail.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (narrow()) choose(-1);
  list.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const select = byId("step");
  if (event.key === "/") { event.preventDefault(); search.focus(); }
  else if (event.key === "[" || event.key === "]") {
    select.selectedIndex = Math.min(Math.max(select.selectedIndex + (event.key === "]" ? 1 : -1), 0), select.options.length - 1);
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
  const chip = event.target.closest("[data-only]");
  if (chip) { only = only === chip.dataset.only ? "" : chip.dataset.only; refresh(); }
});
form.addEventListener("reset", () => { only = ""; setTimeout(refresh); }); // once the fields are empty
for (const chip of form.querySelectorAll("[data-only]"))
  if (!columns.step.some((_, i) => is[chip.dataset.only](i))) { chip.disabled = true; chip.title += ". There is none."; }
addEventListener("resize", () => { spacer.style.height = shown.length * rowHeight() + "px"; draw(); });
refresh();
