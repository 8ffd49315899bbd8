// A spot of the scan: a click asks about it; arrow keys move the cross (with Shift in large steps), Enter asks.
const clamp = (value) => Math.max(0, Math.min(1, value));
let wasFocused = false;
const told = {};  // one object: with always_last gradio gives a late click the data of the click before it
const ask = (x, y) => { [told.x, told.y] = [x, y]; trigger('click', told); };
element.addEventListener('click', (event) => {
  const frame = event.target.closest('.fm-spot');
  if (!frame) return;
  const box = frame.getBoundingClientRect();
  wasFocused = true;
  ask(clamp((event.clientX - box.left) / box.width), clamp((event.clientY - box.top) / box.height));
});
element.addEventListener('keydown', (event) => {
  const frame = event.target.closest('.fm-spot');
  const move = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key];
  if (!frame || !(move || event.key === 'Enter')) return;
  event.preventDefault();
  let [x, y] = [Number(frame.dataset.x), Number(frame.dataset.y)];
  wasFocused = true;
  if (!move) { ask(x, y); return; }
  const step = event.shiftKey ? 0.1 : 0.02;
  [x, y] = [clamp(x + step * move[0]), clamp(y + step * move[1])];
  [frame.dataset.x, frame.dataset.y] = [x, y];
  const cross = frame.querySelector('.fm-cross');
  [cross.style.left, cross.style.top] = [`${100 * x}%`, `${100 * y}%`];
});
element.addEventListener('focusout', (event) => { if (event.relatedTarget) wasFocused = false; });
new MutationObserver(() => {
  if (wasFocused && !element.contains(document.activeElement)) element.querySelector('.fm-spot')?.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});
