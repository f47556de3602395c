"use strict";
/* A prediction: its words, and the training rows behind it by method. */
(() => {
  const { el, add, minus, percent, plural, rowLink, shown, textList } = forebear.elements;
  const { markDetails } = forebear.worklist;

  function probabilities(record) {
    const head = record.numbers ? ["output", "number"] : ["class", "probability"];
    return el("table", { class: "probabilities" },
      el("thead", null, el("tr", null, el("th", { scope: "col" }, head[0]), el("th", { scope: "col", class: "n" }, head[1]), el("th", { scope: "col" }, "role"))),
      el("tbody", null, record.probabilities.map(([name, , written, remark]) => el("tr", null,
        el("th", { scope: "row" }, shown(name)), el("td", { class: "n" }, written), el("td", null, remark)))));
  }

  function wordsTable(record) {
    const several = record.texts.length > 1;
    return el("table", null,
      el("thead", null, el("tr", null, el("th", { scope: "col" }, "word"), several ? el("th", { scope: "col" }, "in") : null, el("th", { scope: "col", class: "n" }, "saliency"))),
      el("tbody", null, record.words.map(([text, number, where]) => el("tr", null,
        el("th", { scope: "row", dir: "auto" }, shown(text)), several ? el("td", null, where) : null, el("td", { class: "n" }, minus(number))))));
  }

  function legend(target) {
    const one = (sign, level, words, note) => el("mark", { class: `${sign} s${level}` }, el("span", null, words), el("sup", null, note));
    return el("aside", { class: "legend", "aria-label": "Legend" }, el("ul", null,
      el("li", null, one("supports", 3, "word", "+"), ` solid line: supports \u201c${target}\u201d`),
      el("li", null, one("opposes", 3, "word", "\u2212"), " dashed line: opposes it"),
      el("li", null, "strength: ", one("supports", 3, "strong", "+"), one("supports", 2, "medium", "+"), one("supports", 1, "light", "+"))));
  }

  function rowCard(found, place, others, queries) {
    const link = el("a", { href: `#/row/${found.row}` }, `row ${found.row}`);
    const effects = [found.effect ? ` \u00b7 effect ${minus(found.effect)}` : "", found.effect_probability ? ` \u00b7 probability ${minus(found.effect_probability)}` : ""];
    const card = el("article", { class: "passage" },
      el("h4", null, `${found.rank} \u00b7 `, link, ` \u00b7 score ${minus(found.score)}`, effects,
        found.label === found.prediction ? null : el("span", { class: "note" }, "label and prediction differ")),
      el("dl", { class: "texts" }, textList(found.texts), textList(found.query_texts, { again: true })),
      found.total ? el("ul", { class: "sum", "aria-label": "Contributions of the shared words to the score" },
        found.words.map(([text, number]) => el("li", null, el("span", { class: "token", dir: "auto" }, shown(text)), ` ${minus(number)}`)),
        el("li", { class: "total" }, `${found.words.length ? "sum" : "no shared word"} ${minus(found.total)}`)) : null,
      el("ul", { class: "facts" },
        el("li", null, el("span", null, "label"), shown(found.label)),
        el("li", null, el("span", null, "prediction"), shown(found.prediction)),
        el("li", null, el("span", null, "loss"), found.loss.toPrecision(3)),
        found.hub_share === null ? null : el("li", null, el("span", null, "hub share"), percent(found.hub_share), queries ? ` of ${queries}` : ""),
        others.length ? el("li", null, el("span", null, "also"), others.join(", ")) : null));
    card.append(markDetails(found.row, place, (entry) => card.classList.toggle("marked", Boolean(entry))));
    return card;
  }

  function sides(record, side, of) {
    const places = new Map(); // rows: where each stands, by method
    for (const answer of record.answers) for (const one of answer.sides) for (const found of one.rows) {
      if (!places.has(found.row)) places.set(found.row, []);
      places.get(found.row).push([answer.method, `${one.name} ${found.rank} by ${answer.method}`]);
    }
    return el("div", { class: "methods" }, record.answers.map((answer) => {
      const half = answer.sides.find((one) => one.name === side);
      const id = `${side}-${answer.method}`.replace(/[^a-z0-9-]/gi, "-");
      return el("section", { "aria-labelledby": id }, el("h3", { id }, answer.method),
        answer.asked.length ? el("dl", { class: "texts" }, textList(answer.asked)) : null,
        half.notes.map((note) => el("p", { class: "note-line" }, note)),
        answer.effect_note ? el("details", null, el("summary", null, "What the effects mean"), el("p", { class: "note-line" }, answer.effect_note)) : null,
        half.rows.map((found) => rowCard(found, `${side} ${found.rank} by ${answer.method} of ${of}`,
          [...new Set(places.get(found.row).filter(([method]) => method !== answer.method).map(([, words]) => words))], record.hub_queries)));
    }));
  }

  // All of a prediction below its heading. ``of``: what it is called where a row is marked.
  function predictionParts(main, record, of) {
    add(main,
      record.duplicate ? el("p", { class: "note-line" }, el("span", { class: "note" }, "also a training row"), " ", rowLink(record.duplicate.row, true),
        `, ${record.duplicate.kind}, similarity ${record.duplicate.jaccard.toFixed(2)}`) : null,
      el("section", { "aria-labelledby": "its-text" }, el("h2", { id: "its-text" }, "The text and its words"),
        legend(record.target),
        el("article", { class: "passage query saliency" }, el("dl", { class: "texts" }, textList(record.texts))),
        el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": record.numbers ? "Numbers" : "Probabilities" }, probabilities(record)),
        el("details", null, el("summary", null, `Saliency of ${plural(record.words.length, "word")}`),
          el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": "Saliency" }, wordsTable(record)),
          el("p", { class: "table-note" }, `Saliency by ${record.form}: ${record.formula}. Start and end tokens together: ${minus(record.ends)}.`))),
      el("section", { "aria-labelledby": "proponents" }, el("h2", { id: "proponents" }, "Proponents: training rows that support \u201c", shown(record.target), "\u201d most"), sides(record, "proponent", of)),
      el("section", { "aria-labelledby": "opponents" }, el("h2", { id: "opponents" }, "Opponents: training rows that oppose it most"), sides(record, "opponent", of)));
  }

  forebear.predictions = { predictionParts };
})();
