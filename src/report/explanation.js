// Why a completion got its reward: as a bar, and in words next to the list.

const detail = byId("detail");

// ------------------------------------------------------------------------------------------------------ bars

// All bars share one axis, so that they can be compared.
let [axisStart, axisEnd] = [0, 0];
for (const column of [columns.reward, columns.r_hat])
  for (const value of column) {
    axisStart = Math.min(axisStart, value);
    axisEnd = Math.max(axisEnd, value);
  }
const margin = (axisEnd - axisStart) * 0.03 || 1;
[axisStart, axisEnd] = [axisStart - margin, axisEnd + margin];

// A value's place on the axis, in percent.
function placeOf(value) {
  return (100 * (Math.min(Math.max(value, axisStart), axisEnd) - axisStart)) / (axisEnd - axisStart);
}

function piece(className, from, to = null) {
  const element = make("i", className);
  element.style.left = placeOf(Math.min(from, to ?? from)) + "%";
  if (to !== null) element.style.width = Math.abs(placeOf(to) - placeOf(from)) + "%";
  return element;
}

// The band of the verdict, in which r_hat lies.
function bandOf(i) {
  const run = runs[columns.run[i]];
  if (run.reward_mode !== "hybrid") return [0, 1];
  return isRight(i) ? [1 - run.beta, 1 + run.beta] : [-run.alpha, run.alpha];
}

function bar(i, parts = ["band", "fill", "tick"]) {
  const element = make("span", "why");
  if (parts.includes("band")) element.append(piece(`band ${verdictOf(i)}`, ...bandOf(i)));
  if (parts.includes("fill")) element.append(piece(`fill ${verdictOf(i)}`, 0, columns.reward[i]));
  element.append(piece("zero", 0));
  if (parts.includes("tick")) element.append(piece("tick", columns.r_hat[i]));
  return element;
}

// -------------------------------------------------------------------------------------------------- in words

const bold = (text) => make("b", "", text);
const verdictWord = (i) => make("b", `is-${verdictOf(i)}`, verdictOf(i));

// Lines that explain the way from the verdict to the reward, each with its bar.
function rewardLines(i) {
  const run = runs[columns.run[i]];
  const score = bold(number(columns.rm_score[i])), reward = bold(number(columns.reward[i]));
  const onlyVerdict = ". Nothing else counts, so the reward is ";
  const onlyScore = ", counts. The reward is its position between the bounds, ";
  if (run.reward_mode === "verifier")
    return [[bar(i), "The verdict is ", verdictWord(i), onlyVerdict, reward, "."]];
  if (run.reward_mode === "rm") return [[bar(i), "Only the RM score, ", score, onlyScore, reward, "."]];
  return [bandLine(i), run.scores ? scoreLine(i, score) : noScoreLine(i), weightLine(i)];
}

function bandLine(i) {
  const [low, high] = bandOf(i).map((end) => bold(number(end)));
  const places = ", which places r_hat in the band from ";
  return [bar(i, ["band"]), "The verdict is ", verdictWord(i), places, low, " to ", high, "."];
}

function scoreLine(i, score) {
  const run = runs[columns.run[i]];
  let way = "from the lower to the upper bound";
  if (run.rm_bounds === "group") way = "from the lowest to the highest score for this question and verdict";
  else if (run.bounds) {
    const [low, high] = run.bounds.map((bound) => number(bound, 1));
    way = `from the lower bound ${low} to the upper bound ${high}`;
  }
  const clamped = isClamped(i) ? ", clamped to the nearer bound," : "";
  const lies = `${clamped} lies ${Math.round(100 * columns.n[i])}% of the way ${way}, so r_hat is `;
  return [bar(i, ["band", "tick"]), "The RM score ", score, lies, bold(number(columns.r_hat[i])), "."];
}

function noScoreLine(i) {
  const words = "There is no reward model, so r_hat is the lower end of the band, ";
  return [bar(i, ["band", "tick"]), words, bold(number(columns.r_hat[i])), "."];
}

function weightLine(i) {
  const run = runs[columns.run[i]], sigmaBar = run.sigma_bar[columns.step[i]];
  let why = "which depends on r_hat";
  if (run.reward_scorer !== "tanh") {
    why = `because the scores of this question have a std of ${number(columns.sigma_u[i])}`;
    if (sigmaBar !== undefined) why += `; the mean std so far is ${number(sigmaBar)}`;
  }
  const weight = bold("\u00d7" + number(columns.weight[i])), reward = bold(signed(columns.reward[i]));
  return [bar(i), "The weight is ", weight, ` (${why}), so the reward is `, reward, "."];
}

// The line that explains the way from the rewards of the group to the advantage.
function advantageLine(i, group) {
  const run = runs[columns.run[i]], reward = columns.reward[i], advantage = columns.advantage[i];
  const mean = group.reduce((sum, j) => sum + columns.reward[j], 0) / group.length;
  const difference = reward - mean, divisor = advantage ? difference / advantage : null;
  const scales = { batch: "the std of the step's rewards", group: "the std of the group's rewards" };
  const scale = scales[run.advantage_scale];
  const bars = make("span", "why");
  for (const j of group) {
    const tick = piece("tick", columns.reward[j]);
    tick.style.opacity = j === i ? 1 : 0.3;
    bars.append(tick);
  }
  bars.append(piece(`fill ${difference >= 0 ? "right" : "wrong"}`, mean, reward));
  let effect = "teaches nothing";
  if (advantage) effect = advantage > 0 ? "becomes more likely" : "becomes less likely";
  return [
    bars,
    `The mean reward of the ${group.length} completions in this group is `, bold(number(mean)),
    ". This one earned ", bold(number(Math.abs(difference))), difference < 0 ? " less" : " more",
    scale && divisor ? `; after division by ${scale} (${number(divisor)}), ` : ": ",
    "the advantage is ", bold(signed(advantage)), `, so this completion ${effect}.`,
  ];
}

function groupTable(i, group) {
  const run = runs[columns.run[i]];
  const names = ["", "answer", "RM score", "reward", "advantage"].map((name) => make("th", "", name));
  const body = make("tbody");
  for (const j of group) {
    const show = makeButton(`mark is-${verdictOf(j)}`, checkMark(j));
    show.title = "show this completion";
    const answer = columns.parsed[j] === null ? "none" : visible(columns.parsed[j]).slice(0, 60);
    const score = run.scores ? number(columns.rm_score[j]) : "-";
    const cells = [show, answer, score, signed(columns.reward[j]), signed(columns.advantage[j])];
    const tr = make("tr", j === i ? "here" : "", ...cells.map((content) => make("td", "", content)));
    tr.addEventListener("click", () => showCompletion(j));
    body.append(tr);
  }
  return make("table", "group", make("thead", "", make("tr", "", ...names)), body);
}

// Show everything that is known about a completion.
function explain(i) {
  const run = runs[columns.run[i]], q = columns.question[i], query = search.value.trim().toLowerCase();
  const group = [];
  for (let j = 0; j < total; j++) if (columns.group[j] === columns.group[i]) group.push(j);

  const parsed = columns.parsed[i];
  const answer = parsed === null ? "no final answer found" : `final answer ${visible(parsed).slice(0, 200)}`;
  const verdict = make("span", `is-${verdictOf(i)}`, `${checkMark(i)} ${verdictOf(i)}`);
  const runName = runs.length > 1 ? `${run.name}, ` : "";
  const heading = make("span", "", runName, `step ${columns.step[i]}: `, verdict, ", ", answer);
  const close = makeButton("close", "close");
  close.addEventListener("click", () => { selectRow(-1); list.focus(); });

  const reasons = make("div", "reasons");
  for (const [drawing, ...words] of [...rewardLines(i), advantageLine(i, group)])
    reasons.append(make("span", "", ...words), drawing);

  const sameQuestion = makeButton("", "this question in all steps");
  const sameStep = makeButton("", "all completions of this step");
  sameQuestion.addEventListener("click", () => {
    byId("step").value = "";
    fillQuestions("", "", String(q));
    refresh(i);
  });
  sameStep.addEventListener("click", () => {
    byId("step").value = columns.step[i];
    byId("question").value = "";
    refresh(i);
  });

  const truncated = isFinished(i) ? "" : ", truncated by a length limit";
  detail.replaceChildren(
    make("h3", "", heading, close),
    make("h4", "", `question (the true answer is ${visible(answers[q]).slice(0, 200)})`),
    make("p", "verbatim", ...textNodes(questions[q], query)),
    make("h4", "", `completion, ${columns.tokens[i]} tokens${truncated}`),
    make("p", "verbatim completion", ...textNodes(columns.completion[i], query)),
    make("h4", "", "why it got this reward"),
    reasons,
    make("h4", "", "its group"),
    groupTable(i, group),
    make("p", "", sameQuestion, " ", sameStep),
  );
  detail.scrollTop = 0;
}
