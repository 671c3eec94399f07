"use strict";
(() => {
  const find = (query, within = document) => within.querySelector(query);
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  /* As memplan.units.format_bytes: a need, rounded up to two decimals. */
  function size(bytes) {
    if (bytes < 1024) return `${bytes} B`;
    const units = ["KiB", "MiB", "GiB", "TiB"];
    let power = 1;
    while (power < units.length && Math.ceil((100 * bytes) / 1024 ** power) >= 102400) power += 1;
    return `${(Math.ceil((100 * bytes) / 1024 ** power) / 100).toFixed(2)} ${units[power - 1]}`;
  }

  function tell(data, bytes) {
    data.value = bytes;
    data.textContent = size(bytes);
  }

  function theme() {
    const button = find("#theme");
    const prefersDark = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
    const name = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      name();
    });
    prefersDark.addEventListener("change", name);
    button.hidden = false;
    name();
  }

  /* A line over the timeline, moved by pointer or keys, and the bytes of that moment under it. */
  function timeline({ phase, bytes }) {
    const last = phase.length - 1;
    const pictures = all("svg.timeline").map((svg) => {
      const { left, right, head, base } = svg.dataset;
      const cursor = document.createElementNS(svg.namespaceURI, "line");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("y1", head);
      cursor.setAttribute("y2", base);
      svg.append(cursor);
      return { svg, cursor, left: Number(left), right: Number(right) };
    });
    const readout = find("#moment");
    const categories = all("[data-category]", readout);
    let moment = Number(find(".at", readout).textContent) - 1;

    function show(to) {
      moment = clamp(to, 0, last);
      const total = Object.values(bytes).reduce((sum, column) => sum + column[moment], 0);
      find(".phase", readout).textContent = phase[moment];
      find(".at", readout).textContent = moment + 1;
      tell(find(".total", readout), total);
      for (const data of categories) tell(data, bytes[data.dataset.category][moment]);
      for (const { svg, cursor, left, right } of pictures) {
        const x = left + (moment / Math.max(1, last)) * (right - left);
        cursor.setAttribute("x1", x);
        cursor.setAttribute("x2", x);
        svg.setAttribute("aria-valuenow", moment + 1);
        svg.setAttribute("aria-valuetext", `${phase[moment]}, moment ${moment + 1}: ${size(total)}`);
      }
    }

    for (const { svg, left, right } of pictures) {
      svg.setAttribute("role", "slider");
      svg.setAttribute("tabindex", "0");
      svg.setAttribute("aria-valuemin", 1);
      svg.setAttribute("aria-valuemax", last + 1);
      const follow = (event) => {
        const box = svg.getBoundingClientRect();
        const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
        show(Math.round(((x - left) / (right - left)) * last));
      };
      svg.addEventListener("pointermove", follow);
      svg.addEventListener("pointerdown", follow);
      svg.addEventListener("keydown", (event) => {
        const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -20, PageUp: 20, Home: -last, End: last };
        if (!(event.key in steps)) return;
        event.preventDefault();
        show(moment + steps[event.key]);
      });
    }
    show(moment);
  }

  /* The slider and the points of the frontier show one plan after the other. */
  function plans() {
    const slider = find("#slider");
    const shown = all(".plan");
    const points = all("svg.frontier .point");
    const words = new Map(points.map((point) => [point.dataset.plan, point.getAttribute("aria-label")]));

    function show(at) {
      slider.value = at;
      slider.setAttribute("aria-valuetext", words.get(String(at)));
      for (const plan of shown) plan.hidden = Number(plan.dataset.plan) !== at;
      for (const point of points) {
        const on = Number(point.dataset.plan) === at;
        point.classList.toggle("on", on);
        point.setAttribute("aria-pressed", on);
      }
    }

    slider.addEventListener("input", () => show(Number(slider.value)));
    for (const point of points) {
      const at = Number(point.dataset.plan);
      point.setAttribute("role", "button");
      point.setAttribute("tabindex", "0");
      point.addEventListener("click", () => show(at));
      point.addEventListener("keydown", (event) => {
        const to = { Enter: at, " ": at, ArrowLeft: at - 1, ArrowRight: at + 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show(clamp(to, 0, shown.length - 1));
        find(`[data-plan="${slider.value}"]`, point.ownerSVGElement).focus();
      });
    }
    for (const svg of all("svg.frontier")) svg.setAttribute("role", "group");
    slider.parentElement.hidden = false;
    show(shown.findIndex((plan) => !plan.hidden));
  }

  /* Search and sort; of a long table only the beginning until somebody asks. */
  function breakdown() {
    const first = 12;
    const table = find("#breakdown");
    const [body] = table.tBodies;
    const rows = [...body.rows];
    const texts = new Map(rows.map((row) => [row, `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase()]));
    const search = find("#search");
    const more = find("#more");
    let whole = false;

    function show() {
      const wanted = search.value.trim().toLowerCase();
      const found = [...body.rows].filter((row) => texts.get(row).includes(wanted));
      const seen = new Set(whole || wanted ? found : found.slice(0, first));
      for (const row of rows) row.hidden = !seen.has(row);
      const bytes = found.reduce((sum, row) => sum + Number(find("data", row).value), 0);
      find("output", search.parentElement).textContent = wanted
        ? `${found.length} of ${rows.length} rows, ${size(bytes)}`
        : "";
      more.hidden = whole || Boolean(wanted) || rows.length <= first;
      more.textContent = `Show all ${rows.length} rows`;
    }

    all("th[data-sort]", table).forEach((head) => {
      const column = head.cellIndex;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      const value = head.dataset.sort === "number"
        ? (row) => Number(find("data", row.cells[column]).value)
        : (row) => row.cells[column].textContent;
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending" || (head.dataset.sort === "number" && !head.hasAttribute("aria-sort"));
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = new Intl.Collator("en", { numeric: true });
        const compare = head.dataset.sort === "number" ? (a, b) => value(a) - value(b) : (a, b) => order.compare(value(a), value(b));
        body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)));
        show();
      });
    });
    search.addEventListener("input", show);
    more.addEventListener("click", () => {
      whole = true;
      show();
    });
    search.parentElement.hidden = false;
    show();
  }

  const record = JSON.parse(find("#record").textContent);
  theme();
  if (record) timeline(record);
  if (find("#slider")) plans();
  breakdown();
})();
