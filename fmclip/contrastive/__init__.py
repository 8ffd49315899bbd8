"""Image-text learning: stage 1 of FusionMedCLIP and the small radiology CLIP, from pairs to a tower and a search index.

config      settings from YAML and key=value           pairs, sources   what a layout lists, what is skipped
splits      patient-level split, leak check            augmentation, batches   images of a step
models      the halves, frozen or trained, saved       optimisation     rates by depth and step, early stopping
step        gathered negatives, gradient caching       trainer, logs    the loop, exact resume, CSV, TensorBoard
retrieval   exact metrics and search, in chunks        index            a file to search in
gradcam, figures   where and what was found            runs, embedding  all of it in results/<run>/
"""
