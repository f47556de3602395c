"use strict";
/* The list of test rows, and the page of each. */
(() => {
  const { el, add, field, grouped, plural, testLink, missingPage, shown, cut, textNode } = forebear.elements;
  const { testLines, prediction } = forebear.records;
  const { predictionParts } = forebear.predictions;

  const PAGE_LINES = 50;
  const filter = { text: "", show: "all", label: "", predicted: "", least: 0.9, page: 0 };

  function passes(line) {
    const sure = line.probability !== null && line.probability >= filter.least;
    const fits = {
      all: true, wrong: line.wrong === true, right: line.wrong === false, sure: line.wrong === true && sure, duplicate: line.duplicate,
    }[filter.show];
    const text = filter.text.trim().toLocaleLowerCase();
    return fits && (!filter.label || line.label === filter.label) && (!filter.predicted || line.prediction === filter.predicted)
      && (!text || line.texts.some((one) => one.toLocaleLowerCase().includes(text)));
  }

  function verdict(record) {
    if (record.wrong === null) return null;
    return el("span", { class: record.wrong ? "note wrong" : "note" }, record.wrong ? "wrong" : "right");
  }

  function outcome(record) {
    return el("ul", { class: "facts" },
      record.label === null ? null : el("li", null, el("span", null, "label"), shown(record.label)),
      el("li", null, el("span", null, "predicted"), shown(record.prediction)),
      record.probability === null ? null : el("li", null, el("span", null, "probability"), record.probability.toFixed(4)));
  }

  async function listPage(main) {
    const { site } = forebear;
    const lines = await testLines();
    const n_wrong = lines.filter((line) => line.wrong).length;
    const single = site.one_label;
    const list = el("ul", { class: "lines" });
    const count = el("p", { class: "count", role: "status" });
    const pager = el("nav", { class: "pager", "aria-label": "Parts of the list" });
    const change = (name, read) => (event) => { filter[name] = read(event.target.value); filter.page = 0; draw(); };
    const choice = (title, name, values) => field(title, el("select", { onchange: change(name, String) },
      values.map(([value, words]) => el("option", { value, selected: filter[name] === value }, words))));
    const names = (held) => [["", "any"], ...[...new Set(lines.map((line) => line[held]).filter((name) => name !== null))].sort().map((name) => [name, name])];
    const shows = [["all", "all"], ...(site.labelled ? [["wrong", "wrong"], ...(single ? [["sure", "confident and wrong"]] : []), ["right", "right"]] : []), ["duplicate", "also a training row"]];
    const kinds = names("label").length <= 101 && !site.numbers;
    add(main,
      el("h1", { tabindex: -1 }, "Test rows"),
      el("p", { class: "summary" }, `${plural(site.n_tests, "test row")} of ${site.test}${site.labelled && !site.numbers ? `, ${grouped(n_wrong)} predicted wrongly` : ""}.`),
      el("form", { class: "filters", role: "search", "aria-label": "Filter test rows", onsubmit: (event) => event.preventDefault() },
        field("Text contains", el("input", { type: "search", value: filter.text, oninput: change("text", String) }), "field wide"),
        choice("Show", "show", shows),
        single ? field("Confident from", el("input", { type: "number", min: 0, max: 1, step: 0.01, value: filter.least, oninput: change("least", Number) })) : null,
        kinds && site.labelled ? choice("Label", "label", names("label")) : null,
        kinds ? choice("Predicted", "predicted", names("prediction")) : null),
      count, list, pager);
    function draw() {
      const found = lines.filter(passes);
      const n_pages = Math.max(1, Math.ceil(found.length / PAGE_LINES));
      filter.page = Math.min(filter.page, n_pages - 1);
      const first = filter.page * PAGE_LINES;
      count.textContent = found.length === lines.length ? `All ${plural(lines.length, "test row")}.` : `${grouped(found.length)} of ${plural(lines.length, "test row")}.`;
      list.replaceChildren(...found.slice(first, first + PAGE_LINES).map((line) => el("li", null,
        el("div", null, testLink(line.number), verdict(line),
          line.duplicate ? el("span", { class: "note" }, "also a training row") : null, outcome(line)),
        el("div", null, line.texts.map((text) => textNode("p", cut([[text]], 300).concat(text.length > 300 ? [["\u2026"]] : [])))))));
      const turn = (by, words) => el("button", { type: "button", disabled: filter.page + by < 0 || filter.page + by >= n_pages, onclick: () => {
        filter.page += by;
        draw();
        list.querySelector("a").focus();
      } }, words);
      pager.replaceChildren(...(n_pages > 1 ? [turn(-1, "Previous"), `Part ${filter.page + 1} of ${n_pages}`, turn(1, "Next")] : []));
    }
    draw();
    return "Test rows";
  }
  async function testPage(main, number) {
    const record = await prediction(number);
    if (!record) return missingPage(main, `There is no test row ${number} here.`);
    const found = (await testLines()).filter(passes).map((line) => line.number);
    const at = found.indexOf(number);
    const step = (to, words) => (to === undefined ? null : el("a", { href: `#/test/${to}` }, words));
    add(main,
      el("nav", { class: "pager", "aria-label": "Test rows" }, el("a", { href: "#/" }, "List of test rows"),
        at > 0 ? step(found[at - 1], "Previous") : null, at >= 0 ? step(found[at + 1], "Next") : null),
      el("h1", { tabindex: -1 }, `Test row ${grouped(number)}: `, shown(record.title), verdict(record)),
      el("p", { class: "summary" }, record.label === null ? "" : `Labelled \u201c${record.label}\u201d. `, shown(record.summary)));
    predictionParts(main, record, `test row ${number}`);
    return `Test row ${number}`;
  }

  forebear.tests = { verdict, outcome, listPage, testPage };
})();
