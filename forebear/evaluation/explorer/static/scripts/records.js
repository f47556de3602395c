"use strict";
/* Records of test rows, predictions and training rows: from scripts beside the page, or from the server. */
(() => {
  const { el } = forebear.elements;

  const loading = new Map(); // promises of chunks of records, by name
  const arrived = new Map(); // what resolves them
  forebear.add = (kind, number, records) => arrived.get(`${kind}-${number}`)?.(records);

  const server = { index: "", token: "" };

  // Asks the server, where there is one: the value of its JSON.
  async function ask(place, { method = "GET", body } = {}) {
    const headers = server.token ? { authorization: `Bearer ${server.token}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    const address = server.index && place.startsWith("explorer/") ? `${place}?index=${encodeURIComponent(server.index)}` : place;
    const answer = await fetch(address, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.status === 204) return null;
    const value = await answer.json().catch(() => ({ error: `The server answered with status ${answer.status}.` }));
    if (answer.ok) return value;
    throw Object.assign(new Error(value.error), { status: answer.status });
  }

  function load(kind, number) {
    const name = `${kind}-${number}`;
    if (forebear.served && !loading.has(name)) {
      loading.set(name, ask(`explorer/records/${kind}/${number}`).catch((error) => { loading.delete(name); throw error; }));
    }
    if (!loading.has(name)) {
      loading.set(name, new Promise((resolve, reject) => {
        const missing = () => {
          if (!script.done) loading.delete(name); // so that it is tried again
          reject(new Error(`data/${name}.js is missing or damaged.`)); // does nothing where the records have arrived
        };
        arrived.set(name, (records) => { script.done = true; resolve(records); });
        const script = el("script", { src: `data/${name}.js`, onerror: missing, onload: missing });
        document.head.append(script);
      }));
    }
    return loading.get(name);
  }

  const chunkOf = (kind, number) => Math.floor(number / forebear.site.chunks[kind]);

  async function testLines() {
    const chunks = [];
    for (let i = 0; i * forebear.site.chunks.tests < forebear.site.n_tests; i++) chunks.push(load("tests", i));
    return (await Promise.all(chunks)).flat();
  }

  async function prediction(number) {
    if (!(number < forebear.site.n_tests)) return null;
    if (forebear.site.explains) return ask(`explorer/tests/${number}`);
    return (await load("predictions", chunkOf("predictions", number))).find((record) => record.number === number);
  }

  // The record of a training row; null where no prediction here lists it, and there is no server to ask.
  async function trainingRow(row) {
    const place = forebear.site.first_rows.findLastIndex((first) => first <= row);
    const listed = place < 0 ? null : (await load("rows", place)).find((record) => record.row === row);
    return listed ?? (forebear.served ? ask(`explorer/rows/${row}`) : null);
  }

  // What the server says of one text, as the record of a prediction.
  function fromServer(found) {
    const piece = ({ text, value, level, note, read, asked }) => {
      const facts = value === null ? {} : { sign: value > 0 ? "supports" : value < 0 ? "opposes" : "zero", level, note, value: `${value > 0 ? "+" : ""}${Number(value.toPrecision(4))}` };
      if (!read) facts.unread = true;
      if (asked) facts.asked = true;
      return Object.keys(facts).length ? [text, facts] : [text];
    };
    const texts = (marked) => marked.map(({ name, pieces }) => [name, pieces.map(piece)]);
    const words = (list) => list.map(({ text, number, where }) => [text, number, where]);
    const again = (marked) => (marked.some(({ pieces }) => pieces.some(({ value }) => value !== null)) ? texts(marked) : []);
    const role = (name) => [name === found.prediction ? "predicted" : null, name === found.target ? "explained" : null].filter(Boolean).join(", ");
    return {
      ...found, number: null, label: null, wrong: null, duplicate: null, numbers: forebear.site.numbers,
      texts: texts(found.texts), words: words(found.words), probabilities: found.probabilities.map(([name, value, shown]) => [name, value, shown, role(name)]),
      answers: found.answers.map((answer) => ({ ...answer, asked: texts(answer.asked), sides: answer.sides.map((side) => ({
        ...side, rows: side.rows.map((row) => ({ ...row, hub_share: null, texts: texts(row.texts), query_texts: again(row.query_texts), words: words(row.words) })),
      })) })),
    };
  }

  forebear.records = { server, loading, ask, testLines, prediction, trainingRow, fromServer };
})();
