"use strict";
(() => {
  const $ = (selector, from = document) => [...from.querySelectorAll(selector)];

  // Sentences: search, sort, those with a clip.
  const list = document.getElementById("list");
  if (list) {
    const [search, sort, clips, count] = ["search", "sort", "clips", "count"].map((id) => document.getElementById(id));
    const items = [...list.children].map((element) => ({ element, text: element.textContent.normalize("NFKC").toLowerCase() }));
    const show = () => {
      const words = search.value.normalize("NFKC").toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { element, text } of items) {
        const fits = words.every((word) => text.includes(word)) && (!clips.checked || element.classList.contains("seen"));
        element.hidden = !fits;
        shown += fits;
      }
      count.textContent = shown === items.length ? `${shown} sentences` : `${shown} of ${items.length} sentences`;
    };
    search.addEventListener("input", show);
    clips.addEventListener("change", show);
    document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
    sort.addEventListener("change", () => {
      const [, sign, field] = sort.value.match(/^(-?)(.+)$/);
      items.sort((a, b) => (sign ? -1 : 1) * (a.element.dataset[field] - b.element.dataset[field]));
      list.append(...items.map((item) => item.element));
    });
  }

  // Where the model looks: a line that runs with the clip, and words that lead to the moment they look at most.
  for (const looks of $(".attention")) {
    const video = looks.parentElement.querySelector("video");
    const follow = () => {
      looks.style.setProperty("--at", video.duration ? video.currentTime / video.duration : 0);
      if (!video.paused) requestAnimationFrame(follow);
    };
    for (const event of ["play", "seeked", "timeupdate"]) video.addEventListener(event, follow);
    looks.addEventListener("click", (event) => {
      const word = event.target.closest("button");
      if (word && video.duration) video.currentTime = word.dataset.at * video.duration;
    });
  }
})();
