// KaTeX draws what pymdownx.arithmatex has marked as an equation, within \( \) or \[ \].
for (const element of document.querySelectorAll(".arithmatex")) {
  let tex = element.textContent.trim().slice(2, -2);
  // A mark that follows is drawn with the equation: else a line could begin with it.
  const mark = /^[.,;:)]*/.exec(element.nextSibling?.data ?? "")[0];
  if (mark) {
    element.nextSibling.data = element.nextSibling.data.slice(mark.length);
    tex += `\\text{${mark}}`;
  }
  katex.render(tex, element, { displayMode: element.tagName === "DIV" });
}
