"""The synthesis as batched tensor operations, for a GPU: the same records give the same pictures as on the CPU.

The CPU draws every number (parameters, lattices and coarse noise: small arrays) and finds the foreground; all that runs
over pixels runs here, for many anomalies at once.

    filters.py      blurs, enlargement and reading between pixels, as products with matrices
    morphology.py   distances, connected parts, closing, holes
    poisson.py      conjugate gradients for many boxes
    drafts.py       what the CPU draws for one anomaly
    boxes.py        the boxes of many anomalies on one canvas, and back into their pictures
    lesions.py      the six kinds
    pool.py         many pairs at once, drawn until each can be seen
"""

from fmclip.synthesis.device.pool import DevicePool, render, synthesise_on_device

__all__ = ["DevicePool", "render", "synthesise_on_device"]
