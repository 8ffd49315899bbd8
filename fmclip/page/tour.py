"""A short guided tour in words; closed until somebody wants it."""

TOUR = """
<details class="fm-tour"><summary>How to use this page, in five steps</summary><ol>
<li><b>References.</b> Load an example, or upload 4 to 32 scans that you know to be normal, all of one type and view.
Look at the warnings: one wrong reference changes every answer.</li>
<li><b>Adapt.</b> The first heatmaps come within seconds and are refined while it learns; Stop keeps the last good
state.</li>
<li><b>Query.</b> Upload scans to be compared. They come worst first; with arrow keys you move between the cards.
The score of a scan is that of its oddest 3 %; the highest place of its map shows it. Above the threshold, where about
1 of 10 normal scans lies, a scan &ldquo;deviates&rdquo;.</li>
<li><b>Why.</b> Click a spot below the overlay: you see the reference patches that it was compared with, and how far it
is from them. Edges, text, implants and another protocol are odd too, and no disease.</li>
<li><b>False alarm?</b> Say what is normal: a whole scan becomes a reference and it learns again; a region joins the
memory at once. &ldquo;Within the references&rdquo; means like your references, never healthy.</li>
</ol></details>
"""
