"use strict";
// Everything that comes from data enters the page as text (textContent), never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));

function add(parent, tag, className = "", text = "") {
  const child = document.createElement(tag);
  if (className) child.className = className;
  if (text) child.textContent = text;
  parent.append(child);
  return child;
}

function addRow(table, cells, tag = "td") {
  const row = add(table, "tr");
  for (const cell of cells) add(row, tag, "", cell);
  return row;
}

function showOverview() {
  find("subtitle").textContent = `${data.prompts.length} prompts, ${data.methods.join(", ")} · ${data.run}`;
  if (Object.keys(data.traces).length) {
    const item = add(find("legend"), "li");
    add(item, "span", "token", "token");
    item.append(" point at one to see the candidates it was chosen from");
  }
  if (data.table) {
    addRow(find("results"), data.table.columns, "th");
    for (const row of data.table.rows) addRow(find("results"), row);
  }
  for (const note of data.notes) add(find("notes"), "li", "", note);
  for (const figure of data.figures) {
    const image = add(find("figures"), "img");
    image.src = figure.source;
    image.alt = image.title = figure.name;
  }
  find("show-results").addEventListener("click", () => {
    find("overview").open = true;
    find("overview").scrollIntoView();
  });
}

// Prompts ------------------------------------------------------------------------------------------------

const known = data.prompts.flatMap((prompt) => prompt.rewards.filter((reward) => reward !== null));
const lowest = known.reduce((a, b) => Math.min(a, b), Infinity);
const highest = known.reduce((a, b) => Math.max(a, b), -Infinity);

function showResponse(parent, prompt, at, column) {
  const isReference = data.methods[column] === data.reference;
  const reward = prompt.rewards[column];
  const card = add(parent, "section", isReference ? "response reference" : "response");
  card.dataset.method = data.methods[column];
  if (!isReference && reward !== null && reward === prompt.best) card.classList.add("best");

  const head = add(card, "div", "response-head");
  add(head, "h2", "", data.methods[column]);
  const chip = add(head, "span", "reward", number(reward, 3));
  if (reward !== null && highest > lowest) {
    chip.style.setProperty("--share", `${(100 * (reward - lowest)) / (highest - lowest)}%`);
  }

  const response = prompt.responses[column];
  const steps = (data.traces[data.methods[column]] || [])[at];
  const text = add(card, "div", "text");
  if (steps) showTokens(text, card, response, steps, column, at);
  else if (response === null) add(text, "span", "dim", isReference ? "no reference" : "no response");
  else text.textContent = response.trim();
  if (prompt.footnotes[column]) add(card, "div", "footnote dim", prompt.footnotes[column]);
}

function showTokens(text, card, response, steps, column, at) {
  const tokens = steps.map((step) => step.tokens[step.chosen]);
  // A character of several tokens, or a tokenizer that strips spaces: show the response itself as well.
  if (response !== null && !tokens.join("").startsWith(response)) {
    text.textContent = response.trim();
    text = add(card, "div", "text footnote dim");
  }
  tokens.forEach((token, step) => {
    const shown = step === 0 ? token.trimStart() : token;
    const span = add(text, "span", "token", shown || "␣");
    Object.assign(span.dataset, { column, at, step });
  });
}

function showPrompt(prompt, at) {
  const article = document.createElement("article");
  article.dataset.prompt = at;
  const left = add(article, "div");
  const head = add(left, "div", "post-head");
  add(head, "h2", "", `#${at + 1}`);
  const key = add(head, "span", "dim");
  add(left, "div", "post", prompt.prompt);

  prompt.best = prompt.rewards.reduce(
    (best, reward, column) =>
      data.methods[column] !== data.reference && reward !== null && (best === null || reward > best) ? reward : best,
    null,
  );
  const responses = add(article, "div", "responses");
  data.methods.forEach((_, column) => showResponse(responses, prompt, at, column));
  const words = [prompt.prompt, ...prompt.responses].join("\n").toLowerCase();
  return { article, key, prompt, words, at };
}

// Sorting, searching, choosing methods --------------------------------------------------------------------

const cards = data.prompts.map(showPrompt);
const hidden = new Set();
let descending = true;

function sortValue(card) {
  const first = find("sort").value;
  const second = find("minus").value;
  if (first === "") return -card.at; // the order of the test prompts
  const reward = card.prompt.rewards[first];
  if (second === "" || reward === null) return reward;
  const other = card.prompt.rewards[second];
  return other === null ? null : reward - other;
}

function update() {
  const terms = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const byOrder = find("sort").value === "";
  const sign = descending ? -1 : 1;
  const valued = cards.map((card) => ({ card, value: sortValue(card) }));
  // Prompts without a value stay at the end, whichever way the others go.
  valued.sort((a, b) =>
    a.value === null || b.value === null
      ? (a.value === null) - (b.value === null) || a.card.at - b.card.at
      : sign * (a.value - b.value) || a.card.at - b.card.at,
  );

  let shown = 0;
  for (const { card, value } of valued) {
    card.article.hidden = !terms.every((term) => card.words.includes(term));
    shown += !card.article.hidden;
    card.key.textContent = byOrder ? "" : find("minus").value === "" ? number(value, 3) : `gap ${number(value, 3)}`;
  }
  find("prompts").replaceChildren(...valued.map(({ card }) => card.article));
  find("minus").disabled = byOrder;
  find("direction").textContent = byOrder ? (descending ? "↓ first to last" : "↑ last to first") :
    descending ? "↓ high to low" : "↑ low to high";
  find("count").textContent = `${shown} of ${cards.length} prompts`;
}

function toggleMethod(method, button) {
  if (!hidden.delete(method)) hidden.add(method);
  button.setAttribute("aria-pressed", String(!hidden.has(method)));
  for (const card of document.querySelectorAll(".response")) card.hidden = hidden.has(card.dataset.method);
}

function setUpToolbar() {
  add(find("sort"), "option", "", "prompt order").value = "";
  add(find("minus"), "option", "", "nothing").value = "";
  data.methods.forEach((method, column) => {
    add(find("sort"), "option", "", `reward of ${method}`).value = column;
    add(find("minus"), "option", "", method).value = column;
    const button = add(find("methods"), "button", "", method);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => toggleMethod(method, button));
  });
  find("search").addEventListener("input", update);
  for (const id of ["sort", "minus"]) find(id).addEventListener("change", update);
  find("direction").addEventListener("click", () => {
    descending = !descending;
    update();
  });
}

// The candidates of a token -------------------------------------------------------------------------------

// log p + w r of each candidate; null where a part of it is not known. A log p of null: it could not be chosen.
function scoresOf(step, weight) {
  return step.log_probs.map((log_p, at) =>
    log_p === null || step.rewards[at] === null ? null : log_p + weight * step.rewards[at],
  );
}

// How probable it was that each candidate would be taken; of none, where a reward is not known.
function probabilitiesOf(step, scores, rule) {
  const possible = step.log_probs.map((log_p) => log_p !== null);
  if (rule.greedy || possible.filter(Boolean).length === 1) return scores.map((_, at) => Number(at === step.chosen));
  if (scores.some((score, at) => possible[at] && score === null)) return scores.map(() => null);
  const highest = Math.max(...scores.filter((score) => score !== null));
  const shares = scores.map((score) => (score === null ? 0 : Math.exp(score - highest)));
  const sum = shares.reduce((a, b) => a + b, 0);
  return shares.map((share) => share / sum);
}

function showCandidates(span) {
  const { column, at, step: number_of_step } = span.dataset;
  const method = data.methods[column];
  const step = data.traces[method][at][number_of_step];
  const rule = data.rules[method]; // an older run does not know it
  const columns = [step.log_probs, step.rewards].map((values) => values.map((value) => number(value)));
  const names = ["candidate", "log p", "reward r"];
  if (rule) {
    const scores = scoresOf(step, rule.weight);
    const probabilities = probabilitiesOf(step, scores, rule);
    columns.push(scores.map((score) => number(score)));
    columns.push(probabilities.map((share) => (share === null ? "–" : `${(100 * share).toFixed(1)}%`)));
    names.push(`log p + ${rule.weight} r`, "probability");
  }

  const box = find("candidates");
  box.replaceChildren();
  const table = add(box, "table");
  addRow(table, names, "th");
  step.tokens.forEach((token, candidate) => {
    const visible = token.replaceAll(" ", "␣").replaceAll("\n", "↵");
    const row = addRow(table, [visible, ...columns.map((values) => values[candidate])]);
    if (candidate === step.chosen) row.className = "chosen";
  });
  if (rule) {
    const how = rule.greedy ? "greedy: the best score is taken" : "sampled from the softmax of the scores";
    add(box, "div", "footnote", `${method}, ${how}`);
  }

  box.hidden = false;
  const token = span.getBoundingClientRect();
  const below = token.bottom + 6 + box.offsetHeight <= innerHeight;
  box.style.top = `${Math.max(4, below ? token.bottom + 6 : token.top - 6 - box.offsetHeight)}px`;
  box.style.left = `${Math.max(4, Math.min(token.left, innerWidth - box.offsetWidth - 12))}px`;
}

document.addEventListener("mouseover", (event) => {
  if (event.target.matches(".text .token")) showCandidates(event.target);
  else find("candidates").hidden = true;
});
document.addEventListener("scroll", () => (find("candidates").hidden = true), true);

showOverview();
setUpToolbar();
update();
