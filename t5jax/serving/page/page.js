// The page of the server: writes answers through the same interface as any other client.
"use strict";

const $ = (id) => document.getElementById(id);
const NUM_ALTERNATIVES = 5;
let models = [];
let tokens = []; // Each with its text, logprob and alternatives.
let selected = -1;
let running = null; // The AbortController of a request.

function headers() {
  const key = $("key").value.trim();
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
}

async function errorOf(response) {
  if (response.status === 401) $("key_field").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await errorOf(response));
    models = (await response.json()).data.filter((model) => model.kind !== "encoder");
  } catch (error) {
    $("about").textContent = `No models: ${error.message}`;
    return;
  }
  const options = models.map((model) => new Option(model.id, model.id));
  $("model").replaceChildren(...options);
  $("about").textContent = models.length
    ? `${models.length} model${models.length > 1 ? "s" : ""} that write${models.length > 1 ? "" : "s"} text`
    : "No model here writes text; /v1/embeddings gives vectors.";
  chooseModel();
}

function chooseModel() {
  const model = models.find((m) => m.id === $("model").value);
  $("chat_field").hidden = !(model && model.has_chat_template);
  $("chat").checked = Boolean(model && model.has_chat_template);
}

// --- Writing -------------------------------------------------------------------------------------

function request() {
  const number = (id) => Number($(id).value);
  const body = {
    model: $("model").value,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    stream: true,
    num_beams: 1,
  };
  if (body.temperature > 0) Object.assign(body, { top_p: number("top_p"), top_k: number("top_k") });
  if ($("seed").value !== "") body.seed = number("seed");
  if ($("stop").value) body.stop = [$("stop").value];
  if ($("chat").checked && !$("chat_field").hidden) {
    body.messages = [{ role: "user", content: $("prompt").value }];
    return ["/v1/chat/completions", { ...body, logprobs: true, top_logprobs: NUM_ALTERNATIVES }];
  }
  return ["/v1/completions", { ...body, prompt: $("prompt").value, logprobs: NUM_ALTERNATIVES }];
}

// Returns the text and the tokens of a piece of either interface.
function read(choice) {
  const found = choice.logprobs;
  if (choice.delta) {
    const content = (found && found.content) || [];
    const entries = content.map((token) => ({
      text: token.token,
      logprob: token.logprob,
      top: token.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
    return [choice.delta.content || "", entries];
  }
  const entries = ((found && found.tokens) || []).map((text, i) => ({
    text,
    logprob: found.token_logprobs[i],
    top: Object.entries(found.top_logprobs[i]),
  }));
  return [choice.text, entries];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function setRunning(controller) {
  running = controller;
  $("write").disabled = Boolean(controller);
  $("stop_button").disabled = !controller;
  $("answer").setAttribute("aria-busy", String(Boolean(controller)));
}

async function write() {
  if (running || !$("form").reportValidity()) return;
  const controller = new AbortController();
  setRunning(controller);
  showError("");
  tokens = [];
  selected = -1;
  $("answer").textContent = "";
  $("tokens").replaceChildren();
  $("alternatives").replaceChildren();
  $("speed").textContent = "Writing…";
  const start = performance.now();
  let first = null;
  let reason = null;
  try {
    const [path, body] = request();
    const response = await fetch(path, {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (!event.choices.length) continue;
      const [text, entries] = read(event.choices[0]);
      if (entries.length && first === null) first = performance.now();
      $("answer").append(text);
      entries.forEach(addToken);
      reason = event.choices[0].finish_reason || reason;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped by you";
    else showError(error.message);
  }
  setRunning(null);
  showSpeed(start, first, performance.now(), reason);
}

const REASONS = { stop: "complete", length: "maximum tokens reached" };

function showSpeed(start, first, end, reason) {
  if (first === null) {
    $("speed").textContent = reason ? `No tokens: ${reason}.` : "";
    return;
  }
  const seconds = (end - start) / 1000;
  $("speed").textContent =
    `${tokens.length} tokens in ${seconds.toFixed(2)} s, ` +
    `${(tokens.length / seconds).toFixed(1)} tokens a second, ` +
    `first after ${((first - start) / 1000).toFixed(2)} s; ${REASONS[reason] || reason || "ended"}.`;
}

// --- Tokens and their alternatives ---------------------------------------------------------------

// What cannot be seen is shown by a sign.
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

function addToken(token) {
  const index = tokens.push(token) - 1;
  const option = document.createElement("span");
  option.className = "token";
  if (token.text.startsWith("token_id:")) option.classList.add("special");
  option.id = `token_${index}`;
  option.setAttribute("role", "option");
  option.setAttribute("aria-selected", "false");
  option.setAttribute("aria-label", `${token.text}, ${percent(token.logprob)}`);
  option.textContent = visible(token.text);
  option.style.setProperty("--p", percent(token.logprob).replace(" ", ""));
  option.addEventListener("click", () => select(index));
  $("tokens").append(option);
}

function select(index) {
  if (index < 0 || index >= tokens.length) return;
  if (selected >= 0) $(`token_${selected}`).setAttribute("aria-selected", "false");
  selected = index;
  const option = $(`token_${index}`);
  option.setAttribute("aria-selected", "true");
  option.scrollIntoView({ block: "nearest" });
  $("tokens").setAttribute("aria-activedescendant", option.id);
  showAlternatives(tokens[index], index);
}

function showAlternatives(token, index) {
  const table = document.createElement("table");
  table.createCaption().textContent = `Token ${index + 1} of ${tokens.length}, and what else it could have been`;
  const head = table.createTHead().insertRow();
  for (const title of ["Token", "Probability", "Log-probability"]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = title;
    head.append(cell);
  }
  const rows = token.top.some(([text]) => text === token.text)
    ? token.top
    : [...token.top, [token.text, token.logprob]];
  const body = table.createTBody();
  for (const [text, logprob] of rows.toSorted((a, b) => b[1] - a[1])) {
    const row = body.insertRow();
    const chosen = text === token.text;
    if (chosen) row.className = "chosen";
    row.insertCell().textContent = visible(text) + (chosen ? " (written)" : "");
    row.insertCell().textContent = percent(logprob);
    row.insertCell().textContent = logprob.toFixed(3);
  }
  $("alternatives").replaceChildren(table);
}

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

$("tokens").addEventListener("keydown", (event) => {
  if (event.key in MOVES) select(selected < 0 ? 0 : selected + MOVES[event.key]);
  else if (event.key === "Home") select(0);
  else if (event.key === "End") select(tokens.length - 1);
  else return;
  event.preventDefault();
});

$("tokens").addEventListener("focus", () => {
  if (selected < 0) select(0);
});

// --- The form ------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("stop_button").addEventListener("click", () => running && running.abort());
$("model").addEventListener("change", chooseModel);
$("key").addEventListener("change", loadModels);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    write();
  } else if (event.key === "Escape" && running) {
    running.abort();
  }
});

loadModels();
