// Cards and marks of queries: a click selects; arrow keys, Home and End move between them, Enter selects.
const items = () => [...element.querySelectorAll('button[data-index]')];
let focused = null;
const told = {};  // one object: with always_last gradio gives a late click the data of the click before it
element.addEventListener('click', (event) => {
  const item = event.target.closest('button[data-index]');
  if (!item) return;
  focused = item.dataset.index;
  told.index = Number(item.dataset.index);
  trigger('click', told);
});
element.addEventListener('keydown', (event) => {
  const all = items();
  const place = all.indexOf(event.target.closest('button[data-index]'));
  const next = {ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1,
    Home: 0, End: all.length - 1}[event.key];
  if (place < 0 || next === undefined) return;
  event.preventDefault();
  const target = all[Math.max(0, Math.min(all.length - 1, next))];
  focused = target.dataset.index;
  target.focus();
});
element.addEventListener('focusout', (event) => { if (event.relatedTarget) focused = null; });
// What is drawn again loses the focus: give it back to the same scan.
new MutationObserver(() => {
  if (focused === null || element.contains(document.activeElement)) return;
  element.querySelector(`button[data-index="${focused}"]`)?.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});
