const controls = document.querySelector(".controls");
if (controls) {
  const [select, slider] = [controls.querySelector("select"), controls.querySelector("input[type=range]")];
  const empty = controls.querySelector("input[type=checkbox]");
  const [shownScore, count] = controls.querySelectorAll("output");
  const entries = Array.from(document.querySelectorAll(".entry"), (entry) => ({
    entry, drawn: Array.from(entry.querySelectorAll("[data-score]")), // boxes and captions
  }));
  const apply = () => {
    let [images, objects] = [0, 0];
    shownScore.value = Number(slider.value).toFixed(2);
    for (const { entry, drawn } of entries) {
      let kept = 0;
      for (const one of drawn) {
        const on = Number(one.dataset.score) >= Number(slider.value) &&
          (select.value === "" || one.dataset.label === select.value);
        one.style.display = on ? "" : "none";
        kept += on && one.tagName === "g";
      }
      entry.hidden = kept === 0 && !empty.checked;
      images += !entry.hidden;
      objects += kept;
    }
    const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
    count.value = `${counted(images, "image")}, ${counted(objects, "object")}`;
  };
  for (const control of [select, slider, empty]) control.addEventListener("input", apply);
  apply();
}
