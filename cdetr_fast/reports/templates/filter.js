const controls = document.querySelector(".controls");
if (controls) {
  const [select, slider] = [controls.querySelector("select"), controls.querySelector("input[type=range]")];
  const empty = controls.querySelector("input[type=checkbox]");
  const [shownScore, count] = controls.querySelectorAll("output");
  const entries = Array.from(document.querySelectorAll(".entry"), (entry) => ({
    entry, boxes: Array.from(entry.querySelectorAll("g[data-score]")),
  }));
  const apply = () => {
    let [images, objects] = [0, 0];
    shownScore.value = Number(slider.value).toFixed(2);
    for (const { entry, boxes } of entries) {
      let kept = 0;
      for (const box of boxes) {
        const on = Number(box.dataset.score) >= Number(slider.value) &&
          (select.value === "" || box.dataset.label === select.value);
        box.style.display = on ? "" : "none";
        kept += on;
      }
      entry.hidden = kept === 0 && !empty.checked;
      images += !entry.hidden;
      objects += kept;
    }
    count.value = `${images} images, ${objects} objects`;
  };
  for (const control of [select, slider, empty]) control.addEventListener("input", apply);
  apply();
}
