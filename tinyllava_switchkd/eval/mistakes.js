const boxes = [...document.querySelectorAll('nav input')];
function show() {
  const kinds = boxes.filter(box => box.checked).map(box => box.value);
  for (const section of document.querySelectorAll('section')) section.hidden = !kinds.includes(section.dataset.kind);
  for (const card of document.querySelectorAll('article'))
    card.hidden = [...card.querySelectorAll('section')].every(section => section.hidden);
}
boxes.forEach(box => box.addEventListener('change', show));
show();
