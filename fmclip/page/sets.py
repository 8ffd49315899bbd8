"""Step 1's handlers for the check of the reference set: a look through the tower, and single scans dropped."""

from __future__ import annotations

import gradio as gr

from fmclip.page import html, references
from fmclip.page.answers import Updates
from fmclip.page.handlers import HandlerGroup, guarded

DROP_CLICK = """
element.addEventListener('click', (event) => {
  const drop = event.target.closest('.fm-drop');
  if (!drop) return;
  drop.disabled = true;
  setTimeout(() => { drop.disabled = false; }, 2000);  // a click that was refused leaves the note as it was
  trigger('click', {labels: JSON.parse(drop.dataset.labels)});
});
"""
"""What a note with buttons does in the browser."""


class SetChecks(HandlerGroup):
    """What is odd about the reference scans, and what the person does about it."""

    @guarded("set_note")
    def look(self, token: str) -> Updates:
        """Ask the tower which scans stand apart; nothing is taken away."""
        visitor = self._visitors.get(token)
        found = references.look(visitor)
        return {"set_note": html.note("", "warning", found), **references.show(visitor)}

    @guarded("set_note")
    def drop(self, event: gr.EventData, token: str) -> Updates:
        """Take away the scans of one warning."""
        visitor = self._idle(token)
        labels = set(map(str, event._data["labels"]))
        dropped = [scan for scan in visitor.references if scan.label in labels]
        return {**references.remove(visitor, dropped), **self.look(token)}
