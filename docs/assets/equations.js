// What pymdownx.arithmatex has marked as an equation, KaTeX draws.
renderMathInElement(document.body);
