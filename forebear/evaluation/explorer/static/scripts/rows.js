"use strict";
/* The page of a training row. */
(() => {
  const { el, add, minus, grouped, plural, testLink, rowLink, missingPage, shown, shownText, cut, textNode, textList } = forebear.elements;
  const { testLines, trainingRow } = forebear.records;
  const { markForm } = forebear.worklist;
  const { asking } = forebear.asking;
  const { verdict, outcome } = forebear.tests;

  async function rowPage(main, row) {
    const record = await trainingRow(row);
    if (!record) return missingPage(main, `Training row ${row} is listed for no test row here, so this site holds nothing on it.`);
    const { duplicates } = record;
    const fact = (name, ...value) => el("li", null, el("span", null, name), value);
    const tests = new Set(record.drives.map((drive) => drive.test));
    const lines = await testLines();
    const drives = (side) => {
      const held = record.drives.filter((drive) => drive.side === side);
      const by = new Map();
      for (const drive of held) by.set(drive.test, [...(by.get(drive.test) ?? []), drive]);
      return el("section", { "aria-labelledby": `drives-${side}` }, el("h3", { id: `drives-${side}` }, `As ${side}: ${plural(by.size, "test row")}`),
        by.size ? el("ul", { class: "lines" }, [...by].sort(([a], [b]) => a - b).map(([number, places]) => {
          const line = lines[number];
          return el("li", null, el("div", null, testLink(number), verdict(line), outcome(line), el("ul", { class: "facts" }, places.map((one) => el("li", null,
            `${one.method}: rank ${one.rank}, score ${minus(one.score)}${one.effect ? `, effect ${minus(one.effect)}` : ""}`)))),
            el("div", null, line.texts.map((text) => textNode("p", cut([[text]], 300).concat(text.length > 300 ? [["\u2026"]] : [])))));
        })) : null);
    };
    const marking = el("div");
    const article = el("article", { class: "passage query" }, el("dl", { class: "texts" }, textList(record.texts)));
    marking.append(markForm(record, "", (entry) => article.classList.toggle("marked", Boolean(entry))));
    add(main,
      el("nav", { class: "pager", "aria-label": "Back" }, forebear.site.n_tests ? el("a", { href: "#/" }, "List of test rows") : null, asking.last ? el("a", { href: "#/asked" }, "The text that was explained") : null, el("a", { href: "#/work" }, "Work list")),
      el("h1", { tabindex: -1 }, `Training row ${record.row}`),
      el("p", { class: "summary" }, !forebear.site.n_tests ? "" : `Listed for ${grouped(tests.size)} of ${plural(record.n_explained ?? forebear.site.n_tests, "test row")} among the ${forebear.site.top} at either end, by any method.`,
        record.n_explained < record.n_tests ? ` Explained for this: ${grouped(record.n_explained)} of ${plural(record.n_tests, "test row")}.` : ""),
      article,
      el("ul", { class: "facts" }, fact("label", shown(record.label)), fact("prediction", shown(record.prediction)), fact("loss", record.loss.toPrecision(3)),
        record.probability === null ? null : fact("probability of the label", record.probability.toFixed(4)),
        record.suggested === null ? null : fact("suggested", shown(record.suggested)),
        fact("from", shown(record.source), record.source_row === null ? "" : `, row ${record.source_row} (from 0)`),
        record.columns.map(([name, value]) => fact(name, el("bdi", null, shown(value))))),
      el("div", { class: "two" },
        el("div", null,
          el("h2", null, "What speaks against its label"), el("p", null, `${shownText(record.evidence)}.`),
          duplicates ? [el("h2", null, `Duplicates: ${plural(duplicates.n_rows, "row")}, ${duplicates.kind}${duplicates.conflict ? ", of different labels" : ""}`),
            el("ul", { class: "facts" }, duplicates.rows.map((other) => el("li", null, rowLink(other))), duplicates.n_rows > duplicates.rows.length ? el("li", null, "and more") : null)] : null),
        el("div", null, el("h2", null, "Mark it"), marking)),
      forebear.site.n_tests ? [el("h2", null, "Predictions that it drives"), drives("proponent"), drives("opponent")] : null);
    return `Training row ${row}`;
  }

  forebear.rows = { rowPage };
})();
