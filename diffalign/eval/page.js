const fields = ["tag", "verdict", "run", "words"].map((id) => document.getElementById(id));
const cards = [...document.querySelectorAll("article")];

function fits(card, tag, verdict, run, words) {
  const texts = card.dataset.scores.split(" ");
  const score = texts[run] === "" ? NaN : Number(texts[run]);
  if (tag && card.dataset.tag !== tag) return false;
  if (words && !card.querySelector("h3").textContent.toLowerCase().includes(words)) return false;
  if (verdict === "some") return score < 0.99;
  if (verdict === "none") return score < 0.01;
  if (verdict === "full") return score >= 0.99;
  if (verdict === "differ") return new Set(texts).size > 1;
  return true;
}

function show() {
  const [tag, verdict, run, words] = fields.map((field) => field.value);
  let count = 0;
  for (const card of cards) {
    card.hidden = !fits(card, tag, verdict, Number(run), words.trim().toLowerCase());
    count += !card.hidden;
  }
  document.getElementById("count").textContent = `${count} of ${cards.length} prompts`;
}

// a link like index.html#tag=counting&verdict=none opens with these filters
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const field = fields.find((one) => one.id === name);
  if (field) field.value = value;
}
for (const field of fields) field.addEventListener("input", show);
show();
