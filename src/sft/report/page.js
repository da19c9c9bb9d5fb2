// The answers of another step, buttons that copy, the age of the page, and its refresh while the run is at it.
"use strict";
(() => {
  const samples = DATA.samples;
  const slider = document.getElementById("answer-step");
  if (slider && samples.steps.length) {
    const at = document.getElementById("answer-at");
    slider.max = samples.steps.length - 1;
    slider.value = samples.shown;
    document.getElementById("steps").hidden = samples.steps.length < 2;
    const show = () => {
      const step = samples.steps[slider.value];
      at.textContent = step.toLocaleString("en");
      slider.setAttribute("aria-valuetext", `step ${step}`);
      document.querySelectorAll(".sample").forEach((card) => {
        const tuned = card.querySelector(".tuned");
        const [text, score, said] = (samples.answers[step] || {})[card.dataset.number] || ["\u2013", 0, "not asked"];
        tuned.querySelector("pre").textContent = text;
        tuned.querySelector("meter").value = score;
        tuned.querySelector("output").textContent = score.toFixed(2);
        tuned.querySelector(".said").textContent = said;
        tuned.querySelector(".at").textContent = `step ${step.toLocaleString("en")}`;
      });
    };
    slider.addEventListener("input", show);
    show();
  }

  for (const block of document.querySelectorAll(".code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      const text = block.querySelector("pre");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "copied";
      } catch {
        window.getSelection().selectAllChildren(text);
        button.textContent = "selected";
      }
      setTimeout(() => (button.textContent = "copy"), 1500);
    });
    block.append(button);
  }

  const written = document.getElementById("written"), age = document.getElementById("age");
  const running = written.dataset.running === "1";
  const tell = () => {
    const minutes = Math.max(0, Math.round(Date.now() / 60000 - written.dateTime / 60));
    const ago = minutes < 100 ? `${minutes} min` : minutes < 2880 ? `${Math.round(minutes / 60)} h` : `${Math.round(minutes / 1440)} d`;
    age.textContent = minutes ? `(${ago} ago${running ? ", while the run was at it" : ""})` : "";
  };
  tell();
  setInterval(tell, 30000);
  if (running) {
    let used = 0;
    for (const event of ["pointerdown", "keydown", "input"]) addEventListener(event, () => (used = Date.now()));
    setInterval(() => {
      if (!document.hidden && Date.now() - used > 60000) location.reload();
    }, 30000);
  }
})();
