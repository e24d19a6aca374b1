"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Sentences: search, sort, filter by clip.
  const list = byId("list");
  if (list) {
    const [search, sort, clips, count] = ["search", "sort", "clips", "count"].map(byId);
    const normalize = (text) => text.normalize("NFKC").toLowerCase();
    const items = [...list.children].map((element) => ({
      element,
      text: normalize(element.textContent),
    }));
    const show = () => {
      const words = normalize(search.value).split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { element, text } of items) {
        const hasWords = words.every((word) => text.includes(word));
        const hasClip = element.classList.contains("with-clip");
        element.hidden = !hasWords || (clips.checked && !hasClip);
        if (!element.hidden) shown += 1;
      }
      const total = `${items.length} sentences`;
      count.textContent = shown === items.length ? total : `${shown} of ${total}`;
    };
    search.addEventListener("input", show);
    clips.addEventListener("change", show);
    document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    sort.addEventListener("change", () => {
      const field = sort.value.replace("-", "");
      const sign = sort.value.startsWith("-") ? -1 : 1;
      items.sort((a, b) => sign * (a.element.dataset[field] - b.element.dataset[field]));
      list.append(...items.map((item) => item.element));
    });
  }

  // Attention: a line follows the clip, and a click on a word seeks to its peak.
  for (const attention of document.querySelectorAll(".attention")) {
    const video = attention.parentElement.querySelector("video");
    const follow = () => {
      const position = video.duration ? video.currentTime / video.duration : 0;
      attention.style.setProperty("--at", position);
      if (!video.paused) requestAnimationFrame(follow);
    };
    for (const event of ["play", "seeked", "timeupdate"]) video.addEventListener(event, follow);
    attention.addEventListener("click", (event) => {
      const word = event.target.closest("button");
      if (word && video.duration) video.currentTime = word.dataset.at * video.duration;
    });
  }
})();
